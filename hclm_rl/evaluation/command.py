"""`hclm-rl eval MODEL [--base BASE] --task TASK`"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from .verdict import Verdict


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> Parser:
    found = Parser(
        prog="hclm-rl eval",
        description="pass@k, diversity and, beside a base, whether training has cost either.",
        allow_abbrev=False,
    )
    found.add_argument("model", help="a folder, a hub name, or `testbed` for the shipped policy")
    found.add_argument("--base", help="the model that training started from; brings support, changes and the verdict")
    task = found.add_argument_group("problems")
    task.add_argument(
        "--task",
        required=True,
        help="coins, arithmetic or a dotted path (a Task), gym:NAME (reasoning-gym), PATH.jsonl, dataset:NAME",
    )
    task.add_argument("--task_kwargs", default="{}", help="JSON; arguments of a Task or of a reasoning-gym task")
    task.add_argument("--problems", type=int, help="the first so many")
    task.add_argument("--split", default="test", help="of a data set")
    task.add_argument("--config", help="of a data set")
    task.add_argument("--prompt_column", default="prompt")
    task.add_argument("--answer_column", default="answer")
    task.add_argument("--chat", action="store_true", help="prompts go through the trained model's chat template")
    draw = found.add_argument_group("responses")
    draw.add_argument("--samples", type=int, default=64, help="per problem (64)")
    draw.add_argument("--temperature", type=float, default=1.0)
    draw.add_argument("--top_p", type=float, default=1.0)
    draw.add_argument("--max_new_tokens", type=int, help="default: the task's, else 512")
    draw.add_argument("--seed", type=int, default=0, help="the base draws with seed + 1")
    draw.add_argument("--batch", type=int, default=64, help="responses generated at once (64)")
    draw.add_argument("--generator", choices=("transformers", "vllm"), default="transformers")
    found.add_argument("--out", type=Path, default=Path("runs/eval"), help="gets report.json, report.html (runs/eval)")
    found.add_argument("--cache", type=Path, help="responses of this and earlier runs; default: OUT/responses")
    return found


def task_kwargs(text: str) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"task_kwargs is JSON, as in '{{\"eval_prompts\": 64}}': {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"task_kwargs must be a mapping, got {text}")
    return found


def say(verdict: "Verdict", console: Console) -> None:
    """The signals with their reasons, and what they come to."""
    for signal in verdict.signals:
        state = "not judged" if signal.is_given is None else "yes" if signal.is_given else "no"
        console.print(f"{signal.name}: {state} ({signal.because})", markup=False, highlight=False)
    console.print(f"Verdict: [bold]{escape(verdict.kind)}[/bold]")


def main(arguments: Sequence[str]) -> int:  # long: most of it hands a flag on; imports wait for the extra
    options = parser().parse_args(list(arguments))
    try:
        from transformers.utils.logging import disable_progress_bar

        from .evaluate import evaluate
        from .generate import REPORT_NAME, Sampling
        from .show import support_line, terminal_table, write_page
        from .tasks import Source, load
    except ModuleNotFoundError as error:
        raise ValueError(f"hclm-rl eval needs {error.name}: pip install 'hclm-rl[eval]'") from error
    source = Source(
        task=options.task,
        kwargs=task_kwargs(options.task_kwargs),
        split=options.split,
        config=options.config,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        limit=options.problems,
    )
    # what is wrong with the numbers is said before a data set is loaded
    given = {name: vars(options)[name] for name in ("samples", "temperature", "top_p", "seed", "batch")}
    sampling = Sampling(max_new_tokens=512 if options.max_new_tokens is None else options.max_new_tokens, **given)
    problems = load(source)
    if options.max_new_tokens is None:
        sampling = Sampling(max_new_tokens=problems.max_new_tokens, **given)
    disable_progress_bar()  # of transformers' loading, beside ours
    console = Console()
    with Console(stderr=True).status("") as status:
        result = evaluate(
            options.model,
            problems,
            sampling,
            base=options.base,
            is_chat=options.chat,
            generator=options.generator,
            cache=options.cache or options.out / "responses",
            on_batch=lambda role, done, total: status.update(f"{role}: batch {done} of {total}"),
        )
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / REPORT_NAME
    written.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    console.print(terminal_table(result))
    for note in [*result.notes, *map(str, result.skipped)]:
        print(note, file=sys.stderr)
    if result.verdict:
        console.print(support_line(result), markup=False, highlight=False)
        say(result.verdict, console)
    print(written)
    print(write_page(result, options.out / "report.html"))
    return 0
