"""How early and how falsely hclm_rl.watch.collapse.CollapseDetector warns: runs that collapse and runs that do not.

    python eval/early_warning.py --train --jobs 2 --out runs/early_warning
    python eval/early_warning.py --table --out runs/early_warning
    python eval/early_warning.py --logs runs --by-entry --out runs/early_warning   # of any runs: every log.jsonl below

Truth: a run collapses at the first optimiser step T at which its entropy, mean over the last 10 steps, is under 20 %
of its start, the mean over the first 5. An alarm is a step at which the detector begins to say `collapsing` (or, on
the other line of the table, `warning` or worse). Lead: (T - first alarm) / T, 0 where there was none up to T; the
lasting lead takes the last alarm up to T, after which the detector did not change its mind. False alarms: those in
runs that never collapse, for each 1,000 of their steps. What a run is called does not decide on which side it stands.

Thresholds are set on one half by a small grid and reported on the other; the shipped ones, on both. The halves
alternate through the collapsing runs and through the others, in the order of their names, so that a setting's seeds
lie in both; `--halves settings` alternates through settings, so that the second half is of settings unseen.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from many_runs import Job, read, run_all, train
from rich.console import Console
from rich.table import Table

from hclm_rl.watch.collapse import CollapseDetector, Verdict

COLLAPSED = 0.2  # share of the start
SMOOTH, START = 10, 5  # optimiser steps
LEAST_ENTRIES = 60  # of a log that is read from elsewhere
LEVELS = {"collapsing": ("collapsing", "collapsed"), "warning": ("warning", "collapsing", "collapsed")}
GRID = {
    "warning_below": (0.4, 0.5, 0.6),
    "patience": (0.4, 0.5, 0.6, 0.75, 1.0),
    "least_score": (2.5, 3.0, 3.5),
    "warm_up": (5, 10),
}
GAUGES = ["entropy_flow", "information_force"]
BONUS = {"entropy_bonus": {"coef": {"kind": "step_to_target", "target": 0.25, "delta": 0.01, "maximum": 0.3}}}

Log = Sequence[Mapping[str, float]]  # entries with `step` and `entropy`, ascending
Runs = Mapping[str, Log]
Level = Literal["collapsing", "warning"]


class Detector(Protocol):
    """What judges a log."""

    def judge(self, log: Log) -> list[tuple[int, Verdict]]: ...


Judge = TypeVar("Judge", bound=Detector)


def jobs(seeds: Sequence[int], steps: int) -> list[Job]:
    """Few prompts and large steps collapse; many prompts, small steps or a control do not."""

    def job(name: str, seed: int, prompts: int, rate: float = 4e-4, terms: Sequence = ()) -> Job:
        settings = {
            "task_kwargs": {"prompts": prompts},
            "learning_rate": rate,
            "per_device_train_batch_size": 64,
            "max_steps": steps,
            "entropy_terms": [*terms, *GAUGES],
        }
        return Job(name=name, seed=seed, settings=settings)

    plain = [(16, 4e-4), (24, 4e-4), (32, 4e-4), (48, 4e-4), (24, 6e-4), (40, 6e-4), (32, 8e-4), (48, 8e-4), (64, 8e-4)]
    plain += [(32, 1e-4), (128, 2e-4), (192, 3e-4), (256, 2e-4), (256, 4e-4)]
    controlled = {
        "force_reweight_0.5": (64, [{"force_reweight": {"floor": 0.5}}]),
        "force_reweight_0.35": (48, [{"force_reweight": {"floor": 0.35}}]),
        "entropy_bonus": (64, [BONUS]),
        "qae": (128, ["qae"]),
        "forking_tokens": (64, ["forking_tokens"]),
    }
    return [
        each
        for seed in seeds
        for each in (
            *(job(f"p{prompts}_lr{rate:g}", seed, prompts, rate) for prompts, rate in plain),
            *(job(f"p{prompts}_{name}", seed, prompts, terms=terms) for name, (prompts, terms) in controlled.items()),
        )
    ]


def make(job: Job, folder: Path) -> dict:
    _, _, log = train(job, folder)
    return {"job": {"name": job.name, "seed": job.seed, "settings": job.settings}, "h": log}


def collapse_step(log: Log) -> int | None:
    """T, the first optimiser step whose smoothed entropy is under a fifth of the start; None: never."""
    first = log[0]["step"]
    start = statistics.fmean(entry["entropy"] for entry in log if entry["step"] < first + START)
    for entry in log:
        now = entry["step"]
        if now < first + SMOOTH - 1:
            continue
        recent = [each["entropy"] for each in log if now - SMOOTH < each["step"] <= now]
        if statistics.fmean(recent) < COLLAPSED * start:
            return int(now)
    return None


def alarms(log: Log, detector: Detector, level: Level = "collapsing") -> list[int]:
    """The steps at which the detector begins to say it."""
    found, was_on = [], False
    for step, verdict in detector.judge(log):
        is_on = verdict.state in LEVELS[level]
        if is_on and not was_on:
            found.append(step)
        was_on = is_on
    return found


@dataclass(frozen=True, kw_only=True)
class Score:
    """A detector on a set of runs."""

    leads: tuple[float, ...]  # of the collapsing runs, 0 for a missed one
    lasting: tuple[float, ...]
    missed: int
    healthy: int  # runs that never collapse
    alarmed: tuple[str, ...]  # those of them with a false alarm
    false: int  # alarms in them
    steps: int  # of them

    @property
    def false_rate(self) -> float:
        """Per 1,000 optimiser steps."""
        return 1000 * self.false / self.steps if self.steps else 0.0

    @property
    def median_lead(self) -> float:
        return statistics.median(self.leads) if self.leads else float("nan")


def score(runs: Runs, truth: Mapping[str, int | None], detector: Detector, level: Level) -> Score:
    leads, lasting, alarmed, missed, false, steps = [], [], [], 0, 0, 0
    for name, log in runs.items():
        found, collapsed = alarms(log, detector, level), truth[name]
        if collapsed is None:
            steps += int(log[-1]["step"] - log[0]["step"]) + 1
            false += len(found)
            alarmed += [name] if found else []
            continue
        before = [step for step in found if step <= collapsed]
        missed += not before
        leads.append((collapsed - before[0]) / collapsed if before else 0.0)
        lasting.append((collapsed - before[-1]) / collapsed if before else 0.0)
    return Score(
        leads=tuple(leads),
        lasting=tuple(lasting),
        missed=missed,
        healthy=len(runs) - len(leads),
        alarmed=tuple(alarmed),
        false=false,
        steps=steps,
    )


def halves(truth: Mapping[str, int | None], by: Literal["runs", "settings"] = "runs") -> tuple[set[str], set[str]]:
    """Alternating through the names of the collapsing runs, then through those of the others.

    By settings: a setting is a name without `_<seed>`; one whose seeds disagree stands with the collapsing.
    """
    setting = {name: name.rpartition("_")[0] for name in truth} if by == "settings" else {name: name for name in truth}
    collapsing = {setting[name] for name, step in truth.items() if step is not None}
    rest = set(setting.values()) - collapsing
    first = {*sorted(collapsing)[::2], *sorted(rest)[::2]}
    one = {name for name in truth if setting[name] in first}
    return one, set(truth) - one


def grid(points: Mapping[str, Sequence[float]]) -> list[CollapseDetector]:
    found = [dict(zip(points, values, strict=True)) for values in itertools.product(*points.values())]
    collapsed = CollapseDetector().collapsed
    return [CollapseDetector(**each) for each in found if each.get("warning_below", 1) > collapsed]  # type: ignore[arg-type]


def choose(runs: Runs, truth: Mapping[str, int | None], detectors: Iterable[Judge], most_false: float) -> Judge:
    """Of those with no more than `most_false` alarms per 1,000 healthy steps: fewest missed, then the longest lead.

    Where none keeps to that, the one with the fewest false alarms. Of equals the first.
    """
    scored = [(each, score(runs, truth, each, "collapsing")) for each in detectors]
    kept = [(each, of) for each, of in scored if of.false_rate <= most_false]
    if kept:
        return max(kept, key=lambda pair: (-pair[1].missed, pair[1].median_lead, -pair[1].false_rate))[0]
    return min(scored, key=lambda pair: pair[1].false_rate)[0]


def different(detector: CollapseDetector) -> str:
    """Its fields that differ from the shipped ones."""
    shipped = CollapseDetector()
    names = [each.name for each in fields(detector) if getattr(detector, each.name) != getattr(shipped, each.name)]
    return ", ".join(f"{name} {getattr(detector, name):g}" for name in names) or "as shipped"


def row(label: str, where: str, of: Score) -> list[str]:
    def told(values: Sequence[float]) -> str:
        return f"{100 * statistics.median(values):.0f} % ({100 * min(values):.0f} %)" if values else "no such run"

    missed, alarmed = f"{of.missed} of {len(of.leads)}", f"{len(of.alarmed)} of {of.healthy}"
    return [label, where, told(of.leads), told(of.lasting), missed, alarmed, f"{of.false_rate:.2f}"]


def tabulate(runs: Runs, by: Literal["runs", "settings"], most_false: float) -> tuple[Table, list[str]]:
    """The table, and what to know beside it."""
    truth = {name: collapse_step(log) for name, log in runs.items()}
    first, second = ({name: runs[name] for name in sorted(names)} for names in halves(truth, by))
    shipped = CollapseDetector()
    chosen = choose(first, truth, grid(GRID), most_false)
    collapsing = sorted(step for step in truth.values() if step is not None)
    table = Table(title=f"{len(collapsing)} collapsing runs, {len(runs) - len(collapsing)} others; halves by {by}")
    columns = ("thresholds", "runs", "lead", "lasting lead", "missed", "healthy runs alarmed", "false per 1,000 steps")
    for column in columns:
        table.add_column(column)
    lines: list[tuple[str, CollapseDetector, Level]] = [
        ("set on the first half: collapsing", chosen, "collapsing"),
        ("shipped: collapsing", shipped, "collapsing"),
        ("set on the first half: warning", chosen, "warning"),
        ("shipped: warning", shipped, "warning"),
    ]
    for label, detector, level in lines:
        for where, half in (("first half", first), ("second half", second)):
            of = score(half, truth, detector, level)
            table.add_row(*row(label, where, of))
    false = sorted(
        {*score(runs, truth, shipped, "collapsing").alarmed, *score(runs, truth, chosen, "collapsing").alarmed}
    )
    notes = [
        "lead: share of the time to collapse, median (least)",
        f"set on the first half, at most {most_false:g} false alarms per 1,000 steps: {different(chosen)}",
        f"collapse at steps {', '.join(map(str, collapsing)) or 'none'}",
        *(f"false alarm in {name}, whose entropy came down to {100 * lowest(runs[name]):.0f} %" for name in false),
    ]
    return table, notes


def lowest(log: Log) -> float:
    """Least smoothed entropy as a share of the start: how near to collapse a run came."""
    start = statistics.fmean(entry["entropy"] for entry in log if entry["step"] < log[0]["step"] + START)
    means = [
        statistics.fmean(each["entropy"] for each in log if entry["step"] - SMOOTH < each["step"] <= entry["step"])
        for entry in log
        if entry["step"] >= log[0]["step"] + SMOOTH - 1
    ]
    return min(means) / start if means else float("nan")


def logs_below(folder: Path) -> dict[str, Log]:
    """The log of every run below; those of fewer than 60 entries say nothing of a detector."""
    found = {}
    for file in sorted(folder.rglob("log.jsonl")):
        log = [entry for line in file.read_text().splitlines() if "entropy" in (entry := json.loads(line))]
        if len(log) >= LEAST_ENTRIES:
            found[str(file.parent.relative_to(folder))] = log
    return found


def numbered(log: Log) -> list[dict]:
    """The entries counted from 1, whatever steps they are of."""
    return [{**entry, "step": i} for i, entry in enumerate(log, 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="make the runs that are not there yet")
    parser.add_argument("--table", action="store_true", help="judge the runs that are there")
    parser.add_argument("--logs", type=Path, help="judge the log.jsonl of any runs below this folder")
    parser.add_argument("--out", type=Path, default=Path("runs/early_warning"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of a run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these settings alone")
    parser.add_argument("--halves", choices=("runs", "settings"), default="runs")
    parser.add_argument("--most-false", type=float, default=0.5, help="alarms per 1,000 healthy steps, for the grid")
    parser.add_argument("--by-entry", action="store_true", help="take log entries for steps, whatever steps they name")
    options = parser.parse_args()
    if options.train:
        wanted = [job for job in jobs(options.seeds, options.steps) if job.name in (options.only or [job.name])]
        for failed in run_all(make, wanted, options.out, options.jobs):
            print(f"Failed: {failed.file(options.out)}")
    if options.table or options.logs:
        own = {name: found["h"] for name, found in read([options.out]).items() if found["h"]}
        runs = own if options.logs is None else logs_below(options.logs)
        if options.by_entry:
            runs = {name: numbered(log) for name, log in runs.items()}
        table, notes = tabulate(runs, options.halves, options.most_false)
        console = Console(width=170)
        console.print(table)
        console.print("\n".join(notes), highlight=False)


if __name__ == "__main__":
    main()
