"""Trends of a few values, by rank: no distribution is assumed, and one odd value changes little.

scipy.stats has the first two; importing it takes longer than reading a whole log, so they stand here, and the tests
compare them with scipy's.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence


def mann_kendall(values: Sequence[float]) -> float:
    """The score z of S = sum over i < j of sign(y_j - y_i), Mann 1945: about N(0, 1) without a trend.

    Var S = [n (n - 1)(2 n + 5) - sum over ties t (t - 1)(2 t + 5)] / 18; S is brought nearer to 0 by 1, as a step is 2.
    """
    n = len(values)
    s = sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])
    ties = sum(t * (t - 1) * (2 * t + 5) for t in Counter(values).values() if t > 1) if len(set(values)) < n else 0
    variance = (n * (n - 1) * (2 * n + 5) - ties) / 18
    return math.copysign(abs(s) - 1, s) / math.sqrt(variance) if s and variance > 0 else 0.0


def theil_sen(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The median of the slopes of all pairs, Sen 1968, and with it the value at the last time."""
    pairs = [
        (values[j] - values[i]) / (times[j] - times[i])
        for i in range(len(times))
        for j in range(i + 1, len(times))
        if times[j] > times[i]
    ]
    slope = statistics.median(pairs) if pairs else 0.0
    return slope, statistics.median(y + slope * (times[-1] - t) for t, y in zip(times, values, strict=True))


def resting_point(values: Sequence[float], noise: float) -> tuple[float, float]:
    """Where an exponential approach through the values, equally far apart in time, comes to rest; its standard error.

    With the means a, b, c of three equal parts: (a c - b^2) / (a + c - 2 b), Aitken 1926. `noise`: the standard
    deviation of one value. Minus infinity where the fall does not slow down.
    """
    third = len(values) // 3
    gap = (len(values) - third) // 2
    a, b, c = (sum(values[i : i + third]) / third for i in (0, gap, 2 * gap))
    bend = a + c - 2 * b
    if not (a > b > c and bend > 1e-9):
        return -math.inf, 0.0
    by_part = ((b - c) ** 2, 2 * (a - b) * (b - c), (a - b) ** 2)  # derivatives times bend^2
    return (a * c - b * b) / bend, math.hypot(*by_part) / bend**2 * noise / math.sqrt(third)
