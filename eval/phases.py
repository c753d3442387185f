"""Where a step of the quickstart spends its time: generation, scoring, training. `eval/overhead.py --only phases`."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from hclm_rl.commands.loading import build_trainer
from hclm_rl.recipe.arguments import parse

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
CHAINS = {"plain": ["--entropy_terms", "[]"], "controlled": []}


class Steps(TrainerCallback):
    """The wall seconds of whole optimiser steps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def timed(function: Callable, name: str, seconds: dict[str, float]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return call


def phases_of(line: list[str], steps: int, out: Path) -> dict[str, float]:
    """Wall seconds a step: generation; scoring: rewards, log-probs and stage 1; training: the rest."""
    settings = parse("grpo", ["--config", str(RECIPE), "--output_dir", str(out), "--max_steps", str(steps), *line])
    trainer: Any = build_trainer("grpo", settings, [])[0]
    seconds: dict[str, float] = defaultdict(float)
    trainer.model.generate = timed(trainer.model.generate, "generation", seconds)
    whole = timed(trainer._generate_and_score_completions, "rollout", seconds)
    trainer._generate_and_score_completions = whole
    trainer.add_callback(every := Steps())
    trainer.train()
    return {
        "generation": seconds["generation"] / steps,
        "scoring": (seconds["rollout"] - seconds["generation"]) / steps,
        "training": (every.seconds - seconds["rollout"]) / steps,
    }


def shares_of_the_quickstart(steps: int, out: Path, console: Console) -> dict[str, dict[str, float]]:
    """Of both runs of `make quickstart`; prints a table."""
    table = Table(title=f"the quickstart's step, {steps} steps: wall seconds and share")
    table.add_column("run")
    found = {name: phases_of(line, steps, out / name) for name, line in CHAINS.items()}
    for phase in found["plain"]:
        table.add_column(phase, justify="right")
    for name, phases in found.items():
        whole = sum(phases.values())
        table.add_row(name, *(f"{each:.3f} ({each / whole:.2f})" for each in phases.values()))
    console.print(table)
    return found
