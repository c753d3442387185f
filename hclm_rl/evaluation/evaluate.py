"""A model, or a trained one and its base, on the same problems with the same sampler: what `hclm-rl eval` runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedTokenizerBase

from hclm_rl.responses.limits import Unjudged
from hclm_rl.testbed.policy import policy_path

from .compare import Comparison, Samples, compare, estimates
from .generate import GENERATORS, GeneratorName, Response, Sampling, cache_file, load_tokenizer, sample
from .statistics import Estimate, without_nan
from .tasks import Problem, Problems, Skipped, rendered
from .verdict import Criteria, Verdict, judge

TESTBED = "testbed"  # as a model: the shipped policy


@dataclass(frozen=True, kw_only=True)
class Result:
    """All that the table, the page and the JSON show."""

    task: str
    model: str
    base: str | None
    sampling: Sampling
    problems: int  # evaluated
    skipped: list[Skipped]
    notes: list[str]  # sentences on what limits the comparison
    trained: dict[str, Estimate]
    comparison: Comparison | None
    verdict: Verdict | None
    samples: dict[str, list[Samples]] = field(repr=False)  # "model", "base" -> per problem
    prompts: dict[str, str] = field(default_factory=dict, repr=False)  # problem -> the text that both were given

    def as_json(self) -> dict:
        """Plain numbers, lists and text; what is not defined is null."""
        found = {
            "task": self.task,
            "model": self.model,
            "base": self.base,
            "sampling": asdict(self.sampling),
            "problems": self.problems,
            "skipped": {"number": len(self.skipped), "why": [str(each) for each in self.skipped]},
            "notes": self.notes,
            "estimates": {"model": {name: asdict(value) for name, value in self.trained.items()}},
            "per_problem": {
                role: [
                    {"problem": e.problem, "right": sum(e.is_right), "answers": e.answers, "is_right": e.is_right}
                    for e in samples
                ]
                for role, samples in self.samples.items()
            },
        }
        if self.comparison is not None and self.verdict is not None:
            support = self.comparison.support
            ratios = ("retention", "discovery", "dynamic", "net_change", "mcnemar", "detectable")
            found["estimates"]["base"] = {name: asdict(value) for name, value in self.comparison.base.items()}
            found["estimates"]["change"] = {name: asdict(value) for name, value in self.comparison.change.items()}
            found["answer_entropy_change"] = {
                "sharpening": asdict(self.comparison.sharpening),
                "diversity": asdict(self.comparison.diversity),
            }
            found["support"] = {**asdict(support), **{name: getattr(support, name) for name in ratios}}
            found["verdict"] = {"of": "answers", **asdict(self.verdict)}
        return {key: without_nan(value) for key, value in found.items()}


def context_of(model: str) -> float:
    """Tokens that prompt and response may have together. Refuses a model that cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"the model '{model}' could not be loaded: {' '.join(str(error).split())}") from error
    return getattr(config, "max_position_embeddings", None) or math.inf


def why_not(
    prompt: str, tokenizers: dict[str, PreTrainedTokenizerBase], contexts: dict[str, float], new: int, special: bool
) -> str | None:
    """Why one of the models cannot be asked this, None if both can."""
    for model, tokenizer in tokenizers.items():
        try:
            length = len(tokenizer(prompt, add_special_tokens=special, verbose=False)["input_ids"])
        except Exception as error:  # tokenizers raises bare Exceptions, as for a word without a token
            return f"the tokenizer of '{model}' cannot encode the prompt: {' '.join(str(error).split())}"
        if length + new > contexts[model]:
            return (
                f"{length} prompt and {new} response tokens are more than the context of '{model}', {contexts[model]}"
            )
    return None


def over_limits(samples: dict[str, list[Samples]], names: dict[str, str]) -> list[str]:
    """A sentence for each model with answers that went over the limits of judging."""
    notes = []
    for role, of in samples.items():
        answers = [answer for each in of for answer in each.answers]
        over = sum(isinstance(answer, Unjudged) for answer in answers)
        if over:
            notes.append(
                f"'{names[role]}': {over} of {len(answers)} responses went over the limits of judging "
                "and count as wrong, each distinct text as an answer of its own."
            )
    return notes


def cost_of_power(responses: dict[str, list[list[Response]]], names: dict[str, str]) -> list[str]:
    """A sentence for each model whose responses came from power sampling: what it took, and whether the chain moved."""
    notes = []
    for role, of in responses.items():
        powered = [each for some in of for each in some if each.drawn is not None]
        if not powered:
            continue
        drawn, kept = sum(each.drawn or 0 for each in powered), sum(each.tokens for each in powered)
        shares = [each.accepted for each in powered if each.accepted is not None]
        moved = f"{sum(shares) / len(shares):.0%} of the moves were accepted" if shares else "it made no moves"
        notes.append(
            f"'{names[role]}': power sampling drew {drawn / kept:.1f} tokens for each that was kept ({drawn} in all), "
            f"and {moved}; a majority vote of as many tokens is its fair opponent."
        )
    return notes


def judged(problem: Problem, responses: Sequence[Response]) -> Samples:
    """The responses to one problem with their answers; equal texts are judged once."""
    known = {text: problem.judge(text) for text in {response.text for response in responses}}
    entropies = [response.entropy for response in responses if response.entropy is not None]
    n = len(responses)
    return Samples(
        problem=problem.id,
        answers=tuple(known[response.text][0] for response in responses),
        is_right=tuple(known[response.text][1] for response in responses),
        token_entropy=sum(entropies) / n if len(entropies) == n else None,
        length=sum(response.tokens for response in responses) / n,
        truncated=sum(response.is_truncated for response in responses) / n,
    )


def readable(
    problems: Problems, tokenizer: PreTrainedTokenizerBase, is_chat: bool, refuses: Callable[[str], str | None]
) -> tuple[list[Problem], list[str], list[Skipped]]:
    """(the problems that every model can read, the texts of their prompts, the others)"""
    kept, prompts, skipped = [], [], []
    for problem in problems.problems:
        try:
            prompt = rendered(problem.prompt, tokenizer, is_chat)
        except Exception as error:  # a template may raise whatever it likes, as for a role that it does not know
            skipped.append(Skipped(id=problem.id, why=f"the chat template refuses it: {' '.join(str(error).split())}"))
            continue
        why = refuses(prompt)
        if why:
            skipped.append(Skipped(id=problem.id, why=why))
        else:
            kept.append(problem)
            prompts.append(prompt)
    return kept, prompts, skipped


def evaluate(  # long: half of it is signature, docstring and the fields of Result
    model: str,
    problems: Problems,
    sampling: Sampling,
    *,
    base: str | None = None,
    is_chat: bool = False,
    generator: GeneratorName = "transformers",
    cache: Path,
    criteria: Criteria | None = None,
    on_batch: Callable[[str, int, int], None] = lambda role, done, total: None,
) -> Result:
    """Samples, judges, compares. `base` draws with seed + 1, so a model beside itself shows the noise.

    Both models get the same prompt texts, rendered by the trained model's chat template if `is_chat`. Refuses chats
    where the tokenizer has no template.
    """
    roles = {"model": model, **({"base": base} if base else {})}
    paths = {name: policy_path() if name == TESTBED else name for name in roles.values()}
    tokenizers = {name: load_tokenizer(paths[name]) for name in roles.values()}
    contexts, limit = {name: context_of(paths[name]) for name in roles.values()}, sampling.max_new_tokens
    is_chat = is_chat or any(not isinstance(problem.prompt, str) for problem in problems.problems)
    if is_chat and not tokenizers[model].chat_template:
        raise ValueError(f"the tokenizer of '{model}' has no chat template, which messages and --chat need")
    kept, prompts, refused = readable(
        problems, tokenizers[model], is_chat, lambda text: why_not(text, tokenizers, contexts, limit, not is_chat)
    )
    skipped = [*problems.skipped, *refused]
    if not kept:
        first = f"; the first one, {skipped[0]}" if skipped else ""
        raise ValueError(f"{problems.name} has no problem that can be evaluated{first}")
    samples, drawn_by = {}, {}
    for i, (role, name) in enumerate(roles.items()):
        drawn = replace(sampling, seed=sampling.seed + i)
        path = paths[name]
        responses = sample(
            lambda path=path: GENERATORS[generator](path, adds_special_tokens=not is_chat),
            prompts,
            drawn,
            cache_file(cache, path, prompts, drawn, f"{generator} {'chat' if is_chat else 'plain'}"),
            lambda done, total, role=role: on_batch(role, done, total),
        )
        drawn_by[role] = responses
        samples[role] = [judged(problem, each) for problem, each in zip(kept, responses, strict=True)]
    notes, same_tokenizer = [*over_limits(samples, roles), *cost_of_power(drawn_by, roles)], True
    if base and tokenizers[base].get_vocab() != tokenizers[model].get_vocab():
        same_tokenizer = False
        notes.append(
            f"'{model}' and '{base}' have different tokenizers: lengths, the limit of {sampling.max_new_tokens} tokens "
            "and token entropies are not comparable, all else is."
        )
    compared = compare(samples["base"], samples["model"]) if base else None
    return Result(
        task=problems.name,
        model=model,
        base=base,
        sampling=sampling,
        problems=len(kept),
        skipped=skipped,
        notes=notes,
        trained=compared.trained if compared else estimates(samples["model"]),
        comparison=compared,
        verdict=judge(samples["base"], samples["model"], criteria=criteria, same_tokenizer=same_tokenizer)
        if base
        else None,
        samples=samples,
        prompts={problem.id: prompt for problem, prompt in zip(kept, prompts, strict=True)},
    )
