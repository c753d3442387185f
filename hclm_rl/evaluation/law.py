"""The entropy-performance law and what it forecasts: Cui et al., 2025, arXiv:2505.22617

Without entropy control, reward R and policy entropy H (nats) of a run lie on one curve, a line in x = exp(H):

    R = b - a exp(H)          ceiling R(H = 0) = b - a          dR/dH = -a exp(H)

(The paper's box prints -a exp(H + b), a misprint.) Early points give a and b; the law then maps an entropy to a reward,
it does not say when that entropy is reached. a and b belong to one model, data set and estimator of H: never carry them
over, and never choose a target entropy by them. The fit and the forecast from the first part of a run are the paper's;
intervals and guards are ours. Needs scipy (the extra `eval`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

SHARE = 0.15  # of the run, fitted: the paper's first 36 of about 240 steps
LEVEL = 0.95  # of the intervals
LEAST_POINTS = 5  # two coefficients, and something to judge them by
LEAST_RANGE = 0.05  # of exp(H): from H = 0.2 to 0 it moves by 0.22, so less than this says nothing about the ceiling
FALLS = 0.05  # one-sided p-value below which entropy counts as falling
LEAVES = 3.0  # |t| of the step, given the entropy, above which reward counts as moving at a fixed entropy

Values = Sequence[float] | np.ndarray
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Law:
    """R = b - a exp(H) with the uncertainty of a and b."""

    a: float
    b: float
    covariance: np.ndarray  # (2, 2) of (a, b), autocorrelation of the residuals included
    rmse: float  # of the fitted points, divided by their number
    points: int

    @property
    def ceiling(self) -> float:
        """R at H = 0."""
        return self.b - self.a

    def reward_at(self, entropy: float) -> float:
        """R = b - a exp(H), H in nats."""
        return self.b - self.a * math.exp(entropy)

    def slope_at(self, entropy: float) -> float:
        """dR/dH."""
        return -self.a * math.exp(entropy)

    def interval(self, entropy: float = 0.0, level: float = LEVEL) -> Interval:
        """Of the curve at that entropy (of the ceiling at 0): delta method, exact for a line; Student's t."""
        return self._around(self.reward_at(entropy), np.array([-math.exp(entropy), 1.0]), level)

    def interval_of_a(self, level: float = LEVEL) -> Interval:
        """Of the slope a, at this level of confidence."""
        return self._around(self.a, np.array([1.0, 0.0]), level)

    def _around(self, value: float, direction: np.ndarray, level: float) -> Interval:
        quantile = float(stats.t.ppf((1 + level) / 2, self.points - 2))
        half = quantile * math.sqrt(direction @ self.covariance @ direction)
        return value - half, value + half


def fit_law(entropy: Values, reward: Values, items: Values | None = None) -> Law:
    """Least squares in exp(H) over points in the order of the run; `items` (validation items a point) weight them.

    Points of a run are autocorrelated, which makes plain standard errors too small: the variances are multiplied by
    (1 + r) / (1 - r), r the residuals' correlation at lag 1, plus 2 / n for its bias, kept in [0, 0.9]. Refuses fewer
    than 3 pairs.
    """
    h, r = np.asarray(entropy, dtype=float), np.asarray(reward, dtype=float)
    if len(h) != len(r) or len(h) < 3:
        raise ValueError(f"a fit needs at least 3 pairs of entropy and reward, got {len(h)} and {len(r)} values")
    if not (np.isfinite(h).all() and np.isfinite(r).all()):
        raise ValueError("entropy and reward must be finite")
    x = np.exp(h)
    if np.ptp(x) == 0:
        raise ValueError(f"a fit needs different entropies, got {h[0]} at every point")
    sigma = None if items is None else 1 / np.sqrt(np.asarray(items, dtype=float))
    (a, b), covariance = optimize.curve_fit(
        lambda x, a, b: b - a * x, x, r, p0=(0, 0), sigma=sigma, jac=lambda x, a, b: np.stack([-x, x**0], axis=1)
    )
    residuals = r - (b - a * x)
    weighted = residuals if sigma is None else residuals / sigma
    power = (weighted**2).sum()
    lag_1 = (weighted[1:] * weighted[:-1]).sum() / power + 2 / len(x) if power > 0 else 0.0
    lag_1 = min(max(lag_1, 0.0), 0.9)
    return Law(
        a=float(a),
        b=float(b),
        covariance=covariance * (1 + lag_1) / (1 - lag_1),
        rmse=float(np.sqrt((residuals**2).mean())),
        points=len(x),
    )


def across_sizes(parameters: Values, laws: Sequence[Law], at: float) -> tuple[float, float]:
    """a and b expected at `at` parameters (the embedding not counted): each a line in log(parameters).

    For models of ONE family, trained on one data set by one recipe; a and b do not carry over between others. Refuses
    laws of fewer than 3 sizes.
    """
    sizes = np.asarray(parameters, dtype=float)
    if len(sizes) != len(laws) or len(set(sizes)) < 3:
        raise ValueError(f"a line over sizes needs laws of at least 3 sizes, got {len(laws)} of {len(set(sizes))}")
    if at <= 0 or sizes.min() <= 0:
        raise ValueError(f"parameters must be positive, got {min(at, sizes.min()):g}")
    slopes, intercepts = np.polyfit(np.log(sizes), [(law.a, law.b) for law in laws], deg=1)
    a, b = intercepts + slopes * math.log(at)
    return float(a), float(b)


def is_falling(steps: Values, entropy: Values) -> bool:
    """Whether entropy falls with the steps by more than its scatter explains."""
    if np.ptp(entropy) == 0:
        return False
    _, _, _, p, _ = stats.linregress(steps, entropy, alternative="less")
    return bool(p < FALLS)  # pyright: ignore[reportOperatorIssue]  (scipy's result has no types)


def step_effect(steps: Values, entropy: Values, reward: Values) -> float:
    """t of the step in a regression of reward on exp(H) and step: by the law, reward knows the step through H alone."""
    s = np.asarray(steps, dtype=float)
    design = np.stack([np.exp(np.asarray(entropy, dtype=float)), np.ones(len(s)), (s - s.mean()) / np.ptp(s)], axis=1)
    y = np.asarray(reward, dtype=float)
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < 3 or len(s) < 4:
        return 0.0
    residuals = y - design @ solution
    variance = (residuals**2).sum() / (len(s) - 3) * np.linalg.inv(design.T @ design)[2, 2]
    noise = np.finfo(float).eps * max(1.0, float(np.abs(y).max()))  # exact data leave residuals of rounding alone
    return float(solution[2] / math.sqrt(variance + noise**2))


def objection_to_fit(steps: Values, entropy: Values, reward: Values, level: float = LEVEL) -> str | None:
    """Why these points cannot carry a forecast, in one sentence; None if they can."""
    if len(steps) < LEAST_POINTS:
        return f"Too few points for the law: {len(steps)}, and at least {LEAST_POINTS} are needed."
    if not is_falling(steps, entropy):
        change = f"{entropy[0]:.3f} nats at step {steps[0]:g}, {entropy[-1]:.3f} at step {steps[-1]:g}"
        return f"The law does not apply: entropy is not falling ({change}), and the law describes entropy being spent."
    spread = float(np.ptp(np.exp(np.asarray(entropy))))
    if spread < LEAST_RANGE:
        return (
            f"The points are nearly flat: exp(entropy) spans {spread:.3f}, and below {LEAST_RANGE} they do not "
            "determine the ceiling."
        )
    low, high = fit_law(entropy, reward).interval_of_a(level)
    if high < 0:
        return f"The law does not apply: reward falls with the entropy (a is in [{low:.2f}, {high:.2f}], not positive)."
    if low <= 0:
        return (
            "The points are nearly flat for their scatter: reward does not change measurably with entropy "
            f"(a is in [{low:.2f}, {high:.2f}], which holds 0)."
        )
    return None


def departure(steps: Values, entropy: Values, reward: Values) -> str | None:
    """Whether a run leaves the curve, in one sentence: entropy is held up in its second half while reward still moves.

    A run that has spent its entropy and rests at its ceiling stays on the curve; so does one that bends a little while
    entropy falls.
    """
    half = len(steps) // 2
    if half < LEAST_POINTS or is_falling(steps[half:], entropy[half:]):
        return None
    effect = step_effect(steps, entropy, reward)
    if abs(effect) < LEAVES:
        return None
    return (
        f"The run leaves the curve: from step {steps[half]:g} on entropy no longer falls (mean "
        f"{np.mean(entropy[half:]):.3f} nats) while reward still moves (t = {effect:.1f} at equal entropy), as under "
        "entropy control, for which the law does not hold."
    )


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the first part of a run says about the rest, and how the rest, as far as it is there, agrees."""

    fitted: int  # points of the first part
    first_step: float
    last_step: float  # of the fitted part
    law: Law | None  # None where the first part cannot be fitted at all
    objection: str | None  # one sentence if the law does not apply; the numbers then mean nothing
    later: int  # points after the fitted part
    later_rmse: float  # of their rewards against the law at their observed entropies; NaN without any
    later_bias: float  # mean of observed minus predicted
    final_error: float  # the same at the last point
    whole: Law | None  # the law of all points: what the forecast ceiling is held against


def forecast(steps: Values, entropy: Values, reward: Values, *, last_step: float, level: float = LEVEL) -> Forecast:
    """Fits the points up to `last_step` and scores the later ones at their observed entropies."""
    first = int(np.searchsorted(steps, last_step, side="right"))
    can_fit = first >= 3 and np.ptp(entropy[:first]) > 0
    law = fit_law(entropy[:first], reward[:first]) if can_fit else None
    objection = objection_to_fit(steps[:first], entropy[:first], reward[:first], level)
    objection = objection or departure(steps, entropy, reward)
    errors = np.array(
        [observed - law.reward_at(h) for h, observed in zip(entropy[first:], reward[first:], strict=True)]
        if law
        else []
    )
    return Forecast(
        fitted=first,
        first_step=steps[0] if first else math.nan,
        last_step=steps[first - 1] if first else math.nan,
        law=law,
        objection=objection,
        later=len(steps) - first,
        later_rmse=float(np.sqrt((errors**2).mean())) if len(errors) else math.nan,
        later_bias=float(errors.mean()) if len(errors) else math.nan,
        final_error=float(errors[-1]) if len(errors) else math.nan,
        whole=fit_law(entropy, reward) if len(steps) > first and law else None,
    )
