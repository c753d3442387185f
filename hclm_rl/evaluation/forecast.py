"""`hclm-rl forecast RUN`: the reward ceiling that the first part of a run points to. Law and guards: `law.py`"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..watch.report.runs import Run, read_run

if TYPE_CHECKING:
    from .law import Forecast

DOES_NOT_APPLY = 1  # exit code
TRLS = {"kl": "the KL to the start (beta)", "entropy_coef": "TRL's entropy bonus"}  # as TRL logs them


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Pairs of entropy and reward in the order of the steps."""

    steps: list[int]
    entropy: list[float]
    reward: list[float]
    last_step: int  # that the run was to have, or has


def curve_of(run: Run, entropy: str = "entropy", reward: str = "reward") -> Curve:
    """Each logged reward with the entropy logged nearest to it, of two equally near ones the earlier.

    Refuses a run that logged no such values.
    """
    entropy_steps, entropies = run.curve(entropy)
    reward_steps, rewards = run.curve(reward)
    for name, found in ((entropy, entropies), (reward, rewards)):
        if not found:
            logged = sorted({key for entry in run.log for key in entry} - {"step", "max_steps"})
            what = f"logged are {', '.join(logged)}" if logged else " ".join(run.problems)
            raise ValueError(f"{run.folder} has no values of '{name}': {what}")
    points = []
    for step, value in zip(reward_steps, rewards, strict=True):
        nearest = min(range(len(entropy_steps)), key=lambda i: abs(entropy_steps[i] - step))
        if math.isfinite(value) and math.isfinite(entropies[nearest]):
            points.append((step, entropies[nearest], value))
    steps, paired, kept = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [])
    planned = [entry["max_steps"] for entry in run.log if isinstance(entry.get("max_steps"), int)]
    return Curve(steps=steps, entropy=paired, reward=kept, last_step=max([run.last_step, *planned]))


def controls(run: Run) -> dict[str, int]:
    """What acts on the entropy, links with a strength and TRL's own, and the first logged step at which it does."""
    first: dict[str, int] = {}
    for entry in run.log:
        for key, value in entry.items():
            link, _, noun = key.rpartition("/")
            if key in TRLS and isinstance(value, int | float) and value != 0:
                first.setdefault(TRLS[key], entry["step"])
            if noun == "affected" and isinstance(value, int | float) and value > 0 and entry.get(f"{link}/coef", 0):
                first.setdefault(link, entry["step"])
    return first


def as_text(found: "Forecast", curve: Curve, run: Run, level: float) -> str:
    """What the command prints."""
    lines = [f"{found.fitted} points, steps {found.first_step:g} to {found.last_step:g} of {curve.last_step}"]
    if found.law:
        low, high = found.law.interval(level=level)
        lines += [
            f"R = {found.law.b:.3f} - {found.law.a:.3f} exp(H), RMSE {found.law.rmse:.3f}",
            f"ceiling (H = 0): {found.law.ceiling:.3f}, {level:.0%} interval [{low:.3f}, {high:.3f}]",
        ]
    if found.later and found.law:
        lines.append(
            f"{found.later} later points at their observed entropies: RMSE {found.later_rmse:.3f}, observed minus "
            f"predicted {found.later_bias:+.3f} on average and {found.final_error:+.3f} at step {curve.steps[-1]}"
        )
    if found.whole:
        low, high = found.whole.interval(level=level)
        lines.append(f"ceiling by all {found.whole.points} points: {found.whole.ceiling:.3f} [{low:.3f}, {high:.3f}]")
    for link, step in controls(run).items():
        lines.append(f"{link} acts from step {step}: the law is stated for runs without entropy control or KL.")
    if found.objection:
        lines.append(found.objection)
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where the law does not apply to the run."""
    parser = argparse.ArgumentParser(
        prog="hclm-rl forecast",
        description="The reward ceiling of a run by the entropy-performance law R = b - a exp(H), fitted to its first "
        "part. Exit code 1 if the law does not apply.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's output_dir; it may still be running")
    parser.add_argument("--share", type=float, default=0.15, help="of the planned steps, fitted; default 0.15; 1: all")
    parser.add_argument("--level", type=float, default=0.95, help="of the intervals; default 0.95")
    parser.add_argument("--entropy", default="entropy", metavar="NAME", help="the logged entropy, in nats")
    parser.add_argument("--reward", default="reward", metavar="NAME", help="the logged reward or validation score")
    options = parser.parse_args(arguments)
    if not 0 < options.share <= 1:
        raise ValueError(f"--share must be in (0, 1], got {options.share}")
    if not 0 < options.level < 1:
        raise ValueError(f"--level must be in (0, 1), got {options.level}")
    try:
        from .law import forecast
    except ImportError as error:
        raise ValueError(f"the forecast needs scipy ({error}): pip install 'hclm-rl[forecast]'") from error
    run = read_run(options.run.name, options.run)
    curve = curve_of(run, options.entropy, options.reward)
    found = forecast(
        curve.steps, curve.entropy, curve.reward, last_step=options.share * curve.last_step, level=options.level
    )
    print(as_text(found, curve, run, options.level))
    return DOES_NOT_APPLY if found.objection else 0
