"""How well force_reweight holds the entropy where it is told to, and what that does to accuracy and diversity.

    python eval/control.py --train --jobs 2 --out runs/control
    python eval/control.py --table --out runs/control
    python eval/control.py --train --table --task coins_noisy --out runs/control_noisy     # a folder a task

Plain GRPO and force_reweight at each floor (a share of the entropy at the start), the same seeds, settings of
recipes/quickstart.yaml, 384 held-out prompts. Over the second half of the run: the mean absolute error of the training
entropy against the target, of single optimiser steps and of means over 10, as a share of the target, and the mean
signed error. The target is the floor times the mean entropy of the first rollout's steps. Held out: pass@k, distinct
right answers, and the differences from plain on the same prompts and seeds. The predicted change of entropy against the
realised one, by rollout and summed over 20 optimiser steps: R2 of the fitted line, its slope, R2 of the prediction as
it is. Plain GRPO carries the gauge entropy_flow, which changes nothing and predicts by the same rule.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from leaderboard.statistics import paired_difference
from many_runs import TESTBED, Job, read, run_all, train
from rich.console import Console
from rich.table import Table

PLAIN = "plain"
TASKS = ("coins", "coins_noisy", "products")
PROMPTS, SAMPLES = 384, 64
MEANS_OVER, WINDOW = 10, 20  # optimiser steps
MEASURED = ("token_entropy", "pass@1", "pass@8", "pass@32", "distinct_correct")
DIGITS = 6


def jobs(
    floors: Sequence[float], seeds: Sequence[int], steps: int, prompts: int, samples: int, task: str = TESTBED["task"]
) -> list[Job]:
    own = {
        "task": task,
        "max_steps": steps,
        "task_kwargs": {**TESTBED["task_kwargs"], "eval_prompts": prompts, "eval_split": "test"},
        "eval_samples": samples,
    }
    chains = {PLAIN: ["entropy_flow"]} | {f"floor{floor:g}": [{"force_reweight": {"floor": floor}}] for floor in floors}
    return [
        Job(name=name, seed=seed, settings={**own, "entropy_terms": chain})
        for seed in seeds
        for name, chain in chains.items()
    ]


def make(job: Job, folder: Path) -> dict:
    from hclm_rl.testbed import evaluate

    trainer, task, log = train(job, folder)
    found = evaluate(
        trainer.model,
        trainer.processing_class,
        task.eval_dataset,
        task,
        samples=job.settings["eval_samples"],
        temperature=trainer.args.temperature,
        seed=job.seed,
    )
    [entry] = job.settings["entropy_terms"]
    link, floor = (entry, None) if isinstance(entry, str) else (next(iter(entry)), next(iter(entry.values()))["floor"])
    kept = ("step", "entropy", "reward", f"{link}/predicted_change", f"{link}/realised_change")
    return {
        "name": job.name,
        "seed": job.seed,
        "floor": floor,
        "log": [{key.rpartition("/")[2]: entry[key] for key in kept if key in entry} for entry in log],
        "means": found.means(),
        "per_prompt": {k: [round(v, DIGITS) for v in values] for k, values in found.per_prompt.items()},
    }


Log = Sequence[Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Errors of the training entropy over the second half, as shares of the target."""

    target: float  # nats
    by_step: float  # mean absolute
    by_mean: float  # of means over 10 optimiser steps
    bias: float  # signed: above 0 the entropy lay over the target


def first_rollout(log: Log) -> float:
    """Mean entropy of the steps before the second rollout, which are those before the second logged reward."""
    rollouts = [entry["step"] for entry in log if "reward" in entry]
    end = rollouts[1] if len(rollouts) > 1 else math.inf
    return statistics.fmean(entry["entropy"] for entry in log if entry["step"] < end)


def held(log: Log, floor: float) -> Held:
    target = floor * first_rollout(log)
    half = [entry for entry in log if entry["step"] > log[-1]["step"] / 2]
    blocks: dict[int, list[float]] = {}
    for entry in half:
        blocks.setdefault(int(entry["step"] - half[0]["step"]) // MEANS_OVER, []).append(entry["entropy"])
    errors = [entry["entropy"] - target for entry in half]
    means = [statistics.fmean(block) - target for block in blocks.values() if len(block) == len(blocks[0])]
    return Held(
        target=target,
        by_step=statistics.fmean(map(abs, errors)) / target,
        by_mean=statistics.fmean(map(abs, means)) / target,
        bias=statistics.fmean(errors) / target,
    )


def changes(log: Log) -> list[tuple[int, float, float]]:
    """(optimiser step, predicted, realised) in nats between the rollouts of one entry and the one before."""
    found, before = [], log[0]["step"]
    for entry in log:
        if "reward" not in entry:
            continue
        if "predicted_change" in entry and entry["step"] > before:
            steps = entry["step"] - before  # the logged changes are per optimiser step
            found.append((int(entry["step"]), steps * entry["predicted_change"], steps * entry["realised_change"]))
        before = entry["step"]
    return found


def in_windows(of: Sequence[tuple[int, float, float]], window: int = WINDOW) -> list[tuple[int, float, float]]:
    """Summed over windows of so many optimiser steps, full ones alone: those as long as the first."""
    windows: dict[int, list[tuple[int, float, float]]] = {}
    for each in of:
        windows.setdefault((each[0] - of[0][0]) // window, []).append(each)
    return [
        (rows[0][0], sum(row[1] for row in rows), sum(row[2] for row in rows))
        for rows in windows.values()
        if len(rows) == len(windows[0])
    ]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Of a prediction: fitted line, and as it is."""

    r2: float
    slope: float  # realised per predicted
    as_it_is: float  # 1 - sum of squared misses over that around the mean


def fit(of: Sequence[tuple[int, float, float]]) -> Fit:
    predicted, realised = [row[1] for row in of], [row[2] for row in of]
    if len(of) < 3 or len(set(predicted)) == 1 or len(set(realised)) == 1:
        return Fit(r2=math.nan, slope=math.nan, as_it_is=math.nan)
    slope, mean = statistics.linear_regression(predicted, realised).slope, statistics.fmean(realised)
    missed = sum((y - x) ** 2 for x, y in zip(predicted, realised, strict=True))
    return Fit(
        r2=statistics.correlation(predicted, realised) ** 2,
        slope=slope,
        as_it_is=1 - missed / sum((y - mean) ** 2 for y in realised),
    )


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def control_table(of: Mapping[str, Sequence[Mapping]]) -> Table:
    table = Table(title="training entropy over the second half, mean ± standard deviation over seeds")
    columns = ("run", "seeds", "target, nats", "error of steps", "error of means of 10", "signed error", "reward")
    for column in columns:
        table.add_column(column)
    for name, runs in of.items():
        reward = spread([second_half(run["log"], "reward") for run in runs])
        if runs[0]["floor"] is None:
            told = spread([second_half(run["log"], "entropy") for run in runs])
            table.add_row(name, str(len(runs)), f"none; entropy {told}", "-", "-", "-", reward)
            continue
        errors = [held(run["log"], run["floor"]) for run in runs]
        cells = [spread([each.target for each in errors])]
        cells += [spread([getattr(each, what) for each in errors]) for what in ("by_step", "by_mean", "bias")]
        table.add_row(name, str(len(runs)), *cells, reward)
    return table


def second_half(log: Log, noun: str) -> float:
    return statistics.fmean(each[noun] for each in log if each["step"] > log[-1]["step"] / 2 and noun in each)


def held_out_table(of: Mapping[str, Sequence[Mapping]]) -> Table:
    table = Table(title="held out: mean ± deviation over seeds; below, the difference from plain, 95 % interval, p")
    table.add_column("run")
    for noun in MEASURED:
        table.add_column(noun)
    plain = {run["seed"]: run for run in of.get(PLAIN, ())}
    for name, runs in of.items():
        known = {noun for noun in MEASURED if all(noun in run["means"] for run in runs)}  # few samples: no pass@32
        means = (spread([run["means"][noun] for run in runs]) if noun in known else "-" for noun in MEASURED)
        table.add_row(name, *means)
        both = [run for run in runs if run["seed"] in plain]
        if name == PLAIN or not both:
            continue
        cells = []
        for noun in MEASURED:
            if noun not in known:
                cells.append("-")
                continue
            ours, its = (
                np.array([run["per_prompt"][noun] for run in those])
                for those in (both, [plain[run["seed"]] for run in both])
            )
            found = paired_difference(ours, its)
            is_tested = not math.isnan(found.p)
            told = f" ({found.low:+.3f} to {found.high:+.3f}), p {found.p:.2g}" if is_tested else ", too few seeds"
            cells.append(f"{found.mean:+.3f}{told}")
        table.add_row(f"  - {PLAIN}, {len(both)} seeds", *cells)
    return table


def prediction_table(of: Mapping[str, Sequence[Mapping]]) -> Table:
    table = Table(title="predicted against realised change of entropy, mean ± deviation over seeds")
    for column in ("run", "over", "changes", "R2", "slope", "R2 as it is"):
        table.add_column(column)
    for name, runs in of.items():
        all_changes = [changes(run["log"]) for run in runs]
        for over, those in (
            ("each rollout", all_changes),
            (f"{WINDOW} steps", [in_windows(each) if each else [] for each in all_changes]),
        ):
            fits = [found for each in those if not math.isnan((found := fit(each)).r2)]
            if fits:
                values = ([each.r2 for each in fits], [each.slope for each in fits], [each.as_it_is for each in fits])
                table.add_row(name, over, str(sum(map(len, those))), *map(spread, values))
    return table


def by_name(found: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Plain first, then by floor; seeds ascending."""
    order = sorted(found, key=lambda run: (-1.0 if run["floor"] is None else run["floor"], run["seed"]))
    return {name: [run for run in order if run["name"] == name] for name in dict.fromkeys(run["name"] for run in order)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="make the runs that are not there yet")
    parser.add_argument("--table", action="store_true", help="judge the runs that are there")
    parser.add_argument("--out", type=Path, default=Path("runs/control"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--task", choices=TASKS, default=TESTBED["task"], help="and with it the start")
    parser.add_argument("--floors", type=float, nargs="+", default=[0.4, 0.5, 0.7], help="shares of the start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of a run")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="responses for each")
    options = parser.parse_args()
    if options.train:
        wanted = jobs(options.floors, options.seeds, options.steps, options.prompts, options.samples, options.task)
        for failed in run_all(make, wanted, options.out, options.jobs):
            print(f"Failed: {failed.file(options.out).with_suffix('.out')}")
    if options.table:
        of = by_name(list(read([options.out]).values()))
        console = Console(width=190)
        for table in (control_table(of), held_out_table(of), prediction_table(of)):
            console.print(table)


if __name__ == "__main__":
    main()
