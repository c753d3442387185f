"""The KL-reward frontier: Yang et al., 2024, arXiv:2404.01730

The best reward that a policy can have at a divergence KL(pi || ref) (nats, summed over the tokens of a response) is
that of the exponentially tilted reference, per prompt over responses i = 1..n of the reference:

    w_i = softmax(r_i / beta + log ref_i)      reward = sum w_i r_i      KL = sum w_i log(w_i / ref_i)

with ref_i = 1/n for n samples, or the probabilities where the distribution is known: then the frontier is exact. From n
samples no KL above log n can be represented: trust the curve up to log(n) - 1. Over prompts, average at a COMMON beta.
The tilt, best-of-N and their agreement are the paper's theme; the frontier of a 0/1 reward and the efficiency follow
from the data-processing inequality. Everything here is a function of numbers; `eval/frontier.py` measures them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float] | np.ndarray

# from hardly tilted to the best response alone, in units of the largest range of a prompt's rewards
BETAS = np.logspace(2, -2, 60)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A policy as the plot sees it."""

    kl: float  # nats a response
    reward: float


def tilted(rewards: Values, beta: float, probabilities: Values | None = None) -> Point:
    """The optimum of reward - beta KL. `probabilities` of the responses under the reference; 1/n each without.

    Refuses a beta that is not above 0.
    """
    r = np.asarray(rewards, dtype=float)
    reference = _distribution(r, probabilities)
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    possible = reference > 0
    r, log_reference = r[possible], np.log(reference[possible])
    scores = r / beta + log_reference
    log_weights = scores - np.logaddexp.reduce(scores)
    weights = np.exp(log_weights)
    return Point(kl=float(weights @ (log_weights - log_reference)), reward=float(weights @ r))


def _distribution(rewards: np.ndarray, probabilities: Values | None) -> np.ndarray:
    if rewards.ndim != 1 or not len(rewards) or not np.isfinite(rewards).all():
        raise ValueError("rewards must be a row of at least one finite number")
    if probabilities is None:
        return np.full(len(rewards), 1 / len(rewards))
    p = np.asarray(probabilities, dtype=float)
    if p.shape != rewards.shape or (p < 0).any() or not math.isclose(p.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"probabilities must be one a reward, >= 0, with sum 1; got {len(p)} with sum {p.sum():g}")
    return p


def exact(rewards: Values, reference: Values, policy: Values) -> Point:
    """A policy whose distribution over the responses is known: KL(policy || reference) and its reward."""
    r = np.asarray(rewards, dtype=float)
    q, p = _distribution(r, reference), _distribution(r, policy)
    some = p > 0
    with np.errstate(divide="ignore"):  # infinite where the reference rules out what the policy does
        return Point(kl=float((p[some] * np.log(p[some] / q[some])).sum()), reward=float(p @ r))


def frontier(
    prompts: Sequence[Values], betas: Values | None = None, probabilities: Sequence[Values] | None = None
) -> list[Point]:
    """Means over the prompts, KL ascending: the base itself at KL 0, then the optimum of the pooled problem a beta.

    Without `betas` those of BETAS, on the scale of the rewards. Refuses no prompt.
    """
    if not prompts:
        raise ValueError("prompts must hold the rewards of at least one prompt, got none")
    given = probabilities or [None] * len(prompts)
    rows = [np.asarray(rewards, dtype=float) for rewards in prompts]
    means = [float(_distribution(row, p) @ row) for row, p in zip(rows, given, strict=True)]
    if betas is None:
        possible = [row if p is None else row[np.asarray(p) > 0] for row, p in zip(rows, given, strict=True)]
        betas = BETAS * (max(float(np.ptp(row)) for row in possible) or 1.0)
    curve = [Point(kl=0.0, reward=_mean(means))]
    for beta in sorted(betas, reverse=True):
        points = [tilted(rewards, beta, p) for rewards, p in zip(rows, given, strict=True)]
        curve.append(Point(kl=_mean([point.kl for point in points]), reward=_mean([point.reward for point in points])))
    return curve


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def reward_at(curve: Sequence[Point], kl: float) -> float:
    """The frontier's reward at a KL, linear between its points and flat outside: a little low, as it is concave."""
    return float(np.interp(kl, [point.kl for point in curve], [point.reward for point in curve]))


def reliable_kl(samples: int) -> float:
    """log(n) - 1: beyond it the tilt of n samples mostly copies the best one. Refuses n below 1."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return math.log(samples) - 1


def best_of(rewards: Values, n: int) -> float:
    """E[max of n of the samples, drawn without replacement] = sum_j r_(j) C(j-1, n-1) / C(len, n), r ascending.

    Refuses n below 1 or above the samples.
    """
    r = sorted(rewards)
    if not 1 <= n <= len(r):
        raise ValueError(f"n must be in [1, {len(r)}] (samples at hand), got {n}")
    total = math.comb(len(r), n)
    return sum(value * (math.comb(j, n - 1) / total) for j, value in enumerate(r))


def best_of_kl_bound(n: int) -> float:
    """log n - (n - 1) / n: best-of-n's KL for rewards without ties, and too high by up to 3 times for 0/1 rewards.

    Refuses n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_levels(levels: Values, probabilities: Values, n: int) -> tuple[Point, list[float]]:
    """Best-of-n where each reward level has a probability: exact KL and reward, and the chosen level's distribution.

    P(level v is chosen) = F_v^n - F_{v-1}^n, F the distribution function; levels in the order given. Refuses equal
    levels, and n below 1.
    """
    level = np.asarray(levels, dtype=float)
    q = _distribution(level, probabilities)
    if len(set(level.tolist())) < len(level) or n < 1:
        raise ValueError(f"levels must differ and n be at least 1, got {list(levels)} and {n}")
    order = np.argsort(level)
    cumulative = np.minimum(np.cumsum(q[order]), 1.0)
    chosen = np.empty(len(level))
    chosen[order] = np.diff(cumulative**n, prepend=0.0)
    some = chosen > 0
    kl = float((chosen[some] * np.log(chosen[some] / q[some])).sum())
    return Point(kl=kl, reward=float(chosen @ level)), chosen.tolist()


def least_kl(accuracy: float, base_accuracy: float) -> float:
    """KL_min(a) = a log(a / p) + (1 - a) log((1 - a) / (1 - p)) >= 0: the whole frontier of a 0/1 reward.

    Infinite where the base never (p = 0) or always (p = 1) succeeds and the policy does otherwise. Best-of-n lies on
    it, at a = 1 - (1 - p)^n. Refuses shares outside [0, 1].
    """
    for name, value in (("accuracy", accuracy), ("base_accuracy", base_accuracy)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")

    def part(a: float, p: float) -> float:
        return 0.0 if a == 0 else math.inf if p == 0 else a * math.log(a / p)

    return part(accuracy, base_accuracy) + part(1 - accuracy, 1 - base_accuracy)


def efficiency(accuracy: float, base_accuracy: float, kl: float) -> float:
    """KL_min / KL: the share of the divergence that bought accuracy; the rest is style, length, or lost entropy.

    In [0, 1] for a true KL; above 1, the KL was measured on the wrong mask or against a reference that has moved. NaN
    where nothing moved.
    """
    least = least_kl(accuracy, base_accuracy)
    if math.isnan(kl):
        return math.nan
    if kl > 0:
        return least / kl
    return math.nan if least == 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A policy against the best possible one from the same samples of the base, over prompts."""

    prompts: int
    kl: float  # mean over prompts, nats a response
    reward: float
    best_reward: float  # the frontier's at that KL
    gap: float  # best_reward - reward
    is_reliable: bool  # whether the KL is within what the samples of the base can represent
    efficiency: float  # sum of least KLs / sum of KLs over prompts with 0 < p < 1; NaN unless rewards are 0 or 1
    never: int  # prompts that no sample of the base solved: their least KL is infinite, they are left out
    expanded: int  # of these, solved by the policy
    always: int  # prompts that every sample of the base solved, left out too


def distance(base: Sequence[Values], policy: Sequence[Values], kls: Sequence[float]) -> Distance:
    """`base` and `policy`: rewards of samples, prompt by prompt; `kls`: KL(policy || base) of each prompt.

    Least KLs are taken prompt by prompt: that of mean accuracies understates them (convexity). Accuracies of finite
    samples make them too high by about 1 / samples: take 64 or more of each. Refuses no prompt, and lists that differ
    in length.
    """
    if not len(base) == len(policy) == len(kls) or not base:
        sizes = f"{len(base)}, {len(policy)} and {len(kls)}"
        raise ValueError(f"base, policy and kls must be of the same prompts, at least one, got {sizes}")
    before, after = ([float(np.mean(rewards)) for rewards in of] for of in (base, policy))
    kl, reward = _mean(kls), _mean(after)
    best = reward_at(frontier(base), kl)
    is_binary = all(set(np.unique(rewards)) <= {0.0, 1.0} for rewards in (*base, *policy))
    counted = [i for i, p in enumerate(before) if 0 < p < 1] if is_binary else []
    spent = sum(kls[i] for i in counted)
    least = sum(least_kl(after[i], before[i]) for i in counted)
    never = [i for i, p in enumerate(before) if p == 0] if is_binary else []
    return Distance(
        prompts=len(base),
        kl=kl,
        reward=reward,
        best_reward=best,
        gap=best - reward,
        is_reliable=kl <= reliable_kl(min(map(len, base))),
        efficiency=least / spent if spent > 0 else math.nan,
        never=len(never),
        expanded=sum(after[i] > 0 for i in never),
        always=sum(p == 1 for p in before) if is_binary else 0,
    )
