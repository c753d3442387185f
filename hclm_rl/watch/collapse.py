"""Sees a collapse of the policy's entropy coming, from what a run logs

The detector reads one log entry at a time and keeps plain numbers, so it works in training (`CollapseCallback`, and as
the coefficient `on_collapse`) and on the log of a finished run (`judge`). Its thresholds were set on one half of 64
runs of the testbed and are reported on the other (docs/results.md).
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STATES = ("healthy", "warning", "collapsing", "exploding")
State = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the detector says after a step."""

    state: Literal["healthy", "warning", "collapsing", "exploding"]
    causes: tuple[str, ...]  # sentences, the strongest first; none where it is healthy

    @property
    def number(self) -> int:
        """As it is logged: 0 healthy, 1 warning, 2 collapsing, 3 exploding."""
        return STATES.index(self.state)


@dataclass(frozen=True, kw_only=True)
class CollapseDetector:
    """Says healthy, warning, collapsing or exploding from logged quantities.

    Level: the entropy, smoothed over `memory` steps, as a share of its start (the mean over the first `reference`
    steps). Slope: that of log entropy, by a line over the last `window` steps, older ones forgotten exponentially.
    Collapsing: the level is below `collapsing_below`, or below `warning_below` while the slope takes it to `collapsed`
    within `horizon` steps. Warning: below `warning_below`, or one of the other signs. Exploding: above
    `exploding_above` and rising. The other signs, where the run logs them: the flow of entropy_flow or force_reweight,
    summed over `horizon`, passes `collapsed`; responses of a group alike (`distinct` under `least_distinct` of its
    start); the log-det's force dying (`rho` under `least_force` of its start); more than `most_clipped` of the tokens
    clipped.
    """

    collapsed: float = 0.2  # share of the start that counts as collapse, in (0, 1)
    collapsing_below: float = 0.25  # share of the start
    warning_below: float = 0.5  # share of the start
    exploding_above: float = 1.5  # shares of the start
    horizon: int = 120  # optimiser steps
    memory: int = 10  # optimiser steps
    window: int = 40  # optimiser steps
    reference: int = 5  # optimiser steps
    least_distinct: float = 0.5  # share of its start
    least_force: float = 0.1  # share of its start
    most_clipped: float = 0.3  # of the tokens

    def __post_init__(self) -> None:
        if not 0 < self.collapsed < self.collapsing_below <= self.warning_below < 1 < self.exploding_above:
            raise ValueError(
                "0 < collapsed < collapsing_below <= warning_below < 1 < exploding_above must hold, got "
                f"{self.collapsed}, {self.collapsing_below}, {self.warning_below}, {self.exploding_above}"
            )
        for name in ("horizon", "memory", "window", "reference"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 optimiser step, got {getattr(self, name)}")
        for name in ("least_distinct", "least_force", "most_clipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def initial_state(self) -> State:
        """Before the first step."""
        return {}

    def update(self, logs: Mapping[str, object], step: int, state: State) -> tuple[Verdict, State]:
        """The verdict after a log entry of optimiser step `step`; `state` itself is left alone.

        An entry without an entropy, or of a step seen before (a resumed run), changes nothing.
        """
        entropy = number(logs.get("entropy"))
        if entropy is None or not entropy >= 0 or step <= state.get("step", -1):
            return Verdict(state=STATES[int(state.get("verdict", 0))], causes=()), state
        new = dict(state)
        steps = max(step - int(new.get("step", 0)), 1)
        new["step"] = step
        fit_line(new, math.log(max(entropy, 1e-12)), steps, 1 - 1 / self.window)
        if new.get("seen", 0) < self.reference:
            counts = min(steps, self.reference - new.get("seen", 0))
            new["seen"] = new.get("seen", 0) + counts
            new["start"] = new.get("start", 0.0) + (entropy - new.get("start", 0.0)) * counts / new["seen"]
        keep = (1 - 1 / self.memory) ** steps
        new["level"] = keep * new.get("level", entropy) + (1 - keep) * entropy
        collapsing, causes = self.by_entropy(new)
        is_exploding = new["level"] > self.exploding_above * new["start"] and slope(new) > 0
        signs = self.other_signs(logs, new, steps)
        if is_exploding:
            share = new["level"] / new["start"]
            verdict = Verdict(
                state="exploding", causes=(f"the entropy is {share:.1f} times its start and rises", *signs)
            )
        elif collapsing:
            verdict = Verdict(state="collapsing", causes=(*causes, *signs))
        elif causes or signs:
            verdict = Verdict(state="warning", causes=(*causes, *signs))
        else:
            verdict = Verdict(state="healthy", causes=())
        new["verdict"] = verdict.number
        return verdict, new

    def by_entropy(self, state: State) -> tuple[bool, tuple[str, ...]]:
        """Whether it collapses by level and slope, and the sentences."""
        if state["seen"] < self.reference or state["start"] <= 0:
            return False, ()
        share, pace = state["level"] / state["start"], slope(state)
        if share >= self.warning_below:
            return False, ()
        left = (math.log(share) - math.log(self.collapsed)) / -pace if pace < 0 and share > 0 else math.inf
        told = f"the entropy is at {100 * share:.0f} % of its start"
        is_on = state.get("verdict") == STATES.index("collapsing")
        # hysteresis: it goes on until the level has risen by a tenth, or the slope has clearly flattened
        below, within = (
            (1.1 * self.collapsing_below, 4 * self.horizon) if is_on else (self.collapsing_below, self.horizon)
        )
        if share < below or left < within:
            reach = f" and at its slope reaches {100 * self.collapsed:.0f} % in {max(left, 0):.0f} steps"
            return True, (told + (reach if left < within else ""),)
        return False, (told,)

    def other_signs(self, logs: Mapping[str, object], state: State, steps: int) -> tuple[str, ...]:
        """Sentences of what else the run logs; keeps what it needs in `state`."""
        told = []
        for name, value in logs.items():
            noun = name.rpartition("/")[2]
            value = number(value)
            if value is None:
                continue
            if noun in ("distinct", "rho", "predicted_change"):
                keep = (1 - 1 / self.memory) ** steps
                mean = state[f"mean {name}"] = keep * state.get(f"mean {name}", value) + (1 - keep) * value
                if state["seen"] < self.reference:
                    continue
                first = state.setdefault(f"first {name}", mean)
                if noun == "predicted_change":
                    if state["level"] + self.horizon * mean < self.collapsed * state["start"]:
                        told.append(
                            f"{name}: {mean:.1e} nats a step, under {100 * self.collapsed:.0f} % of the start in "
                            f"{self.horizon} steps"
                        )
                elif mean < (self.least_distinct if noun == "distinct" else self.least_force) * first:
                    what = "of the responses in a group differ" if noun == "distinct" else "of its bound has the force"
                    told.append(f"{name}: {mean:.2g} {what}, {first:.2g} at the start")
            elif name == "clip_ratio/region_mean" and value > self.most_clipped:
                told.append(f"{100 * value:.0f} % of the tokens are clipped")
        return tuple(told)

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


def number(value: object) -> float | None:
    """A finite number, also one that was logged as text; None for anything else."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def fit_line(state: State, y: float, steps: int, keep: float) -> None:
    """Adds (now, y) to the sums of a line whose time counts back from now; what is older weighs `keep` per step."""
    n, t, s, tt, ts = (state.get(name, 0.0) for name in ("n", "t", "s", "tt", "ts"))
    forgotten = keep**steps
    tt, ts, t = tt - 2 * steps * t + steps**2 * n, ts - steps * s, t - steps * n
    state["n"], state["t"], state["s"] = forgotten * n + 1, forgotten * t, forgotten * s + y
    state["tt"], state["ts"] = forgotten * tt, forgotten * ts


def slope(state: State) -> float:
    """Change of the fitted quantity per step; 0 before there are two points."""
    spread = state["n"] * state["tt"] - state["t"] ** 2
    return (state["n"] * state["ts"] - state["t"] * state["s"]) / spread if spread > 1e-9 else 0.0


class CollapseCallback(TrainerCallback):
    """Watches a run: logs `collapse/state` (0 healthy to 3 exploding), warns when it gets worse, and may stop it.

    Put it before callbacks that write the log. `action`: "warn", or "stop" to end training once it is collapsing or
    exploding (the checkpoint callback still saves). To act on it, give a term the coefficient `on_collapse`.
    """

    def __init__(self, detector: CollapseDetector | None = None, action: Literal["warn", "stop"] = "warn") -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f'action must be "warn" or "stop", got {action!r}')
        self.detector, self.action = detector or CollapseDetector(), action
        self.state = self.detector.initial_state()
        self.verdict = Verdict(state="healthy", causes=())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A run that goes on from a checkpoint has its start in its log."""
        self.state, self.verdict = self.detector.initial_state(), Verdict(state="healthy", causes=())
        for _, verdict, after in self.detector.read(state.log_history):
            self.verdict, self.state = verdict, after

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ) -> None:
        if logs is None or number(logs.get("entropy")) is None:
            return
        before = self.verdict
        self.verdict, self.state = self.detector.update(logs, state.global_step, self.state)
        logs["collapse/state"] = self.verdict.number
        if state.log_history:  # the Trainer keeps a copy of its own
            state.log_history[-1]["collapse/state"] = self.verdict.number
        if self.verdict.number > before.number and state.is_world_process_zero:
            logger.warning("step %d: %s: %s", state.global_step, self.verdict.state, "; ".join(self.verdict.causes))
        if self.action == "stop" and self.verdict.state in ("collapsing", "exploding"):
            control.should_training_stop = True
