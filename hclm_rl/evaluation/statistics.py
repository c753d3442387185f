"""Estimators over problems: intervals, empirical support, and what a change of answer entropy is made of.

Definitions: the Invisible Leash, 2025, arXiv:2507.14843 (support), Chen et al., 2021, arXiv:2107.03374 (pass@k).
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from hclm_rl.responses.outcomes import Answers

RESAMPLES = 10_000  # of the bootstrap
NUMBERS_AT_ONCE = 4_000_000  # of a bootstrap's resamples in memory


def interval(
    values: Float[np.ndarray, "*Q P"], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, "*Q"], Float[np.ndarray, "*Q"]]:
    """Percentile bootstrap interval of the mean over P problems; every quantity sees the same resamples of problems.

    NaN for fewer than two problems, which say nothing of how problems differ.
    """
    problems = values.shape[-1]
    if problems < 2:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown
    found = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        method="percentile",  # BCa has no answer where all problems are alike
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, NUMBERS_AT_ONCE // max(1, values.size)),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return np.asarray(found.low), np.asarray(found.high)


def simultaneous_band(
    values: Float[np.ndarray, "K P"], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """A band that holds all K means over P problems at once, with the given confidence: mean -+ q standard errors.

    q is the quantile of max_k |mean*_k - mean_k| / error_k over resamples of problems (sup-t; Montiel Olea and
    Plagborg-Moller, 2019). A row whose problems are all alike is a point. NaN for fewer than two problems.
    """
    unknown = np.full(len(values), np.nan)
    if values.shape[-1] < 2:
        return unknown, unknown
    means = values.mean(axis=-1)
    drawn = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        method="percentile",
        n_resamples=resamples,
        batch=max(1, NUMBERS_AT_ONCE // max(1, values.size)),
        rng=np.random.default_rng(seed),
    )
    errors = np.asarray(drawn.standard_error)
    varies = errors > 1e-12  # shares of problems; below it is rounding
    off = np.abs(drawn.bootstrap_distribution - means[:, None])[varies] / errors[varies, None]
    reach = np.where(varies, np.quantile(off.max(axis=0), confidence) * errors if varies.any() else 0.0, 0.0)
    return means - reach, means + reach


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over problems with its 95 % interval."""

    mean: float
    lower: float
    upper: float

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.lower > 0

    @property
    def is_negative(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.upper < 0


def estimate(values: Float[np.ndarray, "P"], *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Over the problems on which the quantity is defined, that is not NaN."""
    known = values[~np.isnan(values)]
    if not known.size:
        return Estimate(mean=math.nan, lower=math.nan, upper=math.nan)
    lower, upper = interval(known, resamples=resamples, seed=seed)
    return Estimate(mean=float(known.mean()), lower=float(lower), upper=float(upper))


@dataclass(frozen=True, kw_only=True)
class Support:
    """Problems whose right answer occurs at least once in k samples: of both models, of one alone, of neither.

    gained and lost hold sampling noise: for equal chances p the chance of a spurious gain is up to 1/4. Read mcnemar.
    """

    samples: int  # k
    kept: int  # P, both
    gained: int  # E, the trained model only
    lost: int  # S, the base only
    neither: int  # O

    @property
    def retention(self) -> float:
        """SRR = P / (P + S)"""
        return self.kept / (self.kept + self.lost) if self.kept + self.lost else math.nan

    @property
    def discovery(self) -> float:
        """NDR = E / (P + E)"""
        return self.gained / (self.kept + self.gained) if self.kept + self.gained else math.nan

    @property
    def dynamic(self) -> float:
        """SDS = 2 P E / (P^2 + 2 P E + E S), the harmonic mean of SRR and NDR; 0 where either is not defined"""
        p, e, s = self.kept, self.gained, self.lost
        below = p * p + 2 * p * e + e * s
        return 2 * p * e / below if below else 0.0

    @property
    def net_change(self) -> float:
        """NSCR = (E - S) / (P + E + S)"""
        covered = self.kept + self.gained + self.lost
        return (self.gained - self.lost) / covered if covered else math.nan

    @property
    def mcnemar(self) -> float:
        """p of the exact binomial test of E among E + S at 1/2, two-sided; 1 where nothing changed."""
        changed = self.gained + self.lost
        return float(stats.binomtest(self.gained, changed, 0.5).pvalue) if changed else 1.0

    @property
    def detectable(self) -> float:
        """What is not seen in k samples has, with confidence 95 %, a probability of at most this."""
        return 1 - 0.05 ** (1 / self.samples)


def support(base: Bool[np.ndarray, "P"], trained: Bool[np.ndarray, "P"], *, samples: int) -> Support:
    """`base[i]`, `trained[i]`: whether the model gave a right answer to problem i in any of `samples` responses."""
    return Support(
        samples=samples,
        kept=int((base & trained).sum()),
        gained=int((~base & trained).sum()),
        lost=int((base & ~trained).sum()),
        neither=int((~base & ~trained).sum()),
    )


def binary_entropy(p: float) -> float:
    """h_b(p) = -p log p - (1 - p) log (1 - p), nats."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


@functools.lru_cache(maxsize=200_000)
def _expected_surprise(total: int, count: int, draws: int) -> float:
    """E[-(i/m) log(i/m)], i = how often an answer with `count` of `total` comes up in m = `draws` of them"""
    ways = math.comb(total, draws)
    return sum(
        math.comb(count, i) * math.comb(total - count, draws - i) / ways * (i / draws) * math.log(draws / i)
        for i in range(max(1, draws - total + count), min(count, draws) + 1)
    )


def rarefied_entropy(answers: Answers, draws: int) -> float:
    """Expected answer entropy of `draws` of the answers, drawn without replacement; nats. Exact.

    The entropy of few answers is biased low, so two sets are compared at the size of the smaller one. Refuses fewer
    than 1 draw, and more than there are answers.
    """
    if not 1 <= draws <= len(answers):
        raise ValueError(f"draws must be in [1, {len(answers)}] (answers at hand), got {draws}")
    return sum(_expected_surprise(len(answers), count, draws) for count in Counter(answers).values())


@dataclass(frozen=True, kw_only=True)
class EntropySplit:
    """H = h_b(p) + p H_right + (1 - p) H_wrong, nats; exact. With one right answer H_right is 0."""

    accuracy: float  # p
    right: float | None  # entropy among the right answers; None where there are none
    wrong: float | None  # among the wrong ones, unread ones included

    @property
    def total(self) -> float:
        """H = h_b(p) + p H_right + (1 - p) H_wrong, in nats."""
        within = self.accuracy * (self.right or 0.0) + (1 - self.accuracy) * (self.wrong or 0.0)
        return binary_entropy(self.accuracy) + within


def entropy_change(base: EntropySplit, trained: EntropySplit) -> tuple[float, float]:
    """(sharpening, diversity): what p alone does to the answer entropy, and what H_right and H_wrong do. Exact.

    sharpening = change of h_b + change of p x mean (H_right - H_wrong); diversity = mean p x change of H_right +
    mean (1 - p) x change of H_wrong. A part that one model does not have (no wrong answer left) counts as unchanged.
    """
    change, mean = trained.accuracy - base.accuracy, (trained.accuracy + base.accuracy) / 2
    rights, wrongs = _both(base.right, trained.right), _both(base.wrong, trained.wrong)
    sharpening = binary_entropy(trained.accuracy) - binary_entropy(base.accuracy)
    sharpening += change * (sum(rights) - sum(wrongs)) / 2
    return sharpening, mean * (rights[1] - rights[0]) + (1 - mean) * (wrongs[1] - wrongs[0])


def _both(first: float | None, second: float | None) -> tuple[float, float]:
    known = next((each for each in (first, second) if each is not None), 0.0)
    return known if first is None else first, known if second is None else second


def without_nan(value: object) -> object:
    """The same JSON value with null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
