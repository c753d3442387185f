"""Trains every method of the library on a task over several seeds and compares it with plain GRPO.

python eval/leaderboard.py --runs docs/leaderboard_runs.tar.xz --only my_method --no-grid   # beside the published runs
python eval/leaderboard.py --page runs/page.md --jobs 2   # all anew: eval/leaderboard.yaml's first task, first setting
python eval/leaderboard.py --page runs/page.md --task products --setting on_policy --only plain clip_cov --seeds 1 2 3
python eval/leaderboard.py --page runs/page.md --only max_rl --no-grid --temperatures 0.6 0.8   # sampled so as well
python eval/leaderboard.py --table                        # only writes docs/leaderboard.md from the runs that are there

First each entry at its recipe's values; then the points of its grid on other seeds, measured on the validation
split; then the best point on the reporting seeds and the test split. A run is a folder; one with a summary is finished
and never repeated, any other is trained anew: start the same command again after an interruption. One process trains
many runs, one thread each. See eval/leaderboard.yaml for what can be changed. Beside the page lies an archive of all
summaries it was made from; what each entry showed is written into its recipe's header and docs/methods.md (--stamp).
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import lzma
import os
import platform
import re
import sys
import tarfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from many_runs import over_processes
from transformers import TrainerCallback

from hclm_rl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from hclm_rl.commands import launch
from hclm_rl.commands.launch import build_trainer, on_held_out, written
from hclm_rl.recipe.arguments import RunArguments, parse
from hclm_rl.testbed import Evaluation, Task
from hclm_rl.watch.report.runs import LOG_NAME, RECIPE_NAME, SUMMARY_NAME, read_run
from hclm_rl.watch.versions import PACKAGES

from . import page as leaderboard_page
from . import stamp as leaderboard_stamp
from .plan import Board, Candidate, Run, chosen, is_finished
from .powered import by_power

HERE = Path(__file__).parents[1]
ERROR_NAME, OUTPUT_NAME = "error.txt", "output.txt"
DIGITS = 3  # of the entropies of each prompt


def train(run: Run, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """One run from its settings to its summary, with a fresh trainer; the summary is the last thing written."""
    start, cpu_start = time.perf_counter(), time.process_time()
    run.folder.mkdir(parents=True, exist_ok=True)
    for name in (SUMMARY_NAME, LOG_NAME, ERROR_NAME):
        (run.folder / name).unlink(missing_ok=True)
    recipe = run.folder / RECIPE_NAME
    recipe.write_text(yaml.safe_dump(run.recipe, sort_keys=False))
    arguments, config, model, _ = settings = parse("grpo", ["--config", str(recipe)])
    trainer, task = build_trainer("grpo", settings, [*launch.resets_of(arguments, config), *callbacks])
    if task is None:
        raise ValueError("a task of the leaderboard needs `task`, whose verifier says which answers are right")
    if run.temperatures and task.environment is not None:
        raise ValueError("other temperatures are measured on tasks without tools alone")
    seconds, cpu_seconds = time.perf_counter(), time.process_time()
    if run.is_trained:
        launch.train(trainer, arguments)
    seconds, cpu_seconds = time.perf_counter() - seconds, time.process_time() - cpu_seconds
    result = on_held_out(trainer, task, arguments, config)
    summary = {
        "settings": run.settings,
        "algorithm": "grpo",
        "model": model.model_name_or_path,
        "task": arguments.task,
        "terms": run.settings.get("entropy_terms", []),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "device": trainer.accelerator.device.type,
        "affected": affected(run.folder),
        "after": written(result),
        "per_prompt": per_prompt(result),
        "at_temperature": at_temperatures(run, trainer, task, arguments, config),
        "seconds": {
            "all": time.perf_counter() - start,
            "all_cpu": time.process_time() - cpu_start,
            "training": seconds,
            "training_cpu": cpu_seconds,
        },
        "versions": {name: version(name) for name in PACKAGES},
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    trainer.end()
    half_written = run.folder / f".{SUMMARY_NAME}"
    half_written.write_text(json.dumps(summary, default=repr) + "\n")
    half_written.replace(run.folder / SUMMARY_NAME)


def machine() -> str:
    """The processor that trained, by its maker's name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpus.read_text(), flags=re.MULTILINE) if cpus.is_file() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def pack(archive: Path, out: Path) -> None:
    """All summaries of a folder of runs into one file, whole or not at all; equal runs give equal archives."""
    half_written = archive.with_name(f".{archive.name}")
    with tarfile.open(half_written, "w:xz") as packed:
        for path in sorted(out.rglob(SUMMARY_NAME)):
            content = path.read_bytes()
            entry = tarfile.TarInfo(path.relative_to(out).as_posix())  # of no owner and no date
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    half_written.replace(archive)


def refuse_to_lose_runs(archive: Path, out: Path) -> None:
    """A page is made from the runs that are there, and its archive with it."""
    if not archive.is_file():
        return
    with tarfile.open(archive, "r:xz") as packed:
        lost = sum(not (out / name).exists() for name in packed.getnames())
    if lost:
        raise ValueError(
            f"{archive} holds {lost} run{'s' * (lost > 1)} that {out} has not, and the page would lack: give "
            f"--runs {archive}, or another --page"
        )


def unpack(archive: Path, out: Path) -> None:
    """The summaries that a folder of runs does not have."""
    with tarfile.open(archive, "r:xz") as packed:
        for entry in packed:
            if not (out / entry.name).exists():
                packed.extract(entry, out, filter="data")


def per_prompt(result: Evaluation) -> dict[str, list]:
    """What the page is made from: n is `samples`, c is `correct`."""
    values = result.per_prompt
    return {
        "correct": [round(share * result.samples) for share in values["pass@1"]],
        "distinct_correct": [round(value) for value in values["distinct_correct"]],
        "token_entropy": [round(value, DIGITS) for value in values["token_entropy"]],
        "answer_entropy": [round(value, DIGITS) for value in values["answer_entropy"]],
    }


def at_temperatures(
    run: Run,
    trainer: GRPOTrainer | RLOOTrainer,
    task: Task,
    arguments: RunArguments,
    config: GRPOConfig | RLOOConfig,
) -> dict[str, dict]:
    """What temperatures.py reads: by temperature, the right ones among each prompt's samples."""
    found = {}
    for at in run.temperatures:
        sampled = copy.copy(config)
        sampled.temperature = at
        if run.power is None:
            result = on_held_out(trainer, task, arguments, sampled)
        else:
            result = by_power(run.power, trainer, task, arguments, sampled)
        entropy = round(result.token_entropy, DIGITS)
        found[str(at)] = {"correct": per_prompt(result)["correct"], "token_entropy": entropy}
    return found


def affected(folder: Path) -> dict[str, float]:
    """Link -> share of the tokens that it changed, mean over the logged steps."""
    log = read_run("", folder).log
    names = dict.fromkeys(key for entry in log for key in entry if key.endswith("/affected"))  # in the chain's order
    shares = {name: [entry[name] for entry in log if name in entry] for name in names}
    return {name.removesuffix("/affected"): sum(values) / len(values) for name, values in shares.items()}


def attempt(run: Run) -> str | None:
    """Trains one run, its output in a file; gives the traceback where it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            (run.folder / OUTPUT_NAME).open("w") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            train(run)
    except Exception:  # one method's failure must not end the others' runs; it is told at the end and in the table
        error = traceback.format_exc()
        (run.folder / ERROR_NAME).write_text(error)
        return error
    return None


def train_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Trains them over `jobs` processes; gives those that failed."""
    return over_processes(attempt, runs, lambda run: run.folder, jobs)


def pending(candidates: Iterable[Candidate], seeds: Sequence[int], split: str) -> list[Run]:
    """The unfinished runs of the candidates, seed by seed, so that all have seed 1 before any has seed 2."""
    candidates = list(candidates)
    runs = {run.folder: run for seed in seeds for each in candidates for run in [each.run(seed, split)]}
    return [run for run in runs.values() if not is_finished(run)]


def train_board(board: Board, jobs: int, has_grids: bool) -> list[Run]:
    """What is shown of each entry, grids, and the best of each grid; gives the runs that failed."""
    entries = board.entries()
    shown = [each for entry in entries for each in entry.shown if board.is_wanted(each)]
    failed = train_all(pending(shown, board.seeds, "report"), jobs)
    if not has_grids:
        return failed
    gridded = [entry for entry in entries if entry.grid and board.is_wanted(entry.default)]
    failed += train_all(pending((point for each in gridded for point in each.grid), board.grid_seeds, "choose"), jobs)
    best = [point for each in gridded if (point := chosen(each, board)) is not None]
    return failed + train_all(pending(best, board.seeds, "report"), jobs)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=HERE / "leaderboard.yaml")
    parser.add_argument("--task", help="a key of `tasks` there; the first unless given")
    parser.add_argument("--setting", help="a key of `settings` there; the first unless given")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these entries, or points as on the page, alone")
    parser.add_argument(
        "--seeds", type=int, nargs="+", help="trained in place of the file's `seeds`; the page has both"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps, in place of the file's `max_steps`")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[], help="at which new runs are sampled, too, once trained"
    )
    parser.add_argument("--no-grid", action="store_true", help="the recipes' values alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="folder of the runs")
    parser.add_argument("--page", type=Path, default=Path("docs/leaderboard.md"), help="the page; its plots lie beside")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the page")
    parser.add_argument("--runs", type=Path, help="an archive of summaries, put into --out where it has none")
    parser.add_argument("--stamp", action="store_true", help="write the numbers into the recipes and docs/methods.md")
    options = parser.parse_args(arguments)
    try:
        written: Mapping = yaml.safe_load(options.config.read_text())
        given = {name: getattr(options, name) for name in ("out", "seeds", "steps", "temperatures")}
        if options.runs:
            unpack(options.runs, options.out)
        archive = options.page.with_name(f"{options.page.stem}_runs.tar.xz")
        refuse_to_lose_runs(archive, options.out)
        failed, trained = [], None
        if not options.table:
            board = Board.read(written, options.task, options.setting, only=options.only, **given)
            failed, trained = train_board(board, options.jobs, not options.no_grid), (board.task, board.setting)
            for run in failed:
                print(f"Failed: {run.folder / ERROR_NAME}", file=sys.stderr)
        boards = []
        for name in itertools.product(written["tasks"], written["settings"]):
            # what was trained now is shown beside the file's seeds; the other boards are what the file says of them
            own = given if options.table else {"out": options.out}
            if name == trained:
                own = {**given, "seeds": sorted({*written["seeds"], *(options.seeds or ())})}
            boards.append(Board.read(written, *name, **own))
        rows = leaderboard_page.write([board for board in boards if board.has_runs()], options.page)
        pack(archive, options.out)
        if options.stamp:
            leaderboard_stamp.write(rows, options.page.with_name("methods.md"))
    except (ValueError, OSError, tarfile.TarError, lzma.LZMAError) as error:
        print(f"leaderboard: {error}", file=sys.stderr)
        return 2
    print(f"Written: {options.page}")
    return 1 if failed else 0
