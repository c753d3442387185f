"""Whether a fall that slows down comes to rest, or goes on as a power law does

Both .22 + .78 exp(-t / tau) and 1 / (1 + t / tau) slow down, and from three parts of a window they look alike. At 25 %
of the start the pace of the moment takes the first to a fifth in .57 of the time that it has fallen, and at no other
level sooner; the second in .30. The entropy of policies that are trained falls more like the second.
"""

import math

from .history import LEAST, State, last_time_above
from .trend import resting_point, theil_sen

HIGH = 0.9  # of the reference, from which a fall is counted
LATEST = 0.25  # of a fall's time, in which the pace of the moment is measured


def rests_above(scale: int, limit: float, level: float, state: State) -> bool:
    """Whether an exponential through the window of that scale slows down, surely, to rest about the limit or above."""
    if scale >= len(state["entropy"]) or len(state["entropy"][scale]) < LEAST:
        return False
    rest, error = resting_point(state["entropy"][scale], state["noise"] * level / 2 ** (scale / 2))
    errors = 3 if len(state["entropy"]) > 5 else 4  # of fewer than 32 entries a bend is mostly noise
    return rest > 0.9 * limit and rest - errors * error > 0.3 * limit


def goes_on(limit: float, share: float, state: State) -> bool:
    """Whether the pace of the latest part of the fall takes it to the limit within that share of the fall's time."""
    fallen = state["now"] - (last_time_above(state, HIGH * state["reference"], 0) or 0.0)
    for times, values in zip(reversed(state["time"]), reversed(state["entropy"]), strict=True):
        if len(times) >= LEAST and times[-1] - times[-LEAST] <= LATEST * fallen:
            slope, end = theil_sen(times[-LEAST:], logs_of(values, state))
            return slope < 0 and max(end - math.log(limit), 0.0) <= -slope * share * fallen
    return False


def recent_slope(whole: float, scale: int, state: State) -> float:
    """That of the window, or that of its newer half where it is surely shallower: by a standard error of it."""
    times = state["time"][scale][-LEAST:]
    mean = sum(times) / LEAST
    error = state["noise"] / 2 ** (scale / 2) / sum((time - mean) ** 2 for time in times) ** 0.5
    return max(whole, min(theil_sen(times, logs_of(state["entropy"][scale], state))[0] - error, -1e-12))


def logs_of(values: list[float], state: State) -> list[float]:
    """Of the last few, none so low that it would outweigh the others."""
    return [math.log(max(value, 1e-3 * state["reference"])) for value in values[-LEAST:]]
