"""Pass@k advantages, Pass@k Training and PKPO: 2025, arXiv:2508.10751, arXiv:2505.15201"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..equations.functional import in_double
from ..responses.outcomes import pass_at_k
from ..responses.right_answers import is_right, successes, tell_of_unclear_rewards
from ..types import Rollout, RolloutEffect, Term

EPS = 1e-6  # of the authors' code; on the deviation of the pass@k of random groups, at most 1/2

Form = Literal["analytic", "loo_minus_one", "loo", "raw"]


@dataclass(frozen=True, kw_only=True)
class PasskAdvantage(Term):
    """Trains for "at least one of k samples is right": hard prompts weigh more, those with n - c < k not at all.

    "analytic", c of n responses right, exact over all groups of k of them: rho = 1 - C(n-c, k) / C(n, k),
    sigma = sqrt(rho (1 - rho)) + 1e-6,

        A_right = (1 - rho) / sigma    A_wrong = (1 - rho - C(n-c-1, k-1) / C(n-1, k-1)) / sigma

    which sum to 0; k = 1 is GRPO with the population deviation. The others are PKPO's, for any rewards g, unbiased for
    the gradient of the expected best of k; over the subsets I of size k, A_i = (n / k) s_i (the scale is ours),

        raw            s_i = sum over I with i of max g(I), over C(n, k); the mean of A is the best of k itself
        loo            s_i less the mean of the others' s among themselves: needs k < n
        loo_minus_one  s_i = sum over I with i of max g(I) - max g(I without i), over C(n, k); k = 1: A_i = g_i - mean g

    loo_minus_one, PKPO's own choice, is never negative (k > 1): wrong answers get no push. Only "analytic" sums to 0: a
    later link that centres or whitens changes the method. With k = n / 2 no analytic A passes 1, with k = n all are 0.
    A response that nothing scored counts neither as right nor in n, and where n < k the group moves nothing. Where the
    papers lower k was not read, so the schedule is ours.

    Args:
        form: "analytic": 0/1 rewards; PKPO's forms: any
        k: at least 1, at most num_generations; with 8 of them 4 is a baseline's of other authors
        switch: progress of the training, in (0, 1), from which k is `k_end`; None: k all the way; ours
        k_end: at least 1; 1 is plain pass@1 training; ours
        right_at: of "analytic", the reward from which a response is right; None: 1, with a warning where rewards are
            not 0 or 1

    Metrics:
        k (tries): of pass@k, in this step
        silent (share): of the responses whose advantage is 0. Healthy: below 1. Else: at 1 nothing is learnt: lower `k`
    """

    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    form: Form = "analytic"
    k: int = 4
    switch: float | None = None
    k_end: int = 1
    right_at: float | None = None

    def __post_init__(self) -> None:
        for name in ("k", "k_end"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.switch is not None and not 0 < self.switch < 1:
            raise ValueError(f"switch must be in (0, 1) or None, got {self.switch}")
        if self.right_at is not None and self.form != "analytic":
            raise ValueError(f'right_at belongs to form: analytic, "{self.form}" takes any reward, got {self.right_at}')

    @property
    def least_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (k decides)
        k = self.k if self.switch is None else max(self.k, self.k_end)
        return k + 1 if self.form == "loo" else k

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        k = self.k if self.switch is None or rollout.progress < self.switch else self.k_end
        groups = rollout.everywhere(rollout.rewards).view(-1, rollout.group_rewards.size(1))
        if self.form == "analytic":
            tell_of_unclear_rewards("passk_advantage", rollout, self.right_at, memory)
            advantages = analytic(groups, k, self.right_at)
        else:
            advantages = best_of_k(groups, k, self.form)
        silent = (advantages == 0).all(dim=1)
        return RolloutEffect(
            advantages=rollout.here(advantages.flatten()).to(rollout.rewards),
            metrics={"k": groups.new_tensor(k), "silent": in_double(silent).mean()},
        )


def analytic(groups: Float[Tensor, "P G"], k: int, right_at: float | None) -> Float[Tensor, "P G"]:
    """The advantages of Pass@k Training."""
    right, (c, n) = is_right(groups, right_at), successes(groups, right_at)
    pairs = [analytic_pair(*each, k) for each in zip(n.tolist(), c.tolist(), strict=True)]
    of_right, of_wrong = groups.new_tensor(pairs).view(-1, 2, 1).unbind(dim=1)
    return torch.where(groups.isnan(), 0.0, torch.where(right, of_right, of_wrong))


@functools.cache
def analytic_pair(n: int, c: int, k: int) -> tuple[float, float]:
    """(A_right, A_wrong) of c right among n; 0 where none is right, or where k of the n always hold a right one."""
    if c == 0 or n - c < k:
        return 0.0, 0.0
    rho = pass_at_k(n, c, k)
    of_others = pass_at_k(n - 1, c, k - 1) if k > 1 else 0.0  # what a wrong response's group has without it
    sigma = math.sqrt(rho * (1 - rho)) + EPS
    return (1 - rho) / sigma, (of_others - rho) / sigma


def best_of_k(groups: Float[Tensor, "P G"], k: int, form: Form) -> Float[Tensor, "P G"]:
    """(n / k) s of PKPO, by sorting: the i-th reward from 0 is the best of C(i, k-1) of the subsets."""
    counts = (~groups.isnan()).sum(dim=1)
    found = torch.zeros_like(in_double(groups))
    for n in counts.unique().tolist():
        if n < k + (form == "loo"):
            continue
        rows = (counts == n).nonzero().squeeze(1)
        ordered, order = in_double(groups[rows]).sort(dim=1, stable=True)  # NaN last
        s = torch.zeros_like(ordered)
        s[:, :n] = (n / k) * of_sorted(ordered[:, :n], k, form)
        found[rows] = torch.zeros_like(s).scatter(1, order, s)
    return found


def of_sorted(g: Float[Tensor, "P n"], k: int, form: Form) -> Float[Tensor, "P n"]:
    """s of rewards in ascending order."""
    n, subsets = g.size(1), math.comb(g.size(1), k)
    if form == "loo_minus_one":
        if k == 1:
            return (g - g.mean(dim=1, keepdim=True)) / n
        g = g - g[:, :1]  # which changes nothing, and equal rewards give 0 to the last digit
        runner_up = g.new_tensor([math.comb(j, k - 2) / subsets for j in range(n)]) * g
        return best_among(g, k) - (runner_up.cumsum(dim=1) - runner_up)
    with_better = g.new_tensor([math.comb(j - 1, k - 2) / subsets if j and k > 1 else 0.0 for j in range(n)]) * g
    raw = best_among(g, k) + with_better.flip(1).cumsum(dim=1).flip(1) - with_better
    if form == "raw":
        return raw
    rho = best_among(g, k).sum(dim=1, keepdim=True)
    return raw - (rho - raw) * (k / (n - 1)) * (n / (n - k))  # k times the others' own best of k, over n - 1


def best_among(g: Float[Tensor, "P n"], k: int) -> Float[Tensor, "P n"]:
    """Each reward times the share of the subsets of size k of which it is the best; their sum is the best of k."""
    subsets = math.comb(g.size(1), k)
    return g.new_tensor([math.comb(i, k - 1) / subsets for i in range(g.size(1))]) * g
