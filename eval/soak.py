"""Whether memory grows: long runs of stock TRL and of ours with every gauge, each in a process of its own.

The resident memory is read every 25 steps, after a collection of garbage and after the allocator gave back what it
holds. The growth is the slope of Theil and Sen (scipy) over the last two thirds of the run, in MiB per 1,000 optimiser
steps. Growth that is due is not subtracted: transformers keeps every logged entry in memory, and more metrics make
larger entries. What a run keeps for the log alone is shown beside it: the pickled size of `state.log_history`. So that
this growth can be told from any other, stock TRL runs a second time with a callback that logs numbers of its own, as
many an entry as the gauges add.
"""

import argparse
import ctypes
import gc
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import TrainerCallback

import hclm_rl
from hclm_rl.testbed.policy import policy_path
from hclm_rl.testbed.task import find_task

GAUGES = [
    "log_det",
    "von_neumann",
    "coding_rate",
    "variance",
    "spectrum",
    "information_force",
    "feature_softmax",
    "entropy_flow",
]
STOCK, EMPTY, GAUGED, LOGS_AS_MANY = "stock TRL", "empty chain", "all gauges", "stock TRL, as many numbers"
ROWS: dict[str, list | None] = {
    STOCK: None,
    EMPTY: [],
    GAUGED: [{name: {"coef": 0.0}} for name in GAUGES],
    LOGS_AS_MANY: None,
}
GOAL = 1.5  # times stock TRL's growth
EVERY = 25  # steps between two readings


class ReadsMemory(TrainerCallback):
    """Resident memory in MiB, every `EVERY` steps."""

    def __init__(self) -> None:
        self.read: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.read.append((state.global_step, pages * 4096 / 2**20))


class LogsMore(TrainerCallback):
    """As many numbers more in each entry of the log, under the same names in all."""

    def __init__(self, more: int) -> None:
        self.names = [f"more/number_{number}" for number in range(more)]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history[-1].update({name: random.random() for name in self.names})


def soak(name: str, steps: int, out: Path, more: int) -> dict[str, Any]:
    """One run in this process: what was read, and of its log the size and the numbers in an entry."""
    terms = ROWS[name]
    ours = {} if terms is None else {"entropy_terms": terms, "watch_collapse": "warn", "trace_every": 100}
    task = find_task("coins", prompts=64, eval_prompts=2)
    memory = ReadsMemory()
    trainer = (trl.GRPOTrainer if terms is None else hclm_rl.GRPOTrainer)(
        model=policy_path(),
        reward_funcs=task.reward_funcs,  # pyright: ignore[reportArgumentType] (sequences serve as lists)
        args=(trl.GRPOConfig if terms is None else hclm_rl.GRPOConfig)(
            output_dir=str(out),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=task.max_completion_length,
            max_steps=steps,
            learning_rate=1e-5,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            disable_tqdm=True,
            **ours,
        ),
        train_dataset=task.train_dataset,
        callbacks=[memory, LogsMore(more)],
    )
    trainer.train()
    log = trainer.state.log_history
    return {"read": memory.read, "log_bytes": len(pickle.dumps(log)), "numbers": max(map(len, log))}


def growth(read: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """MiB per 1,000 steps and its 95 % interval."""
    later = [each for each in read if each[0] > read[-1][0] / 3]
    steps, memory = zip(*later, strict=True)
    found: Any = stats.theilslopes(memory, [step / 1000 for step in steps])
    return float(found.slope), float(found.low_slope), float(found.high_slope)


def in_a_process(name: str, steps: int, out: Path, more: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--of", name, "--steps", str(steps), "--out", str(out)]
    command += ["--more", str(more)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(f"{name} ended with {made.returncode}:\n{made.stderr[-2000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of each run")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--of", choices=list(ROWS), help=argparse.SUPPRESS)
    parser.add_argument("--more", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 8 * EVERY:
        sys.exit(f"--steps {args.steps}: memory is read every {EVERY} steps, take at least {8 * EVERY}")
    if args.of:
        print(json.dumps(soak(args.of, args.steps, args.out / args.of.replace(" ", "_"), args.more)))
        return
    table = Table(title=f"resident memory over {args.steps} optimiser steps")
    for column in ("run", "MiB per 1,000 steps", "95 % interval", "MiB at the end", "log, KiB", "numbers an entry"):
        table.add_column(column, justify="left" if column == "run" else "right")
    slopes, numbers = {}, {}
    for name in ROWS:
        more = numbers[GAUGED] - numbers[STOCK] if name == LOGS_AS_MANY else 0
        made = in_a_process(name, args.steps, args.out, more)
        slopes[name], low, high = growth(made["read"])
        numbers[name] = made["numbers"]
        end, log = made["read"][-1][1], made["log_bytes"] / 1024
        table.add_row(
            name, f"{slopes[name]:.2f}", f"{low:.2f} to {high:.2f}", f"{end:.0f}", f"{log:.0f}", f"{numbers[name]}"
        )
    Console().print(table)
    for other in (STOCK, LOGS_AS_MANY):
        print(f"{GAUGED} grow {slopes[GAUGED] / slopes[other]:.2f} times as fast as {other}; the goal is {GOAL}")


if __name__ == "__main__":
    main()
