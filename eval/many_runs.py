"""Many short training runs over a few processes, one JSON file a run: what the measurements of this folder share.

A run is finished when its file is there, and is never repeated: start the same command again after an interruption.
One process trains many runs, one thread each, so that the imports are paid for once.
"""

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
TESTBED: dict[str, Any] = {  # recipes/quickstart.yaml without its term; float32 on one CPU core
    "task": "coins",
    "task_kwargs": {"prompts": 256},
    "model_name_or_path": "testbed",
    "max_steps": 400,
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 2,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "adam_beta2": 0.95,
    "bf16": False,
    "gradient_checkpointing": False,
}
QUIET: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "save_final": False,
    "disable_tqdm": True,
    "eval_samples": 0,
}
POLL_SECONDS = 5
MADE_WITH = "made with"  # in a run's file: its settings


def as_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` as a script that starts workers; nothing may have imported torch before."""
    os.environ |= THREADS  # the workers inherit them, and read them when they import torch
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are stopped
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to make, all of it plain data: what it is called decides its file."""

    name: str
    seed: int
    settings: dict[str, Any]  # keys of a recipe, over TESTBED; for runs of another kind what their function reads

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}_{self.seed}.json"


Make = Callable[[Job, Path], dict]  # of a job and a folder to write in: what goes into its file
Attempt = Callable[[Any], str | None]  # of a run: makes it, and gives the traceback where it failed


def flags(settings: Mapping[str, object]) -> list[str]:
    """As on the command line; mappings and lists as JSON."""
    line: list[str] = []
    for key, value in settings.items():
        is_plain = isinstance(value, str | Path)
        line += [f"--{key}", str(value) if is_plain else json.dumps(value)]
    return line


def recipe(job: Job) -> list[str]:
    """The command line of a run on the testbed that logs every step."""
    return flags(TESTBED | {"logging_steps": 1} | job.settings | {"seed": job.seed})


def train(job: Job, folder: Path) -> tuple[Any, Any, list[dict]]:
    """(trainer, task, log of all steps) of a run on the testbed."""
    from transformers import PrinterCallback

    from hclm_rl.commands import launch
    from hclm_rl.recipe.arguments import parse

    settings = parse("grpo", [*recipe(job), *flags(QUIET | {"output_dir": folder / ".trainer"})])
    trainer, task = launch.build_trainer("grpo", settings, launch.resets_of(*settings[:2]))
    trainer.remove_callback(PrinterCallback)
    launch.train(trainer, settings[0])
    return trainer, task, [entry for entry in trainer.state.log_history if "entropy" in entry]


def plain(settings: Mapping[str, object]) -> dict:
    """As a file gives them back."""
    return json.loads(json.dumps(settings, default=str))


def write(file: Path, found: Mapping[str, object]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half_written = file.with_name(f".{file.name}")
    half_written.write_text(json.dumps(found, default=float) + "\n")
    half_written.replace(file)


def attempt(make: Make, folder: Path, job: Job) -> str | None:
    """Makes one run and writes its file; gives the traceback where it failed, which its .out file then holds."""
    output = job.file(folder).with_suffix(".out")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            start = time.perf_counter()
            found = make(job, folder)
            found |= {"seconds": time.perf_counter() - start, MADE_WITH: plain(job.settings)}
        write(job.file(folder), found)
        output.unlink()
    except Exception:  # one run's failure must not end the others; it is told at the end
        error = traceback.format_exc()
        output.write_text(error)
        return error
    return None


def work(attempt: Attempt, todo: Any, done: Any, parent: int) -> None:
    """A worker: takes runs until there are none."""
    import torch

    torch.set_num_threads(1)
    while (run := todo.get()) is not None and os.getppid() == parent:
        error = attempt(run)
        gc.collect()
        done.put((run, error))


def over_processes(attempt: Attempt, runs: Sequence[Any], where: Callable[[Any], Path], processes: int) -> list[Any]:
    """Attempts all runs; gives those that failed. `where` says in what is printed where a run lies."""
    if processes < 1:
        raise SystemExit(f"--jobs must be at least 1, got {processes}")
    failed: list[Any] = []
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    workers = [
        context.Process(target=work, args=(attempt, todo, done, os.getpid()), daemon=True)
        for _ in range(min(processes, len(runs)))
    ]
    for each in [*runs, *(None for _ in workers)]:
        todo.put(each)
    for worker in workers:
        worker.start()
    start, ended = time.perf_counter(), 0
    while ended < len(runs):
        try:
            run, error = done.get(timeout=POLL_SECONDS)
        except queue.Empty:
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise SystemExit("A worker died (memory?). Start the same command again: finished runs stay.") from None
            continue
        ended += 1
        if error:
            failed.append(run)
        minutes = (time.perf_counter() - start) / ended * (len(runs) - ended) / 60
        state = f"FAILED: {error.strip().splitlines()[-1]}" if error else "done"
        print(f"[{ended}/{len(runs)}] {where(run)}: {state}; about {minutes:.0f} minutes left", flush=True)
    for worker in workers:
        worker.join()
    return failed


def run_all(make: Make, jobs: Iterable[Job], folder: Path, processes: int) -> list[Job]:
    """Makes the runs that are not there yet; gives those that failed, whose file ends in .out.

    A run that was made with other settings is not taken for one of these: it stops all.
    """
    os.environ |= THREADS
    left = []
    for job in jobs:
        file = job.file(folder)
        if not file.is_file():
            left.append(job)
            continue
        made_with = json.loads(file.read_text()).get(MADE_WITH)
        if made_with is not None and made_with != plain(job.settings):
            raise SystemExit(f"{file} was made with other settings: remove it, or name another folder")
    return over_processes(functools.partial(attempt, make, folder), left, lambda job: job.file(folder), processes)


def read(folders: Sequence[Path]) -> dict[str, dict]:
    """Name of a run's file -> what is in it, by name."""
    files = [file for folder in folders for file in sorted(folder.glob("*.json")) if not file.name.startswith(".")]
    return {file.stem: json.loads(file.read_text()) for file in files}
