"""Plain GRPO and GRPO with entropy control side by side, one a core, same seed; then a table and a page.

python recipes/quickstart.py
python recipes/quickstart.py --seeds 1 2 3
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hclm_rl.watch.report import read_run, write_report
from hclm_rl.watch.report.runs import LOG_NAME, RECIPE_NAME, SUMMARY_NAME, read_log
from hclm_rl.watch.report.table import compare

HERE = Path(__file__).parent
RUNS = {"plain": ["--entropy_terms", "[]"], "controlled": []}
STDERR_NAME, STDOUT_NAME = "stderr.txt", "stdout.txt"
POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 20  # where there is no terminal
LAST_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Started:
    """A training process and its run folder."""

    name: str
    folder: Path
    process: subprocess.Popen

    def state(self) -> tuple[int, int | None, str]:
        """Step, number of steps (None before the first is logged), and what is going on."""
        log, _ = read_log(self.folder / LOG_NAME)
        if not log:
            is_training, is_measuring = (self.folder / LOG_NAME).exists(), (self.folder / RECIPE_NAME).exists()
            return 0, None, "training" if is_training else "measuring before" if is_measuring else "starting"
        last = next((entry for entry in reversed(log) if "entropy" in entry), log[-1])
        text = f"entropy {last.get('entropy', float('nan')):.3f}  reward {last.get('reward', float('nan')):.3f}"
        if "train_runtime" in log[-1]:
            text = "done" if self.process.poll() == 0 else "measuring after"
        return log[-1]["step"], log[-1]["max_steps"], text


def start(name: str, folder: Path, seed: int, overrides: Sequence[str]) -> Started:
    folder.mkdir(parents=True, exist_ok=True)
    for old in (LOG_NAME, SUMMARY_NAME, RECIPE_NAME):
        (folder / old).unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    command += ["--config_file", str(HERE / "accelerate" / "single_cpu.yaml"), str(HERE / "grpo.py")]
    command += ["--config", str(HERE / "quickstart.yaml"), "--seed", str(seed), "--output_dir", str(folder)]
    command += [*RUNS[name], *overrides]
    # the policy is too small to gain from a second thread, and the other run needs the core
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with (folder / STDOUT_NAME).open("w") as out, (folder / STDERR_NAME).open("w") as err:
        # a session of its own, so that stopping it reaches the training process below accelerate's launcher too
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
    return Started(name=name, folder=folder, process=process)


def stop(runs: Sequence[Started]) -> None:
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGTERM)
    for run in runs:
        run.process.wait()


def failed(runs: Sequence[Started]) -> Started | None:
    return next((run for run in runs if run.process.poll() not in (None, 0)), None)


def watch(runs: Sequence[Started], console: Console) -> None:
    """Shows all runs until they end, or until one fails: as bars, or as lines where there is no terminal."""
    bars = Progress(
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.fields[steps]} steps"),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bars:
        rows = {run.name: bars.add_task(run.name, total=None, steps="?", text="starting") for run in runs}
        next_line = time.monotonic()
        is_running = True
        while is_running and not failed(runs):
            time.sleep(POLL_SECONDS)
            is_running = any(run.process.poll() is None for run in runs)
            states = {run.name: run.state() for run in runs}
            for name, (step, steps, text) in states.items():
                bars.update(rows[name], completed=step, total=steps, steps=steps or "?", text=text)
            if not console.is_terminal and (time.monotonic() >= next_line or not is_running):
                next_line = time.monotonic() + SECONDS_BETWEEN_LINES
                for name, (step, steps, text) in states.items():
                    print(f"{name:<10}  step {step:>4}/{steps or '?'}  {text}", flush=True)


def show(names: dict[str, Path], console: Console) -> None:
    table = compare([read_run(name, folder) for name, folder in names.items()])
    if table is None:
        return
    shown = Table(caption=table.caption, caption_justify="left")
    shown.add_column("")
    for column in table.columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for label, values in table.rows:
        shown.add_row(label, *values)
    console.print(shown)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", help="several seeds, one pair of runs after the other")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the runs and the page")
    options, overrides = parser.parse_known_args(arguments)  # what is left over goes to both runs
    seeds = options.seeds or [options.seed]
    console = Console()
    folders: dict[str, Path] = {}
    began = time.monotonic()
    for seed in seeds:
        console.print(f"Plain GRPO and GRPO with entropy control, seed {seed}, into {options.out}.", highlight=False)
        below = options.out / f"seed-{seed}" if len(seeds) > 1 else options.out
        runs: list[Started] = []
        try:
            runs += [start(name, below / name, seed, overrides) for name in RUNS]
            watch(runs, console)
        finally:
            broken = failed(runs)
            stop(runs)
        if broken:
            lines = (broken.folder / STDERR_NAME).read_text(errors="replace").splitlines()
            print(f"The {broken.name} run failed; the end of {broken.folder / STDERR_NAME}:", file=sys.stderr)
            print("\n".join(lines[-LAST_LINES:]), file=sys.stderr)
            return 1
        for run in runs:
            folders[f"{run.name}, seed {seed}" if len(seeds) > 1 else run.name] = run.folder
    show(folders, console)
    try:
        page = write_report(folders, options.out / "report.html")
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    console.print(f"Curves: {page}", highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - began:.0f} seconds.", highlight=False)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` stops the runs
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
