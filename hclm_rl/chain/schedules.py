"""What every coefficient offers, and those that look at the progress only: a number, a line, half a cosine"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

State = dict[str, float]


@runtime_checkable
class Coefficient(Protocol):
    """What a link's `coef` must offer; anything with these will do. When each is called: `coefficients.py`."""

    @property
    def needs_entropy(self) -> bool:
        """Whether `value` needs the entropy measured when the step's responses were sampled."""
        ...

    def initial_state(self) -> State:
        """State before the first step."""
        ...

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        """The coefficient that this optimiser step applies; progress in [0, 1]."""
        ...

    def update(self, entropy: float, state: State) -> State:
        """The state after the step; `state` itself is left alone."""
        ...


def require_number(name: str, value: object) -> float:
    """The value as a float, or a sentence that says what came instead. Refuses (ValueError) all that is no number."""
    if isinstance(value, str):
        raise ValueError(
            f"{name} must be a number, got the string {value!r}: PyYAML reads 1e-6 as a string and 1.0e-6 as a number"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def require_numbers(settings: object, *names: str) -> None:
    """Checks the named fields of a frozen dataclass and stores them as floats: a YAML `1` is the number 1.0."""
    for name in names:
        object.__setattr__(settings, name, require_number(name, vars(settings)[name]))


class Schedule:
    """A coefficient that looks at the progress only, and so has nothing to remember."""

    @property
    def needs_entropy(self) -> bool:
        """Never."""
        return False

    def initial_state(self) -> State:
        """Nothing."""
        return {}

    def update(self, entropy: float, state: State) -> State:
        """Nothing to remember."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The same coefficient at every step; a bare number in a recipe means this."""

    coefficient: float

    def __post_init__(self) -> None:
        require_numbers(self, "coefficient")

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        return self.coefficient


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from `start` to `end`, after a rise from 0 to `start` over the share `warmup` of training.

    c(p) = start p / warmup for p < warmup, then start + (end - start) s, s = (p - warmup) / (1 - warmup).
    """

    start: float
    end: float
    warmup: float = 0.0  # share of training, in [0, 1)

    def __post_init__(self) -> None:
        require_numbers(self, "start", "end", "warmup")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")

    def value(self, progress: float, state: State, entropy: float | None = None) -> float:
        if progress < self.warmup:
            return self.start * progress / self.warmup
        return self.start + (self.end - self.start) * self.shape((progress - self.warmup) / (1 - self.warmup))

    def shape(self, s: float) -> float:
        """How much of the way from start to end is done at s in [0, 1]."""
        return s


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """As `Linear`, along half a cosine: flat at both ends. c = start + (end - start) (1 - cos(pi s)) / 2."""

    def shape(self, s: float) -> float:
        return (1 - math.cos(math.pi * s)) / 2
