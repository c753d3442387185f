"""`hclm-rl generate --config RECIPE`: responses with a method of decoding, and what they cost."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..decoding.rows import Drawn, streams_of
from ..evaluation.generate import TransformersGenerator
from ..evaluation.tasks import Problem, Problems, Prompt, Source, load, rendered
from ..recipe.arguments import recipe_of, settings_by, with_recipe_apart
from ..recipe.limits import NOT_NEGATIVE
from ..recipe.parser import RecipeParser
from ..recipe.refusals import refuse_unwritable
from ..responses.names import custom_code
from ..responses.outcomes import pass_at_k
from ..testbed.policy import policy_path
from .callbacks import write_whole
from .decoders import DECODERS, Base, Decoder, decoder_of
from .loading import TESTBED


@dataclass
class GenerateArguments:
    """What is asked, of which model, how its tokens are drawn."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder, a name on the hub, or `testbed` for the shipped policy."}
    )
    task: str | None = field(
        default=None,
        metadata={"help": "coins, ..., gym:NAME, PATH.jsonl, dataset:NAME or a dotted path, as for hclm-rl eval."},
    )
    task_kwargs: dict | str | None = field(default=None, metadata={"help": "Arguments of the task."})
    problems: int | None = field(default=None, metadata={"help": "The first so many; default: all."})
    decoding: dict | str | None = field(
        default=None,
        metadata={
            "help": f"One of {', '.join(DECODERS)}, alone or with hyper-parameters, `{{em_inf: {{steps: 5}}}}`; in "
            "YAML a mapping, on the command line JSON. Without it responses are sampled plainly."
        },
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "Whether prompts of plain text go through the model's chat template, too; messages always do."
        },
    )
    samples: int = field(default=8, metadata={"help": "Responses to a problem."})
    temperature: float = field(default=1.0, metadata={"help": "After the method; 0 takes the likeliest word."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Default: the task's, else 512."})
    seed: int = field(default=0, metadata={"help": "Each response has a stream of its own from it."})
    batch: int = field(default=64, metadata={"help": "Responses generated at once; they do not depend on it."})
    output_dir: str = field(default="runs/generate", metadata={"help": "Gets responses.jsonl and summary.json."})
    allow_custom_code: bool = field(
        default=False,
        metadata={"help": "On the command line only: let the recipe name code of your own. See SECURITY.md."},
    )

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.model_name_or_path is None:
            raise ValueError("the model is missing: set model_name_or_path (a folder, a name on the hub, or `testbed`)")
        if self.task is None:
            raise ValueError("the problems are missing: set task")
        if isinstance(self.task_kwargs, str):
            try:
                self.task_kwargs = json.loads(self.task_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"task_kwargs on the command line is JSON: {error}") from error
        if not isinstance(self.task_kwargs, dict | None):
            raise ValueError(f"task_kwargs must be a mapping, got {self.task_kwargs!r:.80}")


def rows_of(problem: Problem, number: int, texts: list[str], drawn: list[Drawn]) -> list[dict]:
    """What responses.jsonl holds of a problem."""
    rows = []
    for text, each in zip(texts, drawn, strict=True):
        answer, is_right = problem.judge(text)
        rows.append(
            {
                "problem": problem.id,
                "number": number,
                "prompt": problem.prompt,
                "response": text,
                "answer": None if answer is None else str(answer),
                "is_right": is_right,
                "tokens": len(each.ids),
                "entropy": sum(each.entropies) / len(each.entropies),
                "is_truncated": not each.is_ended,
            }
        )
    return rows


def summary_of(rows: list[dict], samples: int) -> dict[str, float]:
    """pass@k and means over the responses."""
    right: dict[int, int] = {}
    for row in rows:
        right[row["number"]] = right.get(row["number"], 0) + row["is_right"]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    tokens = sum(row["tokens"] for row in rows)
    return {
        **{f"pass@{k}": sum(pass_at_k(samples, each, k) for each in right.values()) / len(right) for k in ks},
        "token_entropy": sum(row["entropy"] * row["tokens"] for row in rows) / tokens,
        "length": tokens / len(rows),
        "truncated": sum(row["is_truncated"] for row in rows) / len(rows),
    }


def answered(
    options: GenerateArguments, asked: list[Problem], decoder: Decoder, tokenizer: PreTrainedTokenizerBase
) -> list[dict]:
    """The rows of responses.jsonl."""
    names = [(i, sample) for i in range(len(asked)) for sample in range(options.samples)]
    drawn: list[Drawn] = []
    with torch.no_grad():
        for at in range(0, len(names), options.batch):
            some = names[at : at + options.batch]
            streams = streams_of(options.seed, [f"{i}/{sample}" for i, sample in some])
            drawn += decoder([asked[i].prompt for i, _ in some], streams)
    texts = tokenizer.batch_decode([each.ids for each in drawn], skip_special_tokens=True)
    rows = []
    for i, problem in enumerate(asked):
        mine = slice(i * options.samples, (i + 1) * options.samples)
        rows += rows_of(problem, i, texts[mine], drawn[mine])
    return rows


def encoder_of(tokenizer: PreTrainedTokenizerBase, model: str, is_chat: bool) -> Callable[[Prompt], list[int]]:
    """From a prompt to its ids; with `is_chat` by the chat template, whose text has the special tokens already."""
    if is_chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of '{model}' has no chat template, which messages and `chat: true` need")

    def encode(prompt: Prompt) -> list[int]:
        try:
            text = rendered(prompt, tokenizer, is_chat)
        except Exception as error:  # a template may raise whatever it likes, as for a role that it does not know
            raise ValueError(
                f"the chat template refuses the prompt {prompt!s:.80}: {' '.join(str(error).split())}"
            ) from error
        try:
            return tokenizer(text, add_special_tokens=not is_chat)["input_ids"]  # pyright: ignore[reportReturnType]
        except Exception as error:  # tokenizers raises no other where it lacks a word and one for unknown words
            raise ValueError(f"the tokenizer of '{model}' cannot read the prompt {text!r:.80}: {error}") from error

    return encode


def run(options: GenerateArguments) -> dict:  # long: a third of it is the fields of Base and of the summary
    """The whole job; what summary.json holds."""
    start = time.perf_counter()
    folder = Path(options.output_dir)
    refuse_unwritable(folder)
    assert options.task is not None and options.model_name_or_path is not None
    kwargs = options.task_kwargs if isinstance(options.task_kwargs, dict) else {}
    problems: Problems = load(Source(task=options.task, kwargs=kwargs, limit=options.problems))
    asked = problems.problems
    if not asked:
        raise ValueError(f"{problems.name} has no problem that can be used: {'; '.join(map(str, problems.skipped))}")
    path = policy_path() if options.model_name_or_path == TESTBED else options.model_name_or_path
    source = TransformersGenerator(path)
    tokenizer = source.tokenizer
    base = Base(
        model=source.model,  # pyright: ignore[reportArgumentType]  (typed for a protocol)
        encode=encoder_of(tokenizer, path, options.chat or any(not isinstance(each.prompt, str) for each in asked)),
        ends=source.ends,
        pad=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
        longest=options.max_new_tokens or problems.max_new_tokens,
        temperature=options.temperature,
    )
    decoder = decoder_of(options.decoding, base)
    rows = answered(options, asked, decoder, tokenizer)
    kept = sum(row["tokens"] for row in rows)
    summary = {
        "model": options.model_name_or_path,
        "task": options.task,
        "decoding": options.decoding,
        "problems": len(asked),
        "samples": options.samples,
        "seed": options.seed,
        **summary_of(rows, options.samples),
        "tokens_drawn": kept + decoder.extra_tokens,
        **decoder.report(),
        "seconds": time.perf_counter() - start,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "responses.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def parser_of() -> RecipeParser:
    """The keys and flags of the command; temperature 0, which training refuses, is greedy here."""
    parser = RecipeParser([GenerateArguments], prog="hclm-rl generate")
    parser.limits = {"temperature": NOT_NEGATIVE}
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a mistake in the recipe is one sentence on stderr and exit code 2."""
    line = with_recipe_apart(sys.argv[1:] if arguments is None else arguments)
    try:
        recipe_of(line)
        [options] = settings_by(parser_of(), line)
        with custom_code(options.allow_custom_code):
            summary = run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"hclm-rl generate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    return 0
