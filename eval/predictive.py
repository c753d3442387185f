"""Whether the regime that `hclm-rl doctor` predicts before training is the one that the run then is in.

    python eval/predictive.py --train --jobs 2 --out runs/predictive
    python eval/predictive.py --table --out runs/predictive

Runs of 60 steps on the testbed, one optimiser step a rollout: each surrogate's term with coefficients over five decades
around the weak threshold, for the log-det also with floors that freeze its force; learning rates and seeds. The doctor
examines the same settings once per surrogate, floor and seed, since forces do not depend on the coefficient.

Truth by trajectory, from a gauge of the same surrogate logged each step: weak if the median of coef ||F|| / ||g|| is
under 1e-2, frozen if the median share of live directions is under 0.05, misaligned if the median alignment is under
-0.9, unstable if ||F||'s deviation over its mean, of the last 50 steps, is above 1. Truth by effect: the surrogate's
value, mean over the last 10 steps, differs from that of the run without the term (same seed and learning rate) by more
than 3 standard deviations of such runs between seeds. The term coding_rate acts on token states here, as the gauge.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from many_runs import Job, read, recipe, run_all, train
from rich.console import Console
from rich.table import Table
from scipy import stats

from hclm_rl.commands.diagnosis import unsteadiness
from hclm_rl.commands.doctor import examine
from hclm_rl.equations.forces import LEAST_LIVE, LEAST_RATIO, MOST_UNSTEADY, WORST_ALIGNMENT, regime

TERMS = ("log_det", "variance", "feature_softmax", "coding_rate", "von_neumann")
EPS = {name: (1e-4, 1.0, 1e3) if name == "log_det" else (1e-4,) for name in TERMS}  # eps_relative
FACTORS = tuple(10**power for power in (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5))  # of the coefficient that is just weak
NEAR = 10**0.5  # factors up to here are near the threshold
RATES = (2e-4, 4e-4)
LAST, END = 50, 10  # steps for steadiness, for the value at the end
CLEAR = 3.0  # deviations between seeds
REGIMES = ("weak", "frozen", "misaligned", "unstable")
SETTINGS = {"per_device_train_batch_size": 64, "steps_per_generation": 1}


def gauge(name: str, surrogate: str, eps: float, spectrum_every: int = 1) -> dict:
    of = {"name": name, "surrogate": surrogate, "eps_relative": eps, "spectrum_every": spectrum_every}
    return {"information_force": of}


def term(surrogate: str, eps: float, coef: float) -> dict:
    own = {"log_det": {"eps_relative": eps}, "coding_rate": {"rows": "tokens"}}.get(surrogate, {})
    return {surrogate: {**own, "coef": coef}}


def label(surrogate: str, eps: float) -> str:
    return f"{surrogate}_eps{eps:g}"


def examinations(seeds: Sequence[int]) -> list[Job]:
    """One for each floor of the log-det and seed: a dry run shows all surrogates."""
    return [
        Job(name=f"doctor_eps{eps:g}", seed=seed, settings={**SETTINGS, "entropy_terms": [term("log_det", eps, 1e-4)]})
        for eps in EPS["log_det"]
        for seed in seeds
    ]


def diagnose(job: Job, folder: Path) -> dict:
    """The doctor's words on the settings, by surrogate."""
    found = examine([*recipe(job), "--output_dir", str(folder / ".trainer")])
    if not found.forces:
        raise ValueError("; ".join(found.mistakes) or "no force")
    return {"kind": "doctor", "seed": job.seed, "forces": {force.surrogate: asdict(force) for force in found.forces}}


def predictions(found: Mapping[str, dict]) -> dict[tuple[str, float, int], dict]:
    """(surrogate, floor, seed) -> the doctor's force."""
    return {
        (surrogate, eps, seed): found[f"doctor_eps{eps if surrogate == 'log_det' else 1e-4:g}_{seed}"]["forces"][
            surrogate
        ]
        for seed in {each["seed"] for each in found.values() if each.get("kind") == "doctor"}
        for surrogate in TERMS
        for eps in EPS[surrogate]
    }


def weak_threshold(force: Mapping[str, float]) -> float:
    """The coefficient at which the term is just not weak; 1 where there is no force or no policy gradient."""
    norm, gradient = force["force_norm"], force["gradient_norm"]
    return LEAST_RATIO * gradient / norm if norm > 0 and gradient > 0 else 1.0


def without(rates: Sequence[float], seeds: Sequence[int], steps: int) -> list[Job]:
    """Runs without a term, all gauges in their chain."""
    gauges = [gauge(label(name, eps), name, eps, spectrum_every=10_000) for name in TERMS for eps in EPS[name]]
    own = {**SETTINGS, "max_steps": steps, "entropy_terms": gauges}
    return [
        Job(name=f"without_lr{rate:g}", seed=seed, settings={**own, "learning_rate": rate})
        for seed in seeds
        for rate in rates
    ]


def with_terms(
    of: Mapping[tuple[str, float, int], dict], factors: Sequence[float], rates: Sequence[float], steps: int
) -> list[Job]:
    return [
        Job(
            name=f"{label(surrogate, eps)}_x{factor:.2g}_lr{rate:g}",
            seed=seed,
            settings={
                **SETTINGS,
                "max_steps": steps,
                "learning_rate": rate,
                "entropy_terms": [
                    term(surrogate, eps, factor * weak_threshold(force)),
                    gauge("gauge", surrogate, eps),
                ],
            },
        )
        for (surrogate, eps, seed), force in of.items()
        for factor in factors
        for rate in rates
    ]


def make(job: Job, folder: Path) -> dict:
    _, _, log = train(job, folder)
    kept = [{key: value for key, value in entry.items() if "/" in key or key in ("step", "entropy")} for entry in log]
    rate, kind = job.settings["learning_rate"], job.name.partition("_")[0]
    if kind == "without":
        return {"kind": kind, "seed": job.seed, "rate": rate, "log": kept}
    [(surrogate, given)] = job.settings["entropy_terms"][0].items()
    eps = given.get("eps_relative", 1e-4)
    own = {"surrogate": surrogate, "eps": eps, "coef": given["coef"], "seed": job.seed, "rate": rate}
    return {"kind": "with", **own, "log": kept}


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What the gauge saw of a run."""

    ratio: float  # median of coef ||F|| / ||g||
    live: float  # median
    alignment: float  # median
    unsteadiness: float  # of the last 50 steps; infinite where the force was not finite
    value: float  # mean of the last 10 steps

    def flags(self) -> dict[str, bool]:
        return {
            "weak": self.ratio < LEAST_RATIO,
            "frozen": self.live < LEAST_LIVE,
            "misaligned": self.alignment < WORST_ALIGNMENT,
            "unstable": self.unsteadiness > MOST_UNSTEADY,
        }

    def regime(self) -> str:
        """In the order in which the doctor names them."""
        flagged = self.flags()
        return next((name for name in ("frozen", "weak", "misaligned", "unstable") if flagged[name]), "healthy")


def trajectory(log: Sequence[Mapping[str, float]], coef: float, link: str = "gauge") -> Trajectory:
    def series(noun: str) -> list[float]:
        return [entry[f"{link}/{noun}"] for entry in log if f"{link}/{noun}" in entry]

    norms = series("force_norm")
    both = [entry for entry in log if f"{link}/force_norm" in entry and entry.get(f"{link}/gradient_norm", 0) > 0]
    ratios = [coef * entry[f"{link}/force_norm"] / entry[f"{link}/gradient_norm"] for entry in both]
    is_finite = all(math.isfinite(norm) for norm in norms)
    return Trajectory(
        ratio=statistics.median(ratios) if ratios else math.inf,
        live=statistics.median(series("live") or [1.0]),  # the feature softmax has no directions
        alignment=statistics.median(series("alignment") or [0.0]),
        unsteadiness=unsteadiness(norms[-LAST:]) if is_finite else math.inf,
        value=statistics.fmean(series("value")[-END:]),
    )


def has_effect(value: float, own_without: float, all_without: Sequence[float]) -> bool:
    """Whether the term moved its surrogate, against runs without it: that of its seed, and those of all seeds."""
    return abs(value - own_without) > CLEAR * statistics.stdev(all_without)


def predicted(force: Mapping[str, float], coef: float) -> dict[str, float | str]:
    """The doctor's regime for a coefficient, and the score of each regime: the higher, the surer."""
    norm, gradient = force["force_norm"], force["gradient_norm"]
    ratio = coef * norm / gradient if gradient > 0 else math.inf
    found, _ = regime(coef, norm, gradient, force["alignment"], force["live"])
    if found == "healthy" and force["unsteadiness"] > MOST_UNSTEADY:
        found = "unstable"
    log_ratio = math.log(ratio) if ratio > 0 else -math.inf
    scores = {"weak": -log_ratio, "frozen": -force["live"], "misaligned": -force["alignment"]}
    return {**scores, "unstable": force["unsteadiness"], "effect": log_ratio, "regime": found}


def auroc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Chance that a positive scores higher than a negative, a tie counting half; NaN where either class is empty."""
    positive = [score for score, is_one in zip(scores, is_positive, strict=True) if is_one]
    negative = [score for score, is_one in zip(scores, is_positive, strict=True) if not is_one]
    if not positive or not negative:
        return math.nan
    return float(stats.mannwhitneyu(positive, negative).statistic) / (len(positive) * len(negative))


def judged(found: Mapping[str, dict]) -> list[dict]:
    """One row a run with a term: prediction, truths, how far its coefficient is from the threshold.

    A run is left out as long as that of its seed without the term is not there, or no other one for the spread.
    """
    of = predictions(found)
    ends: dict[tuple[str, float], dict[int, float]] = {}
    for each in found.values():
        if each["kind"] != "without":
            continue
        for name in (label(surrogate, eps) for surrogate in TERMS for eps in EPS[surrogate]):
            end = trajectory(each["log"], 0.0, name).value
            ends.setdefault((name, each["rate"]), {})[each["seed"]] = end
    rows = []
    for each in found.values():
        if each["kind"] != "with":
            continue
        force = of[each["surrogate"], each["eps"], each["seed"]]
        seen = trajectory(each["log"], each["coef"])
        base = ends.get((label(each["surrogate"], each["eps"]), each["rate"]), {})
        if each["seed"] not in base or len(base) < 2:
            continue
        rows.append(
            {
                "surrogate": each["surrogate"],
                "predicted": predicted(force, each["coef"]),
                "flags": seen.flags() | {"effect": has_effect(seen.value, base[each["seed"]], list(base.values()))},
                "regime": seen.regime(),
                "factor": each["coef"] / weak_threshold(force),
            }
        )
    return rows


def tabulate(rows: Sequence[dict]) -> list[Table | str]:
    table = Table(title=f"{len(rows)} runs: does the doctor's score tell them apart?")
    for column in ("truth", "by the score", "runs in it", "runs not in it", "AUROC"):
        table.add_column(column)
    near = [row for row in rows if 1 / NEAR * 0.99 <= row["factor"] <= NEAR * 1.01]
    by = {
        "weak": "-log of predicted coef ||F|| / ||g||",
        "frozen": "-predicted live share",
        "misaligned": "-predicted alignment",
        "unstable": "deviation of ||F|| over its mean in the dry run",
        "effect": "log of predicted coef ||F|| / ||g||",
    }
    lines = [(name, name, rows) for name in by]
    lines.insert(1, (f"weak, coef within x {NEAR:.1f} of the threshold", "weak", near))
    lines += [
        (f"effect, {surrogate}", "effect", [row for row in rows if row["surrogate"] == surrogate])
        for surrogate in TERMS
    ]
    for title, name, those in lines:
        truth = [row["flags"][name] for row in those]
        value = auroc([row["predicted"][name] for row in those], truth)
        told = f"{value:.3f}" if math.isfinite(value) else "none: a class is EMPTY"
        table.add_row(title, by[name], str(sum(truth)), str(len(truth) - sum(truth)), told)
    counts = Counter((row["predicted"]["regime"], row["regime"]) for row in rows)
    names = ("healthy", *REGIMES)
    confusion = Table(title="regimes: rows predicted, columns by trajectory")
    for column in ("predicted", *names):
        confusion.add_column(column)
    for name in names:
        confusion.add_row(name, *(str(counts[name, other]) for other in names))
    right = sum(count for (one, other), count in counts.items() if one == other)
    return [table, confusion, f"the same regime in {right} of {len(rows)} runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="make the runs that are not there yet")
    parser.add_argument("--table", action="store_true", help="judge the runs that are there")
    parser.add_argument("--out", type=Path, default=Path("runs/predictive"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--without-seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of runs without a term")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates")
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS), help="of the weak threshold")
    parser.add_argument("--only", nargs="+", choices=TERMS, default=list(TERMS), help="these terms alone")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of a run")
    options = parser.parse_args()
    if not set(options.seeds) <= set(options.without_seeds):
        parser.error("--without-seeds must hold all of --seeds: each run is compared with that of its seed")
    if options.train:
        failed = run_all(diagnose, examinations(options.seeds), options.out, options.jobs)
        if failed:
            raise SystemExit(f"The doctor failed: {failed[0].file(options.out).with_suffix('.out')}")
        of = {key: force for key, force in predictions(read([options.out])).items() if key[0] in options.only}
        wanted = with_terms(of, options.factors, options.rates, options.steps)
        wanted = [job for job in wanted if job.seed in options.seeds]
        wanted = [*without(options.rates, options.without_seeds, options.steps), *wanted]
        for job in run_all(make, wanted, options.out, options.jobs):
            print(f"Failed: {job.file(options.out).with_suffix('.out')}")
    if options.table:
        found = read([options.out])
        rows = judged(found)
        console = Console(width=150)
        console.print(
            f"{sum(each['kind'] == 'with' for each in found.values()) - len(rows)} runs left out", highlight=False
        )
        for each in tabulate(rows):
            console.print(each, highlight=False)
        (options.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
