"""How strong and how steady the forces of the six surrogates are along a run: GRPO, and supervised learning.

    python eval/forces.py --train --jobs 2 --out runs/forces
    python eval/forces.py --table --out runs/forces

HCLM (Tran, 2026, arXiv:2605.22940) claims for representation learning that the log-det entropy gives stronger and more
stable forces than softmax-normalised entropy. Both settings log, for each surrogate, H, ||F||, rho = ||F|| over its
bound, the live share and the critical coefficient <F, g> / ||F||^2 at the states, g the gradient of the loss there:

    grpo         plain GRPO on the testbed with six information_force gauges
    supervised   an encoder 32 -> 64 -> 64 (ReLU) with a linear head on ten Gaussian classes, cross-entropy, Adam;
                 without a term, and with -c H(Z) on the last hidden layer, for each surrogate at 1.1 x its critical
                 coefficient at the states in the second half of the run without (where that is not above 0, the least
                 coefficient whose push is not weak there)

||F|| has other units for other surrogates: compare what is relative to the start, rho, and the steadiness. Windows are
of 50 optimiser steps.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from many_runs import Job, read, run_all, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hclm_rl.equations.forces import LEAST_RATIO, SURROGATES, step_force
from hclm_rl.equations.spectra import effective_rank, spectrum

WINDOW = 50  # optimiser steps
START = 10  # optimiser steps whose mean is the force at the start (and at the end)
CLASSES, FEATURES, WIDTH = 10, 32, 64
SPREAD = 0.5  # deviation of the class means in each feature, in units of the noise
TRAINED_ON, TESTED_ON, BATCH = 5000, 2000, 256
RATE = 1e-3  # of Adam
CLEAR, MARGIN = 2.0, 1.1  # standard errors from 0 at which a sign counts; over the critical coefficient
EVERY = 5  # optimiser steps between two measurements of the supervised run
WITHOUT = "without"


def gaussian_classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels; the class means are the same for all seeds."""
    means = SPREAD * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return means[labels] + torch.randn(count, FEATURES, generator=generator), labels


def new_encoder(seed: int) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
        return encoder, nn.Linear(WIDTH, CLASSES)


def measured(z: Tensor, gradient: Tensor, memories: Mapping[str, dict]) -> dict[str, float]:
    """Of all surrogates, as the gauge names them."""
    found: dict[str, float] = {}
    for name in SURROGATES:
        whole = step_force(name, z, lambda x: x, memories[name])
        if whole is None:
            continue
        force, bound = whole.force(z), whole.bound()
        power, dot = force.square().sum().item(), (force * gradient).sum().item()
        of = {
            "value": whole.value().item(),
            "force_norm": math.sqrt(power),
            "gradient_norm": gradient.norm().item(),
            "rho": whole.at_unit_length(force, z).norm().item() / bound if bound > 0 else 0.0,
            "live": whole.live(),
            "critical_coef_at_states": dot / power if power > 0 else 0.0,
        }
        found |= {f"{name}/{noun}": value for noun, value in of.items()}
        if name == "log_det":
            found["effective_rank"] = effective_rank(spectrum(whole.moments)).item()
    return found


def supervised(term: str, coef: float, seed: int, steps: int) -> list[dict]:
    """The log of a run with -coef * H(Z) of the surrogate `term` in its loss; `without`: none."""
    (x, y), (test_x, test_y) = gaussian_classes(TRAINED_ON, 10 * seed + 1), gaussian_classes(TESTED_ON, 10 * seed + 2)
    encoder, head = new_encoder(seed)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    memories: dict[str, dict] = {name: {} for name in SURROGATES}
    log, own = [], {}
    for step in range(1, steps + 1):
        rows = torch.randint(TRAINED_ON, (BATCH,), generator=generator)
        z = encoder(x[rows])
        logits = head(z)
        loss = nn.functional.cross_entropy(logits, y[rows])
        if step % EVERY == 1 or step == steps:
            [gradient] = torch.autograd.grad(loss, z, retain_graph=True)
            with torch.no_grad():
                right = (head(encoder(test_x)).argmax(dim=1) == test_y).float().mean().item()
                logps = logits.log_softmax(dim=-1)
                entropy = -(logps.exp() * logps).sum(dim=-1).mean().item()
            entry = {"step": step, "loss": loss.item(), "entropy": entropy, "test_accuracy": right}
            log.append(entry | measured(z.detach(), gradient, memories))
        if term != WITHOUT and (whole := step_force(term, z.detach(), lambda x: x, own)) is not None:  # type: ignore[arg-type]
            loss = loss - coef * (whole.force(z.detach()) * z).sum()  # F = dH/dZ detached: the gradient of -coef * H
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return log


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def by_the_states(critical: float, error: float, force: float, gradient: float) -> tuple[float, str]:
    """A coefficient from norms and products at the states, with its reason."""
    if force == 0 or gradient == 0:
        return 0.0, "no force or no gradient"
    least = MARGIN * LEAST_RATIO * gradient / force
    is_clear = math.isnan(error) or abs(critical) > CLEAR * error
    if critical > 0 and is_clear and MARGIN * critical >= least:
        return MARGIN * critical, f"{MARGIN:g} x the critical coefficient"
    return least, "the least that is not weak at the states"


def coefficient(log: Sequence[Mapping[str, float]], surrogate: str) -> tuple[float, str]:
    """By the second half of a run without the term, a value for each window of 50 steps."""
    half = [
        entry
        for entry in log
        if entry["step"] > log[-1]["step"] / 2 and f"{surrogate}/critical_coef_at_states" in entry
    ]
    windows: dict[int, list[float]] = {}
    for entry in half:
        windows.setdefault(int(entry["step"] - half[0]["step"]) // WINDOW, []).append(
            entry[f"{surrogate}/critical_coef_at_states"]
        )
    critical, error = mean_and_error([statistics.fmean(values) for values in windows.values()])
    force, gradient = (
        statistics.fmean(entry[f"{surrogate}/{x}"] for entry in half) for x in ("force_norm", "gradient_norm")
    )
    return by_the_states(critical, error, force, gradient)


def make(job: Job, folder: Path) -> dict:
    if job.name == "grpo":
        _, _, log = train(job, folder)
        kept = [{key: value for key, value in each.items() if "/" in key or key in ("step", "entropy")} for each in log]
        return {"kind": "grpo", "term": WITHOUT, "seed": job.seed, "log": kept}
    own = job.settings
    log = supervised(own["term"], own["coef"], job.seed, own["steps"])
    return {"kind": "supervised", "seed": job.seed, **own, "log": log}


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """Of a positive quantity along a run."""

    start: float  # mean over the first 10 optimiser steps
    end: float  # mean over the last 10
    least: float  # relative to the start
    greatest: float
    variation: float  # deviation over mean, of the run
    within: float  # the same within windows of 50 steps, mean over them


def variation(values: Sequence[float]) -> float:
    """Deviation over mean; 0 of a single value or of zeros."""
    mean = statistics.fmean(values)
    return statistics.stdev(values) / mean if len(values) > 1 and mean > 0 else 0.0


def steadiness(series: Sequence[tuple[float, float]]) -> Steadiness:
    """Of pairs (optimiser step, value), ascending."""
    steps, values = zip(*series, strict=True)
    start = statistics.fmean(value for step, value in series if step < steps[0] + START)
    end = statistics.fmean(value for step, value in series if step > steps[-1] - START)
    windows: dict[int, list[float]] = {}
    for step, value in series:
        windows.setdefault(int(step - steps[0]) // WINDOW, []).append(value)
    full = [each for each in windows.values() if len(each) > 1]
    return Steadiness(
        start=start,
        end=end,
        least=min(values) / start if start > 0 else math.nan,
        greatest=max(values) / start if start > 0 else math.nan,
        variation=variation(values),
        within=statistics.fmean(map(variation, full)) if full else math.nan,
    )


def series_of(run: Mapping, surrogate: str, noun: str) -> list[tuple[float, float]]:
    key = f"{surrogate}/{noun}"
    return [(entry["step"], entry[key]) for entry in run["log"] if key in entry]


def mean_and_range(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2g} to {max(values):.2g})"


def forces_table(title: str, runs: Sequence[Mapping]) -> Table:
    """||F|| of each surrogate along these runs, means over them with their range."""
    table = Table(title=f"{title}: ||F||, {len(runs)} runs, mean (range over runs)")
    columns = (
        "surrogate",
        "start",
        "end",
        "end / start",
        "least / start",
        "greatest / start",
        "variation",
        "in windows",
    )
    for column in (*columns, "rho, start", "rho, end", "live, end"):
        table.add_column(column, overflow="fold")
    for name in SURROGATES:
        of = [steadiness(series) for run in runs if (series := series_of(run, name, "force_norm"))]
        if not of:
            continue
        rho = [steadiness(series_of(run, name, "rho")) for run in runs]
        live = [series[-1][1] for run in runs if (series := series_of(run, name, "live"))]
        values = (
            [each.start for each in of],
            [each.end for each in of],
            [each.end / each.start for each in of],
            [each.least for each in of],
            [each.greatest for each in of],
            [each.variation for each in of],
            [each.within for each in of],
            [each.start for each in rho],
            [each.end for each in rho],
        )
        table.add_row(name, *map(mean_and_range, values), mean_and_range(live) if live else "-")
    return table


def claim(title: str, runs: Sequence[Mapping]) -> list[str]:
    """The paper's claim, log-det against the feature softmax, each run by itself."""
    counts, ratios = {"stronger": 0, "nearer to its bound": 0, "steadier over the run": 0, "steadier in windows": 0}, []
    for run in runs:
        ours, its = (steadiness(series_of(run, name, "force_norm")) for name in ("log_det", "feature_softmax"))
        rho, its_rho = (
            statistics.fmean(value for _, value in series_of(run, name, "rho"))
            for name in ("log_det", "feature_softmax")
        )
        ratios.append((ours.start / its.start, ours.end / its.end))
        counts["stronger"] += min(ratios[-1]) > 1
        counts["nearer to its bound"] += rho > its_rho
        counts["steadier over the run"] += ours.variation < its.variation
        counts["steadier in windows"] += ours.within < its.within
    start, end = (mean_and_range(each) for each in zip(*ratios, strict=True))
    told = ", ".join(f"{name} in {count} of {len(runs)} runs" for name, count in counts.items())
    return [f"{title}: log_det against feature_softmax: {told}; ||F|| {start} times its at the start, {end} at the end"]


def outcome_table(runs: Sequence[Mapping]) -> Table:
    """What the term did to the supervised run, means over the last 10 % of the steps."""
    table = Table(title="supervised: what the term does, mean (range over seeds), last 10 % of the steps")
    nouns = ("entropy", "effective_rank", "test_accuracy", "loss")
    for column in (
        "term",
        "coef",
        "prediction entropy",
        "effective rank",
        "test accuracy",
        "loss",
        "own ||F||, variation",
    ):
        table.add_column(column)
    for term in (WITHOUT, *SURROGATES):
        those = [run for run in runs if run["term"] == term]
        if not those:
            continue
        last = [[entry for entry in run["log"] if entry["step"] > 0.9 * run["log"][-1]["step"]] for run in those]
        cells = [
            mean_and_range([statistics.fmean(each[noun] for each in of if noun in each) for of in last])
            for noun in nouns
        ]
        coef = mean_and_range([run["coef"] for run in those])
        own = (
            "-"
            if term == WITHOUT
            else mean_and_range([steadiness(series_of(run, term, "force_norm")).variation for run in those])
        )
        table.add_row(term, "-" if term == WITHOUT else coef, *cells, own)
    return table


def tabulate(runs: Sequence[Mapping]) -> list[Table | str]:
    found: list[Table | str] = []
    plain = {
        kind: [run for run in runs if run["kind"] == kind and run["term"] == WITHOUT] for kind in ("grpo", "supervised")
    }
    for kind, those in plain.items():
        if those:
            found += [forces_table(f"{kind}, without a term", those), *claim(f"{kind}, without a term", those)]
    own = [run for run in runs if run["kind"] == "supervised"]
    if own:
        found.append(outcome_table(own))
        for name in ("log_det", "feature_softmax"):
            those = [run for run in own if run["term"] == name]
            found += [forces_table(f"supervised, with {name}", those)] if those else []
        found += [
            f"{run['term']}, seed {run['seed']}: coef {run['coef']:.3g}, {run['why']}" for run in own if run.get("why")
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--train", action="store_true", help="make the runs that are not there yet")
    parser.add_argument("--table", action="store_true", help="judge the runs that are there")
    parser.add_argument("--out", type=Path, default=Path("runs/forces"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=("grpo", "supervised"), help="this setting alone")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of GRPO")
    parser.add_argument("--supervised-steps", type=int, default=1500)
    options = parser.parse_args()
    failed = []
    if options.train and options.only != "grpo":
        own = {"steps": options.supervised_steps}
        without = [
            Job(name=f"supervised_{WITHOUT}", seed=seed, settings={**own, "term": WITHOUT, "coef": 0.0})
            for seed in options.seeds
        ]
        failed += run_all(make, without, options.out, options.jobs)
        with_terms = []
        for job in [job for job in without if job not in failed]:
            log = read([options.out])[job.file(options.out).stem]["log"]
            for name in SURROGATES:
                coef, why = coefficient(log, name)
                settings = {**own, "term": name, "coef": coef, "why": why}
                with_terms.append(Job(name=f"supervised_{name}", seed=job.seed, settings=settings))
        failed += run_all(make, with_terms, options.out, options.jobs)
    if options.train and options.only != "supervised":
        gauges = [{"information_force": {"name": name, "surrogate": name, "spectrum_every": 1}} for name in SURROGATES]
        settings = {"max_steps": options.steps, "entropy_terms": gauges}
        grpo = [Job(name="grpo", seed=seed, settings=settings) for seed in options.seeds]
        failed += run_all(make, grpo, options.out, options.jobs)
    for job in failed:
        print(f"Failed: {job.file(options.out).with_suffix('.out')}")
    if options.table:
        console = Console(width=190)
        for each in tabulate(list(read([options.out]).values())):
            console.print(each, highlight=False)


if __name__ == "__main__":
    main()
