"""What an influence has meant for the entropy: a line fitted through a run, with the errors of its coefficients"""

import logging
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

logger = logging.getLogger(__name__)

KNOWN_BY = 2.0  # standard errors by which the gain must lie above 0 before anything is predicted
LEAST_SPARE = 7.0  # measurements beyond the line's three coefficients before its residuals give an error
MOST_CHANGE = 0.1  # of the entropy, that a prediction may carry it between two measurements
OFF = 0.1  # of the entropy: measurements that lie further off, twice in a row on one side, are taken as they are
MOST_CORRELATION = 0.95  # of residuals; at 1 the errors would be infinite


@dataclass(frozen=True)
class Line:
    """H = offset + drift t + gain C, fitted; nats per optimiser step, and per step for a net of 1."""

    drift: float
    gain: float
    covariance: tuple[float, float, float]  # of drift, of both, of gain

    def change(self, net: float) -> tuple[float, float]:
        """(nats per optimiser step at a mean influence of `net`, its standard error)."""
        drift, both, gain = self.covariance
        return self.drift + self.gain * net, math.sqrt(max(drift + 2 * net * both + net * net * gain, 0.0))

    @property
    def gain_error(self) -> float:
        """Standard error of the gain."""
        return math.sqrt(self.covariance[2])

    @property
    def is_known(self) -> bool:
        """Whether the gain is KNOWN_BY standard errors above 0."""
        return self.gain > KNOWN_BY * self.gain_error


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Turns influences into nats per optimiser step by what the run has shown; all it knows is in a term's `memory`.

    The measured entropies H of the generation batches are regressed on the steps made, t, and on the influences summed
    over them, C: H = offset + drift t + gain C, older batches forgotten at `decay`; drift is what falls whatever the
    influences say. Levels, not differences: the noise of a batch's mean entropy is larger than what a step changes,
    and it cancels over a line but not over differences. Errors are those of least squares, times
    sqrt((1 + r) / (1 - r)) with r the correlation of successive errors of forecast. The gain is known where it is
    above 0 by KNOWN_BY of its errors; until then nothing is predicted. `entropy` in memory is the level filtered by
    that model: carried on by drift + gain * net, by at most MOST_CHANGE of itself, and drawn to each measurement by
    `trust`; all the way where it runs away from the filter (OFF), as at the start of a short run.
    """

    decay: float = 0.99  # per generation batch, in (0, 1]
    trust: float = 0.3  # in a single measurement, in (0, 1]
    scale: float = 0.0  # nats; MOST_CHANGE is of this where the level is nearer to 0

    def measure(self, memory: dict, step: int, entropy: float) -> None:
        """`entropy`: nats, mean over the generation batch sampled before optimiser step `step`; ignored if not finite.

        What an older version left in `memory` is fitted anew; the level and the start are kept.
        """
        forget_older(memory)
        memory.setdefault("fit", [0.0] * 16)
        steps = max(step - memory.get("step", step), 0)
        moved = steps * memory.get("net", 0.0) - memory.pop("dropped", 0.0)
        memory["step"] = step
        memory["since"] = memory.get("since", 0) + steps
        memory["moved"] = memory.get("moved", 0.0) + moved
        memory["squares"] = memory.get("squares", 0.0) + (steps * memory.get("error", 0.0)) ** 2
        if not math.isfinite(entropy):
            return
        since, moved = memory["since"], memory["moved"]
        memory.setdefault("entropy", entropy)
        line = self.line(memory)
        memory.pop("predicted", None)
        if since and "measured" in memory:
            memory["realised"] = (entropy - memory["measured"]) / since
            if line is not None and line.is_known:
                most = MOST_CHANGE * max(abs(memory["entropy"]), self.scale)
                change = min(max(since * line.change(moved / since)[0], -most), most)
                memory["predicted"] = change / since
                memory["entropy"] += change
        memory["entropy"] += self.trusted(memory, entropy - memory["entropy"])
        memory["measured"] = entropy
        self.learn(memory, entropy)

    def trusted(self, memory: dict, off: float) -> float:
        """How far the level follows a measurement that lies `off` it."""
        side = math.copysign(1.0, off) * (abs(off) > OFF * max(abs(memory["entropy"]), self.scale))
        before, memory["off"] = memory.get("off", 0.0), side
        return off if side and side == before else self.trust * off

    def learn(self, memory: dict, entropy: float) -> None:
        """Puts a measurement into the moments of (1, t, C, H), whose t and C count from the newest one."""
        shift = np.eye(4)
        shift[1:3, 0] = -memory["since"], -memory["moved"]
        known = shift @ np.reshape(memory["fit"], (4, 4)) @ shift.T
        if (found := solved(known)) is not None and known[0, 0] >= 3 + LEAST_SPARE:
            error, last = entropy - found[0][0], memory.get("forecast", 0.0)
            for name, value in (("errors", error * error), ("pairs", error * last)):
                memory[name] = self.decay * memory.get(name, 0.0) + value
            memory["forecast"] = error
        point = np.array([1.0, 0.0, 0.0, entropy])
        memory["fit"] = (self.decay * known + np.outer(point, point)).ravel().tolist()
        memory["noise"] = self.decay * memory.get("noise", 0.0) + memory["squares"]
        memory["since"], memory["moved"], memory["squares"] = 0, 0.0, 0.0

    @staticmethod
    def plan(memory: dict, net: float, error: float = 0.0) -> None:
        """`net`: the mean influence of the steps until the next measurement, weights included; `error`, its standard
        error as a mean over the tokens.
        """
        memory["net"], memory["error"] = net, error

    @staticmethod
    def drop(memory: dict, net: float) -> None:
        """`net`: what of an optimiser step's mean influence did not act after all, as its tokens were clipped."""
        memory["dropped"] = memory.get("dropped", 0.0) + net

    @staticmethod
    def changes(memory: dict, like: Tensor) -> dict[str, Tensor]:
        """`predicted_change` and `realised_change` up to the last measurement, and the line's `drift` and
        `gain_error`, as metrics; each from when it is known.
        All of them scalars, (), of the type of `like`, whose shape does not matter.
        """
        told = {f"{name}_change": memory[name] for name in ("predicted", "realised") if name in memory}
        if (line := Ledger.line(memory)) is not None:
            told |= {"drift": line.drift, "gain_error": line.gain_error}
        return {name: like.new_tensor(value) for name, value in told.items()}

    @staticmethod
    def line(memory: dict) -> Line | None:
        """The line as measured so far; None until its errors can be told.

        For that it takes LEAST_SPARE measurements more than coefficients, and summed influences that leave their own
        straight line by more than the error of a single one.
        """
        moments = np.reshape(memory.get("fit", [0.0] * 16), (4, 4))
        count = moments[0, 0]
        if count < 3 + LEAST_SPARE or (found := solved(moments)) is None:
            return None
        coefficients, inverse = found
        if 1 / inverse[2, 2] < memory.get("noise", 0.0):
            return None
        squares = max(moments[3, 3] - coefficients @ moments[:3, 3], 0.0)
        errors = memory.get("errors", 0.0)
        r = min(max(memory.get("pairs", 0.0) / errors, 0.0), MOST_CORRELATION) if errors > 0 else 0.0
        covariance = inverse * squares / (count - 3) * (1 + r) / (1 - r)
        return Line(
            drift=float(coefficients[1]),
            gain=float(coefficients[2]),
            covariance=(float(covariance[1, 1]), float(covariance[1, 2]), float(covariance[2, 2])),
        )

    @staticmethod
    def pace(memory: dict) -> tuple[float, float] | None:
        """(nats now, nats per optimiser step) of a straight line through the measurements; None of fewer than two."""
        moments = np.reshape(memory.get("fit", [0.0] * 16), (4, 4))
        count, time, level = moments[0, 0], moments[0, 1], moments[0, 3]
        spread = count * moments[1, 1] - time * time
        if count < 1.5 or spread <= 0:
            return None
        slope = (count * moments[1, 3] - time * level) / spread
        return float((level - slope * time) / count), float(slope)

    @staticmethod
    def gain(memory: dict) -> float:
        """Nats per optimiser step for a net of 1; 0 until it is known."""
        line = Ledger.line(memory)
        return line.gain if line is not None and line.is_known else 0.0


def solved(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(coefficients of H on (1, t, C), the inverse of their moments); None where these do not tell them apart."""
    size = np.sqrt(np.diag(moments)[:3])
    if not (size > 0).all():
        return None
    scaled = moments[:3, :3] / np.outer(size, size)  # correlations: t, C and 1 have units of their own
    if np.linalg.eigvalsh(scaled)[0] < 1e-10:
        return None
    inverse = np.linalg.inv(scaled) / np.outer(size, size)
    return inverse @ moments[:3, 3], inverse


def forget_older(memory: dict) -> None:
    """Drops the sums of a version whose line had no drift: they say nothing of the errors."""
    if "cc" not in memory:
        return
    logger.warning(
        "the checkpoint's gain between influences and entropy is of an older version and is learnt anew; the level and "
        "the entropy at the start are kept"
    )
    for name in ("n", "c", "h", "cc", "ch", "summed", "predicted", "realised"):
        memory.pop(name, None)
