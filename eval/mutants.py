"""Mutants: small faults put into the library one at a time, to see whether the tests that belong to it notice

    python eval/mutants.py [--only blend] [--jobs 2] [--limit 300] [--page docs/reliability.md]

Each entry of mutants.yaml is a file, a text in it, what stands in its place, and the tests that should fail. It is
applied in a temporary copy of the package, never in the working tree; first the same tests must pass there unchanged.
A mutant is caught if one of its tests fails or does not end in time. A mutant that cannot even be imported is an error,
as is a text that does not stand exactly once in its file: an entry that no longer fits must not pass for a caught one.
A fork of one process that has torch and TRL in memory runs each, so it costs seconds and not a start of both.
"""

import argparse
import ast
import contextlib
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = Path(__file__).with_suffix(".yaml")
COPIED = ("hclm_rl", "tests", "pyproject.toml")  # what a fork must find beside the package; the rest is linked
IN_MEMORY = ["torch", "transformers", "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "datasets", "pytest"]
BEGIN, END = "<!-- mutants: begin -->", "<!-- mutants: end -->"
PASSED, FAILED = 0, 1  # pytest's exit codes; the others say that no test ran


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One entry of the data file."""

    file: str
    before: str
    after: str
    tests: str  # pytest's words, with spaces between
    why: str  # what would be lost if nobody noticed

    @property
    def named(self) -> str:
        return f"{self.file}: {self.before.strip()!r}"

    @property
    def test_ids(self) -> list[str]:
        return self.tests.split()

    def applied(self, source: str) -> str:
        """The file's text with the fault in it."""
        found = source.count(self.before)
        if found != 1:
            raise ValueError(f"{self.named} must stand there exactly once, and stands there {found} times")
        if self.before == self.after:
            raise ValueError(f"{self.named}: before and after are the same")
        return source.replace(self.before, self.after)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a mutant."""

    mutant: Mutant
    word: str  # "caught", "caught by the clock", "survived" or "error"
    seconds: float
    told: str  # the last line of pytest

    @property
    def is_caught(self) -> bool:
        return self.word.startswith("caught")


def read(file: Path = ENTRIES) -> list[Mutant]:
    return [Mutant(**entry) for entry in yaml.safe_load(file.read_text())]


def faults(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """A sentence for each entry that does not fit the tree: its text, or a test of it."""
    told = []
    for mutant in mutants:
        if not (root / mutant.file).is_file():
            told.append(f"{mutant.named}: there is no such file")
            continue
        try:
            mutant.applied((root / mutant.file).read_text())
        except ValueError as error:
            told.append(str(error))
        told += [f"{mutant.named}: there is no test {each}" for each in mutant.test_ids if not is_test(each, root)]
    return told


def is_test(node: str, root: Path = ROOT) -> bool:
    """Whether a file of tests, or a function in it, is there; its parameters are not looked at."""
    name, _, function = node.partition("::")
    if not (root / name).is_file():
        return False
    body = ast.parse((root / name).read_text()).body
    return not function or function.partition("[")[0] in {
        each.name for each in body if isinstance(each, ast.FunctionDef)
    }


def copy_of(root: Path, folder: Path) -> Path:
    """A tree whose package and tests are copies; what else stands at the root is linked."""
    folder.mkdir()
    for path in root.iterdir():
        if path.name not in COPIED and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for name in filter(lambda name: (root / name).exists(), COPIED):
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(root / name, folder / name)
    return folder


def forget_compiled(file: Path) -> None:
    """Python compares time and size, and a mutant may have both of the file before it."""
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


def in_fork(tree: str, tests: list[str], output: str, is_patient: bool) -> None:
    """Runs in a process of its own: pytest in the copy, whose package is the first that is found."""
    os.chdir(tree)
    sys.path[:] = [tree, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        import pytest

        options = ["-q", "-n", "0", "-p", "no:cacheprovider", *([] if is_patient else ["-x"])]
        code = pytest.main([*options, *tests])
    os._exit(int(code))


def run_tests(tree: Path, tests: list[str], limit: float, is_patient: bool = False) -> tuple[int | None, str]:
    """(pytest's exit code, its last lines); None where it did not end in time."""
    output = tree.with_name(f"{tree.name}.out")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=in_fork, args=(str(tree), tests, str(output), is_patient))
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    lines = output.read_text().strip().splitlines() if output.exists() else []
    return code, "\n".join(lines[-30:])


def judged(mutant: Mutant, tree: Path, limit: float) -> Outcome:
    """Puts the fault in, runs its tests, takes it out again."""
    file, start = tree / mutant.file, time.perf_counter()
    source = file.read_text()
    try:
        file.write_text(mutant.applied(source))
        forget_compiled(file)
        code, told = run_tests(tree, mutant.test_ids, limit)
    finally:
        file.write_text(source)
        forget_compiled(file)
    word = {PASSED: "survived", FAILED: "caught", None: "caught by the clock"}.get(code, "error")
    lines = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))] or told.splitlines()
    last = lines[-1] if lines else ""
    return Outcome(mutant=mutant, word=word, seconds=time.perf_counter() - start, told=last)


def run_all(
    mutants: Sequence[Mutant], root: Path, jobs: int, limit: float, say: Callable[[Outcome], None]
) -> list[Outcome]:
    """Every mutant's outcome, in the order of the file; the tests must pass on the tree as it is."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(IN_MEMORY)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            trees.put(copy_of(root, Path(folder) / f"tree{number}"))
        tree = trees.get()
        tests = sorted({each for mutant in mutants for each in mutant.test_ids})
        code, told = run_tests(tree, tests, limit * max(len(mutants), 10), is_patient=True)
        trees.put(tree)
        if code != PASSED:
            raise SystemExit(f"The tests do not pass on the tree as it is (exit code {code}):\n{told}")

        def judge(mutant: Mutant) -> Outcome:
            tree = trees.get()
            try:
                outcome = judged(mutant, tree, limit)
            finally:
                trees.put(tree)
            say(outcome)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(judge, mutants))


def shown(outcomes: Sequence[Outcome]) -> Table:
    table = Table("file", "what would be lost", "tests", "result", "s", title="Mutants", row_styles=["", "dim"])
    for each in outcomes:
        result = each.word if each.is_caught else f"[bold red]{each.word}[/]"
        tests = " ".join(test.removeprefix("tests/") for test in each.mutant.test_ids)
        table.add_row(each.mutant.file, each.mutant.why, tests, result, f"{each.seconds:.0f}")
    return table


def as_page(outcomes: Sequence[Outcome]) -> str:
    """The table of the documentation."""
    rows = ["| file | what would be lost if nobody noticed | tests that notice | result |", "|---|---|---|---|"]
    for each in outcomes:
        file = each.mutant.file.removeprefix("hclm_rl/")
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in each.mutant.test_ids)
        rows.append(f"| `{file}` | {each.mutant.why.replace('|', chr(92) + '|')} | {tests} | {each.word} |")
    return "\n".join([told(outcomes), "", *rows])


def told(outcomes: Sequence[Outcome]) -> str:
    rooms = Counter(each.mutant.file.split("/")[1] for each in outcomes)
    parts = ", ".join(f"{room} {count}" for room, count in sorted(rooms.items()))
    return f"{sum(each.is_caught for each in outcomes)} of {len(outcomes)} mutants are caught ({parts})."


def write_page(page: Path, outcomes: Sequence[Outcome]) -> None:
    """Puts the table between the marks of the page."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} must hold {BEGIN} and {END} once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n{as_page(outcomes)}\n{END}{tail}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", metavar="TEXT", default="", help="entries whose file, text or reason holds TEXT")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="mutants at once; one by default")
    parser.add_argument("--limit", metavar="S", type=float, default=300.0, help="seconds for a mutant; 300 by default")
    parser.add_argument(
        "--page", type=Path, help="page of the documentation to write the table into; needs a whole run"
    )
    args = parser.parse_args(argv)
    if args.page and args.only:
        parser.error("--page needs all mutants, so it does not go with --only")
    mutants = [each for each in read() if args.only in f"{each.file} {each.before} {each.after} {each.why}"]
    if not mutants:
        parser.error(f"no entry of {ENTRIES.name} holds {args.only!r}")
    if wrong := faults(mutants):
        raise SystemExit("\n".join(wrong))
    console = Console()
    outcomes = run_all(
        mutants,
        ROOT,
        max(args.jobs, 1),
        args.limit,
        lambda each: console.print(
            f"{each.word:10} {each.seconds:4.0f} s  {each.mutant.named}  {'' if each.is_caught else each.told}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        ),
    )
    console.print(shown(outcomes))
    console.print(told(outcomes))
    if args.page:
        write_page(args.page, outcomes)
    return int(not all(each.is_caught for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
