"""The last values of a run at every scale, in lists of plain numbers that a checkpoint can keep

Scale k holds the last `BINS` means of 2^k log entries each, so that 5,000 entries need some 300 numbers, and a window
of `BINS` bins is at hand for every stretch from 12 entries to the whole run.
"""

from typing import Any

BINS = 12  # of a scale that are kept: in a window of that many a score of 3 stands for two of three pairs in order
LEAST = 8  # bins without which nothing is said; the score of eight in order is 3.3

State = dict[str, Any]  # numbers, and lists of them: what JSON keeps
Rings = list[list[float]]  # one a scale, the oldest bin first


def push(state: State, name: str, value: float) -> int:
    """Adds an entry's number to the rings of that name, and pairs of them to those above; how many scales grew."""
    rings: Rings = list(state.get(name, ()))
    counts: list[int] = list(state.get(f"bins of {name}", ()))
    scale = 0
    while True:
        if scale == len(rings):
            rings.append([])
            counts.append(0)
        ring = rings[scale] = [*rings[scale][1 - BINS :], value]
        counts[scale] += 1
        scale += 1
        if counts[scale - 1] % 2:
            break
        value = (ring[-2] + value) / 2
    state[name], state[f"bins of {name}"] = rings, counts
    return scale


def last_time_above(state: State, level: float, scale: int) -> float | None:
    """When the entropy was last at `level` or above, in means of scale `scale` or, farther back, coarser ones."""
    for times, values in zip(state["time"][scale:], state["entropy"][scale:], strict=True):
        for time, value in zip(reversed(times), reversed(values), strict=True):
            if value >= level:
                return time
    return None


def mean_of(state: State, scale: int, bins: int) -> tuple[float, float] | None:
    """The mean of the last `bins` bins and its standard error by the run's noise; None before there are as many."""
    values = state["entropy"][scale][-bins:]
    if len(values) < bins:
        return None
    mean = sum(values) / bins
    return mean, mean * state["noise"] / (bins * 2**scale) ** 0.5


def add_noise(state: State, before: float, now: float) -> None:
    """Keeps the standard deviation of an entry as a share of its level, from what neighbours differ by.

    The mean of |x - y| is 2 / sqrt(pi) standard deviations. It starts with four differences of 10 % noise, because the
    first few say little.
    """
    apart = 2 * abs(now - before) / (now + before) if now + before > 0 else 0.0
    seen = min(state.get("differences", 4.0) + 1, 64.0)
    state["noise"] = state.get("noise", 0.1) + (0.886 * apart - state.get("noise", 0.1)) / seen
    state["differences"] = seen
