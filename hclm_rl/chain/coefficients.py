"""Strength of a link over time: a number, a schedule over progress, or a controller of the entropy

A coefficient is a frozen object without state of its own. The trainer keeps `state`, a dict of plain numbers:

    state = coefficient.initial_state()
    c = coefficient.value(progress, state, entropy)    # before an optimiser step: what this step applies
    state = coefficient.update(entropy, state)         # after it, once

`entropy`, in nats, is the mean over all tokens that count, of the whole optimiser step and of all processes. `update`
gets that of the step just made, `value` that measured when the step's responses were sampled, if it was measured: of
the step's first generation batch, where it has several, and NaN where no token counts there: no state moves then, a
gate is shut, and a proportional-integral strength stays.
State goes through `json`: an infinity is written as `Infinity`, which Python reads back and a strict parser refuses.

Here are the controllers, and what a recipe's words mean; the schedules are in `schedules.py`, what is measured against
the policy's start in `anchored.py`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..responses.names import nearest
from .anchored import Aer
from .schedules import Coefficient, Constant, Cosine, Linear, Schedule, State, require_number, require_numbers

if TYPE_CHECKING:
    from ..watch.collapse import CollapseDetector

__all__ = [
    "KINDS",
    "Aer",
    "Coefficient",
    "Constant",
    "Cosine",
    "Linear",
    "OnCollapse",
    "ProportionalIntegral",
    "Schedule",
    "State",
    "StepToTarget",
    "coefficient_from",
    "require_number",
    "require_numbers",
]


@dataclass(frozen=True, kw_only=True)
class StepToTarget:
    """Raises the coefficient step by step while the entropy is below the target, and applies it only then.

    Source: Skywork Open Reasoner 1, He et al., 2025, arXiv:2505.22312. Three rules, c the state, T the target:

    "trl" (TRL 1.16, one step of lag): applied c if h_last <= T else 0, with h_last = +inf at first; after the step, h
        its entropy, c <- min(c + delta, maximum) if h <= T else max(c - delta, minimum); h_last <- h.
    "paper" (same-step gate): applied c if e <= T else 0, with e measured when this step's responses were sampled;
        after the step, given that same e, c rises if e < T, falls if e > T, stays if equal; within the bounds.
    "skywork" (Skywork's code, one step of lag): applied c if h_last < T else 0, open at first; after the step, c rises
        if h < T and falls otherwise. Their h is the mean of -log p over sampled tokens, a noisy estimate of the
        entropy that is exact here.

    The state is an integral: it rises for as long as the entropy is low. The bonus explodes the entropy from about
    1e-2 on (arXiv:2505.22617), a hundredth of TRL's default `maximum`: set it. "paper" refuses a step without entropy.
    """

    target: float  # nats; 0.2 in Skywork's and TRL's settings, below the entropy at which a base model starts
    delta: float = 0.005  # added or taken at each optimiser step; TRL's default, Skywork's scripts have 1e-4
    start: float = 0.0
    minimum: float = 0.0
    maximum: float = 1.0  # TRL's default; Skywork's scripts have 0.005
    rule: Literal["trl", "paper", "skywork"] = "trl"

    def __post_init__(self) -> None:
        require_numbers(self, "target", "delta", "start", "minimum", "maximum")
        if self.target < 0:
            raise ValueError(f"target must not be negative, got {self.target}; for no control give a number as coef")
        if self.delta < 0:
            raise ValueError(f"delta must not be negative, got {self.delta}")
        if not self.minimum <= self.start <= self.maximum:
            raise ValueError(
                f"minimum <= start <= maximum must hold, got minimum {self.minimum}, start {self.start}, "
                f"maximum {self.maximum}"
            )
        if self.rule not in ("trl", "paper", "skywork"):
            raise ValueError(f'rule must be "trl", "paper" or "skywork", got {self.rule!r}')

    @property
    def needs_entropy(self) -> bool:
        return self.rule == "paper"

    def initial_state(self) -> State:
        return {"coefficient": self.start, "last_entropy": -math.inf if self.rule == "skywork" else math.inf}

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        if self.rule != "paper":
            gate = state["last_entropy"]
        elif entropy is None:
            raise ValueError(
                'rule="paper" opens its gate by the entropy of the same step, measured before the backward pass: '
                'pass the entropy at sampling time, or choose rule="trl"'
            )
        else:
            gate = entropy
        is_open = gate < self.target if self.rule == "skywork" else gate <= self.target
        return state["coefficient"] if is_open else 0.0

    def update(self, entropy: float, state: State) -> State:
        rises = entropy < self.target or (self.rule == "trl" and entropy == self.target)
        stays = self.rule == "paper" and entropy == self.target
        moved = state["coefficient"] + (0.0 if stays else self.delta if rises else -self.delta)
        return {"coefficient": min(max(moved, self.minimum), self.maximum), "last_entropy": entropy}


@dataclass(frozen=True, kw_only=True)
class OnCollapse:
    """Off until the entropy collapses, then on until it has recovered: a switch with hysteresis.

    Carries a `CollapseDetector` (collapse.py) of its own, fed with the entropy of each optimiser step. On at the first
    verdict of `since` or worse (never for exploding, which also switches it off); off again once the smoothed entropy
    is above `until` of the detector's reference.
    """

    active: float  # the coefficient while it is on
    idle: float = 0.0  # and while it is not
    since: Literal["warning", "collapsing"] = "warning"
    until: float = 0.7  # share of the reference, above the detector's warning_below
    detector: Mapping[str, float] | None = None  # fields of CollapseDetector that differ from its defaults

    def __post_init__(self) -> None:
        require_numbers(self, "active", "idle", "until")
        if self.since not in ("warning", "collapsing"):
            raise ValueError(f'since must be "warning" or "collapsing", got {self.since!r}')
        watch = self._watch()
        if not self.until > watch.warning_below:
            raise ValueError(
                f"until must be above the detector's warning_below, {watch.warning_below}, got {self.until}: the "
                "switch would flutter"
            )

    def _watch(self) -> "CollapseDetector":
        from ..watch.collapse import CollapseDetector

        try:
            return CollapseDetector(**dict(self.detector or {}))  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"detector of on_collapse: {error}") from error

    @property
    def needs_entropy(self) -> bool:
        return False

    def initial_state(self) -> State:
        return {"is_on": 0.0}

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        return self.active if state["is_on"] else self.idle

    def update(self, entropy: float, state: State) -> State:
        from ..watch.collapse import STATES

        seen = {name: value for name, value in state.items() if name != "is_on"}
        verdict, seen = self._watch().update({"entropy": entropy}, int(seen.get("step", 0)) + 1, seen)
        is_on = bool(state["is_on"])
        if verdict.state == "exploding" or (is_on and seen["level"] > self.until * seen.get("reference", math.inf)):
            is_on = False
        elif STATES.index(self.since) <= verdict.number:
            is_on = True
        return seen | {"is_on": float(is_on)}


@dataclass(frozen=True, kw_only=True)
class ProportionalIntegral:
    """Holds the entropy at the target: c = clip(k_i E + k_p e, minimum, maximum), e = H - target, E the sum of past e.

    Source: EntroPIC, 2025, arXiv:2511.15248; E is that before this step's e is added. c > 0 where there is too much
    entropy: for a term that lowers it, as `entro_pic` does; negative gains turn that round, for an entropy bonus.
    "lagged": one update per optimiser step, c acts in the next one, and 0 in the first.
    "same_step": c from the entropy measured when this step's responses were sampled, as in the authors' code; it
    refuses a step without entropy.

    Entropy is at the sampling temperature, and so is the target. The gains suit entropies near 0.1: at an error of 1
    nat k_p = 1 saturates at once. With `anti_windup` k_i E stays within the bounds; without it a long phase far above
    the target stores an E that later drives the entropy below it.
    """

    target: float = 0.1  # nats, >= 0; the authors' script, whose temperature is 0.6: more at temperature 1
    k_p: float = 1.0  # per nat, of the same sign as k_i; the authors' value
    k_i: float = 0.01  # per nat and step; the authors' value
    minimum: float = -1.0  # <= 0; the authors' value
    maximum: float = 1.0  # >= 0; the authors' value
    rule: Literal["lagged", "same_step"] = "lagged"
    anti_windup: bool = True  # False: E is unbounded, as in the authors' code

    def __post_init__(self) -> None:
        require_numbers(self, "target", "k_p", "k_i", "minimum", "maximum")
        if self.target < 0:
            raise ValueError(f"target must not be negative, got {self.target}; for no control give a number as coef")
        if self.k_p * self.k_i < 0:
            raise ValueError(f"k_p and k_i must have the same sign, got {self.k_p} and {self.k_i}")
        if not self.minimum <= 0 <= self.maximum:
            raise ValueError(f"minimum <= 0 <= maximum must hold, got {self.minimum} and {self.maximum}")
        if self.rule not in ("lagged", "same_step"):
            raise ValueError(f'rule must be "lagged" or "same_step", got {self.rule!r}')

    @property
    def needs_entropy(self) -> bool:
        return self.rule == "same_step"

    def initial_state(self) -> State:
        return {"integral": 0.0, "coefficient": 0.0}

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        if self.rule == "lagged":
            return state["coefficient"]
        if entropy is None:
            raise ValueError(
                'rule="same_step" answers to the entropy of the same step, measured before the backward pass: pass the '
                'entropy at sampling time, or choose rule="lagged"'
            )
        return state["coefficient"] if math.isnan(entropy) else self._strength(entropy, state)

    def update(self, entropy: float, state: State) -> State:
        integral = state["integral"] + entropy - self.target
        if self.anti_windup and not self.minimum <= self.k_i * integral <= self.maximum:
            integral = self._within(self.k_i * integral) / self.k_i
        return {"integral": integral, "coefficient": self._strength(entropy, state)}

    def _strength(self, entropy: float, state: State) -> float:
        return self._within(self.k_i * state["integral"] + self.k_p * (entropy - self.target))

    def _within(self, strength: float) -> float:
        return min(max(strength, self.minimum), self.maximum)


KINDS: dict[str, Callable[..., Coefficient]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "step_to_target": StepToTarget,
    "on_collapse": OnCollapse,
    "proportional_integral": ProportionalIntegral,
    "aer": Aer,
}


def coefficient_from(spec: object) -> Coefficient:
    """A recipe's `coef`: a number, {"kind": "linear", "start": 0.01, "end": 0.0}, or a coefficient as it is.

    Refuses an unknown kind, and names the nearest.
    """
    if isinstance(spec, Coefficient):
        return spec
    if not isinstance(spec, Mapping):
        return Constant(coefficient=require_number("coef", spec))
    settings = {name: value for name, value in spec.items() if name != "kind"}
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"coef needs a known kind, got {kind!r}; known: {nearest(kind, KINDS)}, ...")
    known = inspect.signature(KINDS[kind]).parameters
    for name in settings:
        if name not in known:
            raise ValueError(f"a {kind} coef has no {name!r}; it has: {nearest(name, known)}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in settings]
    if missing:
        raise ValueError(f"a {kind} coef needs {', '.join(missing)}; got {settings}")
    return KINDS[kind](**settings)
