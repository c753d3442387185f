"""Sees a collapse of the policy's entropy coming, from what a run logs

The detector reads one log entry at a time and keeps plain numbers, so it works in training (`CollapseCallback`, and as
the coefficient `on_collapse`) and on the log of a finished run (`judge`; on anyone's log, `hclm-rl watch`). How early
and how falsely it speaks: docs/results.md. What its words mean: docs/words.md.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from .history import LEAST, State, add_noise, last_time_above, mean_of, push
from .signs import Signs, number
from .slowing import HIGH, goes_on, recent_slope, rests_above
from .trend import mann_kendall, theil_sen

Word = Literal["healthy", "warning", "collapsing", "exploding", "collapsed"]
TINY = 1e-6  # nats, under which no share is taken
Level = tuple[float, float]  # nats, and their standard error
STATES: tuple[Word, ...] = get_args(Word)  # a state's number is its place here, in logs and in checkpoints


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the detector says after a step. The state is one of the entropy's curve alone."""

    state: Word
    causes: tuple[str, ...] = ()  # sentences about the entropy; none where it is healthy
    signs: tuple[str, ...] = ()  # and about what else is logged: they stand beside the state and do not change it

    @property
    def number(self) -> int:
        """As it is logged: 0 healthy, 1 warning, 2 collapsing, 3 exploding, 4 collapsed."""
        return STATES.index(self.state)

    @property
    def severity(self) -> int:
        """By how bad it is: healthy, warning, collapsing, then exploding and collapsed alike."""
        return min(self.number, 3)

    @property
    def is_alarm(self) -> bool:
        """Whether it is worse than a warning."""
        return self.severity > 1

    @property
    def told(self) -> str:
        """All in one sentence."""
        return "; ".join((f"the entropy: {self.state}", *self.causes, *self.signs))

    @property
    def ends(self) -> bool:
        """Whether a run that stops at a collapse stops here: it is over, and not only foreseen."""
        return self.state in ("collapsed", "exploding")


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Of a window of the history."""

    slope: float  # of log entropy, per unit of time
    level: float  # nats, of the line at the window's end
    span: float  # time
    steps: float  # optimiser steps


@dataclass(frozen=True, kw_only=True)
class CollapseDetector:
    """Says healthy, warning, collapsing, collapsed or exploding from the curve of the entropy.

    Reference: the highest level since `warm_up`, less two standard errors of it. Collapsed: surely under `collapsed` of
    the reference, or under `least_nats`. Collapsing: below `warning_below` the entropy falls (Mann-Kendall's score and
    Theil and Sen's line over the recent part of the fall), does not come to rest above `collapsed`, and at its pace is
    there within `patience` of the time in which it came down from nine tenths of the reference, and before `max_steps`,
    where the log names them. A fall that slows down does not come to rest where the pace of its last quarter alone
    takes it there within `steady` of that time: as a power law does, and an approach to a level above does not. Time
    counts in learning rate x steps where the rate is logged, else in steps. A reward that falls with the entropy makes
    the patience half as long again, one that rises a tenth shorter. Once it has said so it asks for a new low before it
    says so again. Warning: below `warning_below`. Exploding: above `exploding_above` of the start and above
    `ample_nats`, and rising.
    """

    collapsed: float = 0.2  # share of the reference that counts as collapse, in (0, 1)
    warning_below: float = 0.5  # share of the reference
    exploding_above: float = 2.0  # shares of the start
    least_nats: float = 0.03  # collapsed whatever the reference is
    ample_nats: float = 1.0  # above it nothing is collapsed, and below it nothing explodes
    patience: float = 0.6  # share of the time that the fall has taken
    steady: float = 0.42  # of it, within which a fall that slows down still goes on
    least_score: float = 3.0  # Mann-Kendall's z from which on a trend is one
    least_fall: float = 0.1  # change of log entropy over the window without which a trend is none
    warm_up: int = 5  # optimiser steps that are not looked at: formats are learnt in them
    memory: int = 10  # optimiser steps over which the level is smoothed
    signs: Signs = field(default_factory=Signs)

    def __post_init__(self) -> None:
        if not 0 < self.collapsed < self.warning_below < 1 < self.exploding_above:
            raise ValueError(
                "0 < collapsed < warning_below < 1 < exploding_above must hold, got "
                f"{self.collapsed}, {self.warning_below}, {self.exploding_above}"
            )
        if not 0 <= self.least_nats < self.ample_nats:
            raise ValueError(f"0 <= least_nats < ample_nats must hold, got {self.least_nats}, {self.ample_nats}")
        if self.warm_up < 0 or self.memory < 1:
            raise ValueError(
                f"warm_up must be at least 0 and memory at least 1 optimiser step, got {self.warm_up}, {self.memory}"
            )
        for name in ("patience", "steady", "least_score", "least_fall"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def initial_state(self) -> State:
        """Before the first step."""
        return {}

    def update(self, logs: Mapping[str, object], step: int, state: State) -> tuple[Verdict, State]:
        """The verdict after a log entry of optimiser step `step`; `state` itself is left alone.

        An entry without an entropy, or of a step seen before (a resumed run), changes nothing.
        """
        entropy = number(logs.get("entropy"))
        if entropy is None or entropy < 0 or step <= state.get("step", -1):
            return Verdict(state=STATES[int(state.get("verdict", 0))]), state
        new = dict(state)
        steps = max(step - int(new.get("step", step - 1)), 1)
        new["step"] = step
        first = new.setdefault("first", step)
        if "seen" in new:  # written by version 0.1.0's first detector, whose reference was the start
            new["reference"] = max(new.get("start", 0.0), self.least_nats, TINY)
            del new["seen"]
        if entropy == 0 and "level" not in new:
            return Verdict(state="warning", causes=("the entropy is 0: no token counts, or every one is certain",)), new
        keep = (1 - 1 / self.memory) ** steps
        new["level"] = keep * new.get("level", entropy) + (1 - keep) * entropy
        rate = number(logs.get("learning_rate"))
        # a rate that is logged from some later entry on cannot be compared with the steps before it
        if rate is not None and new.get("is timed", "rate" not in new):
            new["rate"], new["is timed"] = rate, True
        new.setdefault("rate", 1.0)
        new["now"] = new.get("now", 0.0) + new["rate"] * steps
        levels = self.remember(logs, entropy, steps, new) if step - first >= self.warm_up else []
        is_warm = "reference" in new
        signs = self.signs.update(logs, steps, new["level"] - self.limit(new) if is_warm else math.inf, new)
        word, causes = self.word(logs, levels, new) if is_warm else ("healthy", ())
        new["verdict"] = STATES.index(word)
        return Verdict(state=word, causes=causes, signs=signs), new

    def remember(self, logs: Mapping[str, object], entropy: float, steps: int, state: State) -> list[Level]:
        """Adds the entry to the history, keeps the reference; the levels of the scales that grew.

        Those are the means of the last 4 entries and of the last 8 bins of every such scale, with their errors.
        """
        add_noise(state, state.get("last", entropy), entropy)
        state["last"], state["spacing"] = entropy, steps
        push(state, "time", state["now"])
        grown = push(state, "entropy", entropy)
        if (reward := number(logs.get("reward"))) is not None:
            push(state, "reward", reward)
        levels = [mean_of(state, 0, 4), *(mean_of(state, scale, LEAST) for scale in range(grown))]
        if levels[0]:
            sure = max(mean - error for mean, error in filter(None, levels))
            state["reference"] = max(sure, state.get("reference", 0.0), self.least_nats, TINY)
        if "start" not in state and len(state["entropy"][0]) >= LEAST:
            state["start"] = max(sum(levels[1] or ()), TINY)
        state["grown"] = grown
        return list(filter(None, levels))

    def limit(self, state: State) -> float:
        """Nats under which it is collapsed."""
        return max(self.collapsed * state["reference"], self.least_nats)

    def word(self, logs: Mapping[str, object], levels: list[Level], state: State) -> tuple[Word, tuple[str, ...]]:
        """The state, and sentences that say why."""
        level, share, was = state["level"], state["level"] / state["reference"], STATES[int(state.get("verdict", 0))]
        told = f"the entropy is {level:.2g} nats, {100 * share:.0f} % of its reference"
        left = self.steps_to_collapse(logs, levels, state)
        if self.is_collapsed(levels, was == "collapsed", state):
            return "collapsed", (told,)
        if self.is_exploding(state):
            return "exploding", (
                f"the entropy is {level:.2g} nats, {level / state['start']:.1f} times its start and rises",
            )
        if left is not None:
            return "collapsing", (f"{told}, and at its pace collapsed in {left:.0f} steps",)
        if share < self.warning_below * (1.1 if was == "warning" else 1.0):
            return "warning", (told,)
        return "healthy", ()

    def is_collapsed(self, levels: list[Level], was: bool, state: State) -> bool:
        """A level is three standard errors below the limit, and the smoothed one near it; until half above it again."""
        limit = self.limit(state)
        if was:
            return state["level"] < 1.5 * limit
        return state["level"] < min(2.5 * limit, self.ample_nats) and any(
            mean + 3 * error < limit for mean, error in levels
        )

    def is_exploding(self, state: State) -> bool:
        """Until it has not been seen to rise for half a window."""
        if state["level"] < max(self.exploding_above * state.get("start", math.inf), self.ample_nats):
            state.pop("rises until", None)
            return False
        for scale in range(state.get("grown", 0)):
            if (found := self.trend(scale, 1, self.least_score, state)) is not None:
                state["rises until"] = state["step"] + found.steps / 2
        return state.get("rises until", -1) >= state["step"]

    def steps_to_collapse(self, logs: Mapping[str, object], levels: list[Level], state: State) -> float | None:
        """Steps that are left at the present pace, once it collapses and until half a window without a sign of it."""
        is_on, last = "falls until" in state, number(logs.get("max_steps"))
        if levels:
            self.keep_bar(levels[0], state)
            if is_on or levels[0][0] < min(state["bar"], self.warning_below * state["reference"]):
                found = [self.fall(scale, is_on, last, state) for scale in range(state["grown"])]
                for left, steps in filter(None, found):
                    state["falls until"] = max(state["step"] + steps / 2, state.get("falls until", 0.0))
                    state["collapses at"] = state["step"] + left
        if "falls until" not in state:
            return None
        if state["step"] > state["falls until"] or "low" not in state:
            del state["falls until"]
            state["bar"] = min(state["bar"], 0.6 * state.get("low", math.inf))
            return None
        return max(state["collapses at"] - state["step"], 0.0)

    def keep_bar(self, recent: Level, state: State) -> None:
        """Below the bar, in nats, falls are looked at; a low that it came back from lowers the bar."""
        state.setdefault("bar", math.inf)
        if sum(recent) < self.warning_below * state["reference"] or "low" in state:
            state["low"] = min(state.get("low", math.inf), sum(recent))
            if min(state["level"], recent[0] - 2 * recent[1]) > 1.3 * state["low"]:
                state["bar"] = min(state["bar"], 0.85 * state.pop("low"))

    def fall(self, scale: int, is_on: bool, last: float | None, state: State) -> tuple[float, float] | None:
        """Steps to collapse and of the window, if the window of that scale falls into it; `is_on`: it did before."""
        values, limit = state["entropy"][scale], self.limit(state)
        fell, above = sum(values[:4]) / max(sum(values[-4:]), 1e-9), max(sum(values[-4:]) / 4 / limit, 1.0)
        pace = (0.05 if is_on else 0.15) / self.patience
        if state["rate"] <= 0 or math.log(max(fell, 1.0)) < pace * math.log(above):
            return None  # far too slow, seen without the costly tests
        found = self.trend(scale, -1, self.least_score * (0.5 if is_on else 1.0), state)
        if found is None:
            return None
        left = max(math.log(found.level / limit), 0.0) / -recent_slope(found.slope, scale, state)
        since = last_time_above(state, HIGH * state["reference"], scale)
        fallen = min(state["now"] - (since or 0.0), 2 * found.span) + 8 * state["rate"]
        patience = self.patience * {-1: 1.5, 0: 1.0, 1: 0.9}[self.reward_turns(scale, state)]
        if left > patience * fallen * (3.0 if is_on else 1.0):
            return None
        if last and 0 <= last - state["step"] < left / state["rate"]:  # 0 and -1 stand for a run without a last step
            return None
        slows = any(rests_above(each, limit, found.level, state) for each in (scale, scale + 1, scale + 2))
        if slows and not goes_on(limit, self.steady, state):
            return None
        return left / state["rate"], found.steps

    def reward_turns(self, scale: int, state: State) -> int:
        """-1, 0 or 1: whether the reward falls, keeps its place or rises over the window of that scale."""
        rings = state.get("reward", ())
        score = mann_kendall(rings[scale]) if scale < len(rings) and len(rings[scale]) >= LEAST else 0.0
        return (score > 2) - (score < -2)

    def trend(self, scale: int, sign: int, least: float, state: State) -> Trend | None:
        """Over the window of that scale; None where the score is not beyond `least` in the direction of `sign`."""
        values, times = state["entropy"][scale], state["time"][scale]
        if len(values) < LEAST or sign * (values[-1] - values[0]) < 0 or sign * mann_kendall(values) < least:
            return None
        slope, level = theil_sen(times, [math.log(max(value, 1e-3 * state["reference"])) for value in values])
        span = times[-1] - times[0]
        if sign * slope * span < self.least_fall:
            return None
        steps = len(values) * 2**scale * state["spacing"]
        return Trend(slope=slope, level=math.exp(level), span=span, steps=steps)

    def judge(self, log: Iterable[Mapping[str, object]]) -> list[tuple[int, Verdict]]:
        """The verdict after each entry of a run's log that has a step and an entropy."""
        return [(step, verdict) for step, verdict, _ in self.read(log)]

    def read(self, log: Iterable[Mapping[str, object]]) -> Iterator[tuple[int, Verdict, State]]:
        """As `judge`, with the state that goes on from each entry."""
        state = self.initial_state()
        for entry in log:
            step = number(entry.get("step"))
            if step is not None and number(entry.get("entropy")) is not None:
                verdict, state = self.update(entry, int(step), state)
                yield int(step), verdict, state
