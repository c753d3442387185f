"""`hclm-rl eval MODEL [--base BASE] --task TASK`, `hclm-rl eval --counts BASE TRAINED`"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.markup import escape

from . import REPORT_NAME

if TYPE_CHECKING:
    from .verdict import Verdict


COUNTS = "--counts"  # in place of a model and a task
NEEDS = "hclm-rl eval needs {}: pip install 'hclm-rl[eval]'"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A mistake on the command line is a ValueError, which the command tells in one sentence."""
        raise ValueError(message)


def add_sampling(draw: argparse._ArgumentGroup) -> None:
    """How responses are drawn."""
    draw.add_argument("--samples", type=int, default=64, metavar="N", help="per problem (64)")
    draw.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling (1.0)")
    draw.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling (1.0: off)")
    draw.add_argument(
        "--power", type=float, metavar="ALPHA", help="power sampling: whole texts from p^ALPHA, without training (4)"
    )
    draw.add_argument("--power_moves", type=int, default=10, metavar="N", help="after each block (10)")
    draw.add_argument("--power_blocks", type=int, default=16, metavar="N", help="into which max_new_tokens is cut (16)")
    draw.add_argument("--max_new_tokens", type=int, metavar="N", help="default: the task's, else 512")
    draw.add_argument("--seed", type=int, default=0, metavar="N", help="the base draws with seed + 1")
    draw.add_argument("--batch", type=int, default=64, metavar="N", help="responses generated at once (64)")
    draw.add_argument(
        "--generator",
        choices=("transformers", "vllm"),
        default="transformers",
        metavar="NAME",
        help="transformers (default) or vllm",
    )


def parser() -> Parser:
    """Of a model and a task."""
    found = Parser(
        prog="hclm-rl eval",
        usage="hclm-rl eval MODEL --task TASK [--base BASE] [--KEY VALUE ...]",  # all in brackets take nine lines
        description="pass@k, diversity and, beside a base, whether training has cost either.",
        epilog="hclm-rl eval --counts BASE TRAINED takes counts of right responses instead: --counts --help",
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
    task.add_argument(
        "--task_kwargs", default="{}", metavar="JSON", help="arguments of a Task or of a reasoning-gym task"
    )
    task.add_argument("--problems", type=int, metavar="N", help="the first so many")
    task.add_argument("--split", default="test", metavar="NAME", help="of a data set (test)")
    task.add_argument("--config", metavar="NAME", help="of a data set")
    task.add_argument("--prompt_column", default="prompt", metavar="NAME", help="of a file or a data set (prompt)")
    task.add_argument("--answer_column", default="answer", metavar="NAME", help="of a file or a data set (answer)")
    task.add_argument("--chat", action="store_true", help="prompts go through the trained model's chat template")
    add_sampling(found.add_argument_group("responses"))
    found.add_argument("--out", type=Path, default=Path("runs/eval"), help="gets report.json, report.html (runs/eval)")
    found.add_argument("--cache", type=Path, help="responses of this and earlier runs; default: OUT/responses")
    return found


def task_kwargs(text: str) -> dict:
    """The mapping that the JSON holds; a ValueError for anything else."""
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
    console.print(f"Verdict on [bold]{escape(verdict.said)}[/bold]", soft_wrap=True)


def counts_parser() -> Parser:
    """Of two files of counts."""
    found = Parser(
        prog="hclm-rl eval --counts",
        description="pass@k, support and a verdict from how often each problem was answered right; loads no model.",
        epilog="A file has one JSON object a line: {id, n, c} (n responses, c right), or the samples of lm-eval "
        "(--log_samples) or verl (validation_data_dir), told by their keys. docs/evaluation.md",
        allow_abbrev=False,
    )
    found.add_argument(COUNTS, nargs=2, type=Path, required=True, metavar=("BASE", "TRAINED"), help="JSONL files")
    found.add_argument("--metric", help="of sample files: the key that says whether a response is right")
    found.add_argument("--filter", help="of lm-eval's files: the one to read, where they have several")
    found.add_argument("--right_at", type=float, default=1.0, help="a response is right with at least this (1.0)")
    found.add_argument("--seed", type=int, default=0, help="of the resamples of problems")
    found.add_argument("--out", type=Path, default=Path("runs/eval"), help="gets report.json, report.html (runs/eval)")
    return found


def of_counts(arguments: list[str]) -> int:
    """`hclm-rl eval --counts`: table, verdict, JSON and page of two files. Refuses what an extra is missing for."""
    options = counts_parser().parse_args(arguments)
    try:
        from .counted import compare_counts
        from .counts import Reading, read_counts
        from .show import counted_table, support_line, write_counted_page
    except ModuleNotFoundError as error:
        raise ValueError(NEEDS.format(error.name)) from error
    reading = Reading(metric=options.metric, filter=options.filter, right_at=options.right_at)
    result = compare_counts(*(read_counts(path, reading) for path in options.counts), seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / REPORT_NAME
    written.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    console = Console()
    console.print(counted_table(result))
    for note in result.notes:
        print(note, file=sys.stderr)
    if not isinstance(result.support, str):
        console.print(support_line(result.support), markup=False, highlight=False)
    say(result.verdict, console)
    print(written)
    print(write_counted_page(result, options.out / "report.html"))
    return 0


def main(arguments: Sequence[str]) -> int:  # long: most of it hands a flag on; imports wait for the extra
    """Table, verdict, JSON and page of a model, beside its base where one is given."""
    line = list(arguments)
    if any(each.partition("=")[0] == COUNTS for each in line):
        return of_counts(line)
    options = parser().parse_args(line)
    try:
        from transformers.utils.logging import disable_progress_bar

        from hclm_rl.decoding.power_sampling import PowerSampling

        from .evaluate import evaluate
        from .generate import Sampling
        from .show import support_line, terminal_table, write_page
        from .tasks import Source, load
    except ModuleNotFoundError as error:
        raise ValueError(NEEDS.format(error.name)) from error
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
    if options.power is not None:
        given["power"] = PowerSampling(alpha=options.power, moves=options.power_moves, blocks=options.power_blocks)
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
    if result.comparison and result.verdict:
        console.print(support_line(result.comparison.support), markup=False, highlight=False)
        say(result.verdict, console)
    print(written)
    print(write_page(result, options.out / "report.html"))
    return 0
