"""What the leaderboard computes from counts: pass@k over k, intervals, paired differences, many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import scipy.integrate
import scipy.stats
from jaxtyping import Float, Int
from numpy import ndarray

from hclm_rl.responses.outcomes import pass_at_k

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST_SEEDS = 3  # for a test
SIGNIFICANT = 0.05  # after Holm's correction
UP, DOWN = "▲", "▼"  # differs from the reference


@dataclass(frozen=True, kw_only=True)
class Interval:
    mean: float
    low: float
    high: float

    def written(self, digits: int, sign: str = "") -> str:
        """ "0.512 [0.490, 0.531]"; without brackets where the interval is not known."""
        mean = f"{self.mean:{sign}.{digits}f}"
        return mean if np.isnan(self.low) else f"{mean} [{self.low:{sign}.{digits}f}, {self.high:{sign}.{digits}f}]"


@dataclass(frozen=True, kw_only=True)
class Difference(Interval):
    """Ours minus plain GRPO's on the same seeds and prompts."""

    p: float  # two-sided, of no difference; NaN with fewer than three seeds


def pass_curve(correct: Int[ndarray, "S P"], samples: int, ks: Sequence[int]) -> Float[ndarray, "K S P"]:
    """pass@k of each seed and prompt from the number of right answers among `samples`."""
    return np.array([_pass_of_count(samples, k) for k in ks])[:, correct]


@cache  # thousands of curves have the same few
def _pass_of_count(samples: int, k: int) -> Float[ndarray, "samples+1"]:
    return np.array([pass_at_k(samples, c, k) for c in range(samples + 1)])


def area_over_log_k(curve: Float[ndarray, "K *any"], ks: Sequence[int]) -> Float[ndarray, "*any"]:
    """Area under pass@k over log k by the trapezoidal rule, divided by the width log(K_max / K_min): in [0, 1]."""
    x = np.log2(ks)
    return scipy.integrate.trapezoid(curve, x=x, axis=0) / (x[-1] - x[0])


def bootstrap_interval(values: Float[ndarray, "S P"], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean, and the 95 % percentile interval when seeds and prompts are both drawn anew, independently.

    A resample takes S seeds and P prompts with replacement and all their crossings. With few seeds it is too narrow (by
    about sqrt(1 - 1/S) in the part that comes from seeds).
    """
    of_seed, of_prompt = _draws(*values.shape, seed, resamples)
    means = (of_seed * (of_prompt @ values.T)).sum(axis=1) / values.size
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))


@lru_cache(maxsize=4)  # the same for all rows of a board that have as many seeds; drawing them is most of the work
def _draws(
    seeds: int, prompts: int, seed: int, resamples: int
) -> tuple[Float[ndarray, "resamples S"], Float[ndarray, "resamples P"]]:
    """How often each resample has each seed and each prompt."""
    source = np.random.default_rng(seed)
    of_seed = source.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    of_prompt = source.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    return of_seed.astype(float), of_prompt.astype(float)


def paired_difference(ours: Float[ndarray, "S P"], plain: Float[ndarray, "S P"]) -> Difference:
    """Two-way random effects: the difference varies with the seed, with the prompt, and with both.

    Var(mean) = (MS_seed + MS_prompt - MS_rest) / (S P), at least the larger of the two alone; degrees of freedom by
    Satterthwaite; t interval and two-sided p. Simulated rate of p < 0.05 where there is no difference, over spreads
    between seeds from none to large: 3 to 6 % with 5 seeds, up to 9 % with 3, up to 13 % with 2, which is why fewer
    than 3 seeds give no p and no interval.
    """
    difference = ours - plain
    seeds, prompts = difference.shape
    mean = float(difference.mean())
    if seeds < FEWEST_SEEDS or prompts < 2:
        return Difference(mean=mean, low=math.nan, high=math.nan, p=math.nan)
    of_seed, of_prompt = difference.mean(axis=1), difference.mean(axis=0)
    rest = difference - of_seed[:, None] - of_prompt[None, :] + mean
    freedom = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    squares = np.array(
        [
            prompts * ((of_seed - mean) ** 2).sum(),
            seeds * ((of_prompt - mean) ** 2).sum(),
            (rest**2).sum(),
        ]
    )
    ms_seed, ms_prompt, ms_rest = parts = squares / freedom
    summed = max(ms_seed + ms_prompt - ms_rest, ms_seed, ms_prompt)
    if summed == 0:
        return Difference(mean=mean, low=mean, high=mean, p=1.0 if mean == 0 else 0.0)
    error = math.sqrt(summed / (seeds * prompts))
    degrees = summed**2 / (parts**2 / freedom).sum()
    width = float(scipy.stats.t.ppf((1 + LEVEL) / 2, degrees)) * error
    p = 2 * float(scipy.stats.t.sf(abs(mean) / error, degrees))
    return Difference(mean=mean, low=mean - width, high=mean + width, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given; NaN (no test yet) stays NaN and counts, as a test that fails would.

    Who is tested may have been chosen by what was seen: leaving the others out would make the family too small.
    """
    p = np.asarray(p_values, dtype=float)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = len(p) - np.arange(len(order))
    adjusted = p.copy()
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted.tolist()
