"""Made-up entropy curves that collapse and that do not, and how a detector does on them.

    python -m tests.watch.battery --seeds 2000 2040

prints the table of docs/results.md: seeds from 2000 on set nothing. The thresholds were set on seeds 0 to 19, which the
default tests take, and 100 to 124. A shape is a curve without noise, known by formula, and so is its truth: it
collapses at the first step at which the curve is under a fifth of its reference.
"""

import argparse
import math
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hclm_rl.watch.collapse import CollapseDetector

Curve = NDArray[np.float64]
Noise = Callable[[np.random.Generator, int], Curve]  # factors of the curve, one a step
ALARMS = ("collapsing", "collapsed", "exploding")


def white(share: float) -> Noise:
    return lambda rng, steps: np.maximum(1 + share * rng.standard_normal(steps), 0.02)


def slow(share: float, memory: float) -> Noise:
    """What wanders: an autoregressive series of `memory` steps, of standard deviation `share`, and 3 % white noise."""

    def factors(rng: np.random.Generator, steps: int) -> Curve:
        keep, value = math.exp(-1 / memory), rng.standard_normal()
        found = []
        for kick in rng.standard_normal(steps):
            found.append(value)
            value = keep * value + math.sqrt(1 - keep**2) * kick
        return np.maximum(1 + share * np.array(found) + 0.03 * rng.standard_normal(steps), 0.02)

    return factors


def spiked(rng: np.random.Generator, steps: int) -> Curve:
    """5 % noise, and every fiftieth value a fifth or five times of what it should be."""
    odd = rng.random(steps) < 0.02
    factor = np.where(rng.random(steps) < 0.5, 5.0, 0.2)
    return np.maximum(1 + 0.05 * rng.standard_normal(steps), 0.02) * np.where(odd, factor, 1.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One curve over optimiser steps 1, 2, ..., and how it is logged."""

    name: str
    clean: Callable[[Curve], Curve]  # nats at steps 0, 1, ...
    steps: int
    collapses: bool = False
    reference: float = 1.0  # nats, of the clean curve; collapsed is under a fifth of it
    noise: Noise = field(default_factory=lambda: white(0.05))
    every: int = 1  # steps between log entries, which are means
    missing: float = 0.0  # share of entries without an entropy, half of them as NaN
    tau: float | None = None  # time constant of a collapse that is one decay
    onset: int = 0  # step at which the fall begins; leads are shares of the time from there
    more: Callable[[Curve], Mapping[str, Curve]] | None = None  # other columns, at the logged steps

    @property
    def collapse(self) -> int | None:
        """T, the first step under a fifth of the reference."""
        if not self.collapses:
            return None
        low = np.flatnonzero(self.clean(np.arange(self.steps, dtype=float)) < 0.2 * self.reference)
        return int(low[0]) + 1

    @property
    def length(self) -> int:
        """Steps to look at: a collapse is watched until shortly after it."""
        return self.steps if self.collapse is None else min(self.steps, self.collapse + 20 * self.every)

    def entries(self, seed: int) -> list[dict]:
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        steps = self.length // self.every * self.every
        values = self.clean(np.arange(steps, dtype=float)) * self.noise(rng, steps)
        logged = values.reshape(-1, self.every).mean(1)
        at = np.arange(1, len(logged) + 1) * self.every
        other = self.more(at.astype(float)) if self.more else {}
        found = []
        for i, (step, entropy) in enumerate(zip(at.tolist(), logged.tolist(), strict=True)):
            entry = {"step": step, "entropy": entropy, **{name: float(of[i]) for name, of in other.items()}}
            lot = rng.random() if self.missing else 1.0
            if lot < self.missing / 2:
                del entry["entropy"]
            elif lot < self.missing:
                entry["entropy"] = math.nan
            found.append(entry)
        return found


def decay(tau: float, floor: float = 0.0, start: float = 1.0, after: int = 0) -> Callable[[Curve], Curve]:
    """`start` for `after` steps, then down to `floor` with time constant `tau`."""
    return lambda t: floor + (start - floor) * np.exp(-np.maximum(t - after, 0) / tau)


def power(tau: float, exponent: float = 1.0, floor: float = 0.0) -> Callable[[Curve], Curve]:
    """A fall that slows down and does not come to rest: fast at first, as a trained policy's."""
    return lambda t: floor + (1 - floor) * (1 + t / tau) ** -exponent


def line(*points: tuple[float, float]) -> Callable[[Curve], Curve]:
    """Straight between the points (step, nats)."""
    at, values = zip(*points, strict=True)
    return lambda t: np.interp(t, at, values)


def swing(low: float, high: float, period: float) -> Callable[[Curve], Curve]:
    return lambda t: (low + high) / 2 + (high - low) / 2 * np.cos(2 * np.pi * t / period)


def constant(value: float) -> Callable[[Curve], Curve]:
    return lambda t: np.full_like(t, value)


def saw(low: float, high: float, period: int) -> Callable[[Curve], Curve]:
    """Falls within each stage of a curriculum and is back at the start of the next."""
    return lambda t: high * (low / high) ** ((t % period) / period)


def stairs(share: float, length: int) -> Callable[[Curve], Curve]:
    """Each stair of `length` steps is `share` of the one before."""
    return lambda t: share ** np.floor(t / length)


def cooled(steps: int, tau: float) -> tuple[Callable[[Curve], Curve], Callable[[Curve], Mapping[str, Curve]]]:
    """A decay in lr x steps under a rate that falls in a line to 0, and that rate."""
    return (
        lambda t: np.exp(-(t - t**2 / (2 * steps)) / tau),
        lambda at: {"learning_rate": 1e-5 * (1 - at / steps), "max_steps": np.full_like(at, steps)},
    )


def rising_reward(at: Curve) -> Mapping[str, Curve]:
    return {"reward": 0.2 + 0.6 * at / at[-1]}


def of_steps(steps: int) -> Callable[[Curve], Mapping[str, Curve]]:
    return lambda at: {"max_steps": np.full_like(at, steps)}


def fall(name: str, clean: Callable[[Curve], Curve], steps: int, **more) -> Shape:
    return Shape(name=name, clean=clean, steps=steps, collapses=True, **more)


TAUS = (
    (19, 1),
    (30, 1),
    (60, 1),
    (120, 1),
    (250, 2),
    (540, 4),
    (1000, 5),
    (1250, 5),
    (2500, 10),
    (5000, 20),
    (8000, 40),
)
COLLAPSES = [
    *(fall(f"decay, tau {tau}", decay(tau), 2 * tau, every=every, tau=tau) for tau, every in TAUS),
    *(
        fall(f"power law, tau {tau}", power(tau), int(4.6 * tau), every=every)
        for tau, every in ((30, 1), (100, 2), (400, 8))
    ),
    fall("power law of .7, tau 30", power(30, 0.7), 310),
    fall("power law of .7, tau 100", power(100, 0.7), 1030, every=4),
    fall("power law of .5, tau 20", power(20, 0.5), 555, every=2),
    fall("power law, tau 60, 12 % noise", power(60), 276, noise=white(0.12)),
    fall("decay, tau 30, 12 % noise", decay(30), 60, noise=white(0.12), tau=30),
    fall("decay, tau 120, 25 % noise", decay(120), 240, noise=white(0.25), tau=120),
    fall("decay, tau 500, 50 % noise", decay(500), 1000, noise=white(0.5), every=2, tau=500),
    fall("decay, tau 300, wandering 15 %", decay(300), 600, noise=slow(0.15, 20), tau=300),
    fall("decay, tau 120, every tenth step logged", decay(120), 240, every=10, tau=120),
    fall("decay, tau 540, every tenth step logged", decay(540), 1080, every=10, tau=540),
    fall("decay, tau 150, a third missing", decay(150), 300, missing=0.33, tau=150),
    fall("decay, tau 200, from .3 nats", decay(200, start=0.3), 400, reference=0.3, tau=200),
    fall("decay, tau 200, from 4 nats", decay(200, start=4.0), 400, reference=4.0, tau=200),
    fall("decay, tau 200, the reward rises", decay(200), 400, more=rising_reward, tau=200),
    fall("level for 300, then tau 30", decay(30, after=300), 400, onset=300, tau=30),
    fall("level for 1000, then tau 200", decay(200, after=1000), 1500, every=2, onset=1000, tau=200),
    fall("line over 100", line((0, 1.0), (100, 0.0)), 100),
    fall("line over 600", line((0, 1.0), (600, 0.0)), 600),
    fall("line over 4000", line((0, 1.0), (4000, 0.0)), 4000, every=10),
    fall("cliff within 5 steps at 200", line((200, 1.0), (205, 0.05)), 260, onset=200),
    fall(
        "doubles, then tau 100",
        lambda t: np.where(t < 200, 0.3 + 0.3 * t / 200, 0.6 * np.exp(-(t - 200) / 100)),
        500,
        reference=0.6,
        onset=200,
        tau=100,
    ),
    fall(
        "format drop 1.5 to .5, then tau 150",
        lambda t: 1.0 * np.exp(-t / 5) + 0.5 * np.exp(-np.maximum(t - 50, 0) / 150),
        500,
        reference=0.5,
        onset=50,
        tau=150,
    ),
    fall("swings while it falls, tau 300", lambda t: np.exp(-t / 300) * (1 + 0.25 * np.sin(2 * np.pi * t / 60)), 600),
    fall("stairs", stairs(0.75, 50), 400),
]
CALM = [
    *(
        Shape(name=f"to 22 %, tau {tau}", clean=decay(tau, 0.22), steps=steps, every=every)
        for tau, steps, every in ((30, 1000, 2), (100, 1000, 3), (400, 3000, 8), (2000, 12000, 32))
    ),
    Shape(name="to 22 % in a line over 200", clean=line((0, 1.0), (200, 0.22)), steps=1000, every=4),
    Shape(name="to 30 %, tau 100", clean=decay(100, 0.3), steps=1000, every=4),
    Shape(name="to 45 %, tau 100, 15 % noise", clean=decay(100, 0.45), steps=1000, every=4, noise=white(0.15)),
    Shape(name="power law to 26 %", clean=power(40, floor=0.25), steps=1500, every=4),
    Shape(name="power law, the run ends at 23 %", clean=power(300), steps=1000, every=4, more=of_steps(1000)),
    Shape(name="format drop 1.5 to .3, tau 5", clean=decay(5, 0.3, 1.5), steps=1000),
    Shape(name="format drop 1.5 to .3, tau 15", clean=decay(15, 0.3, 1.5), steps=1000),
    Shape(name="format drop 1.5 to .3 in a line over 20", clean=line((0, 1.5), (20, 0.3)), steps=1000),
    Shape(name="five first steps twice as high", clean=lambda t: np.where(t < 5, 1.0, 0.5), steps=1000),
    Shape(name="recovery .1 to .2", clean=line((0, 0.1), (100, 0.1), (300, 0.2)), steps=1000, every=4),
    Shape(name="rise .3 to .6, then level", clean=line((0, 0.3), (100, 0.6)), steps=1000, every=4, noise=white(0.03)),
    Shape(name="growth 1 to 1.8, then level", clean=decay(150, 1.8, 1.0), steps=1000, every=4),
    Shape(name="dip to 30 % and back", clean=line((0, 1.0), (150, 1.0), (250, 0.3), (400, 0.9)), steps=1000, every=4),
    Shape(name="swings .25 to .75, period 50", clean=swing(0.25, 0.75, 50), steps=1000, every=2),
    Shape(name="swings .25 to .75, period 400", clean=swing(0.25, 0.75, 400), steps=2000, every=2),
    Shape(name="stages, each from 1 to .35", clean=saw(0.35, 1.0, 200), steps=1000, every=4),
    Shape(name="level, 25 % noise", clean=constant(1.0), steps=600, noise=white(0.25)),
    Shape(name="level, 50 % noise", clean=constant(1.0), steps=600, noise=white(0.5)),
    Shape(name="low and level at .2, 40 % noise", clean=constant(0.2), steps=600, noise=white(0.4)),
    Shape(name="level, wandering 20 %", clean=constant(0.6), steps=1000, every=2, noise=slow(0.2, 30)),
    Shape(
        name="level at 35 % after a fall, wandering 12 %",
        clean=decay(80, 0.35),
        steps=1000,
        every=2,
        noise=slow(0.12, 30),
    ),
    Shape(name="level, a third missing", clean=constant(0.4), steps=600, missing=0.33),
    Shape(name="level, with spikes", clean=constant(0.4), steps=600, noise=spiked),
    Shape(name="exactly level", clean=constant(0.4), steps=600, noise=white(0.0)),
    Shape(name="0 for five steps, then .4", clean=lambda t: np.where(t < 5, 0.0, 0.4), steps=1000),
    Shape(name="the run ends long before, tau 3000", clean=decay(3000), steps=2000, every=4, more=of_steps(2000)),
    Shape(
        name="the rate falls to 0 before", clean=cooled(1500, 700)[0], steps=1500, every=2, more=cooled(1500, 700)[1]
    ),
    Shape(name="resumed at 40 % without its log", clean=decay(100, 0.4, 0.45), steps=1000, every=4),
    Shape(name="to 22 %, tau 100, every tenth step logged", clean=decay(100, 0.22), steps=1000, every=10),
]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A detector on one shape over seeds."""

    shape: Shape
    leads: tuple[float, ...]  # of a collapse: (T - first alarm) / (T - onset of the fall), 0 where it came after T
    late: int  # seeds without an alarm before T
    false: float  # alarms per 1,000 steps; of a shape that does not collapse
    alarmed: int  # seeds with one
    ended: int  # seeds that `watch_collapse: stop` would end

    @property
    def lead(self) -> float:
        return statistics.median(self.leads) if self.leads else math.nan


def score(shape: Shape, detector: CollapseDetector, seeds: Sequence[int], ends: Sequence[str]) -> Score:
    """`ends`: the states that end a run under `watch_collapse: stop`."""
    leads, late, false, alarmed, ended, truth = [], 0, 0, 0, 0, shape.collapse
    for seed in seeds:
        judged = detector.judge(shape.entries(seed))
        states = [verdict.state for _, verdict in judged]
        begins = [
            step
            for (step, verdict), before in zip(judged, ["healthy", *states], strict=False)
            if verdict.state in ALARMS and before not in ALARMS
        ]
        ended += any(state in ends for state in states)
        if truth is None:
            false, alarmed = false + len(begins), alarmed + bool(begins)
        else:
            first = min(begins, default=truth)
            leads.append(min(1.0, max(0.0, (truth - first) / (truth - shape.onset))))
            late += first >= truth
    per_thousand = 1000 * false / (shape.steps * len(seeds))
    return Score(shape=shape, leads=tuple(leads), late=late, false=per_thousand, alarmed=alarmed, ended=ended)


def table_of(scores: Sequence[Score], seeds: int) -> Table:
    table = Table(title=f"{len(scores)} shapes, {seeds} seeds each")
    for column in (
        "shape",
        "collapses at",
        "median lead",
        "least lead",
        "late",
        "alarms per 1,000",
        "alarmed",
        "ended",
    ):
        table.add_column(column)
    for of in scores:
        if of.shape.collapses:
            told = [f"{100 * of.lead:.0f} %", f"{100 * min(of.leads):.0f} %", str(of.late), "", "", ""]
        else:
            told = ["", "", "", f"{of.false:.2f}", str(of.alarmed), str(of.ended)]
        table.add_row(of.shape.name, str(of.shape.collapse or ""), *told)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs=2, default=[2000, 2040], metavar=("FROM", "TO"))
    parser.add_argument("--ends", nargs="+", default=["collapsed", "exploding"], help="states that stop ends a run at")
    parser.add_argument("--named", default="", help="shapes alone whose names hold this")
    parser.add_argument("--only", choices=("collapses", "calm"))
    options = parser.parse_args()
    shapes: list[Shape] = {"collapses": COLLAPSES, "calm": CALM, None: [*COLLAPSES, *CALM]}[options.only]
    seeds = range(*options.seeds)
    scores = [score(shape, CollapseDetector(), seeds, options.ends) for shape in shapes if options.named in shape.name]
    Console(width=140).print(table_of(scores, len(seeds)))


if __name__ == "__main__":
    main()
