"""EPO, Entropy-regularized Policy Optimization: Xu et al., 2025, arXiv:2509.22576"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import in_double
from ..responses.turns import share_of_turns
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch, Total


@dataclass(frozen=True, kw_only=True)
class Epo(Term):
    """An entropy bonus that is damped where a token leaves a band around the mean entropy of all steps so far.

    Adds -coef (L_H - beta_k L_smooth) to the loss. L_H is the mean of H_t, L_smooth that of alpha P_t,
    P_t = relu(kappa_l Hbar - H_t) + relu(H_t - kappa_r Hbar), both over the tokens of a turn, then over the turns of a
    response, then over responses. Hbar is the mean of the token-mean entropies of the earlier steps, nats, at the
    sampling policy; before there is one P_t = 0. beta_k = 1 + exp(-gamma k / floor(K / 2)) at step k of K.
    A turn is an unbroken run of response tokens between what tools wrote. The net bonus above the band is
    coef (1 - beta_k alpha): it stays a bonus unless beta_k alpha > 1. Hbar leaves out entropies that are not finite;
    `ignored` is their number.

    Args:
        alpha: strength of the penalty, >= 0; the paper's on ALFWorld, 0.05 on ScienceWorld
        kappa_l: the band in units of Hbar, 0 <= kappa_l < kappa_r; the paper's: only the upper side acts
        kappa_r: upper end of that band, in the same units; the paper's
        gamma: decay of beta_k, >= 0; the paper's value
        penalty: "indicator": P_t is 1 outside the band, as in the released code, which has a reference for each turn
            and starts at turn 25; it has no gradient, so the bonus alone trains
        schedule: beta_k of "code", as released: from 1 to 0.0398 at step 150, whatever the length of the run, and
            0.0398 from then on
        average: "tokens": the mean over all tokens, as in the released code

    Attributes:
        default_coef: lambda; the paper's value

    Metrics:
        reference (nats): Hbar, the mean entropy of the earlier steps, from the second step on
        beta (weight): beta_k of the penalty at this step. Healthy: `alpha` beta below 1. Else: above it the bonus is a
            penalty outside the band
        ignored (tokens): number of tokens whose entropy or influence was not finite; they count nothing. Healthy: 0.
            Else: look for infinite logits, as from a mask over the vocabulary
        outside (share): of the tokens outside the band
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"
    default_coef: ClassVar[float] = 0.001

    alpha: float = 0.1
    kappa_l: float = 0.0
    kappa_r: float = 2.0
    gamma: float = 3.0
    penalty: Literal["distance", "indicator"] = "distance"
    schedule: Literal["paper", "code"] = "paper"
    average: Literal["turns", "tokens"] = "turns"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")
        if not 0 <= self.kappa_l < self.kappa_r:
            raise ValueError(f"the band must be 0 <= kappa_l < kappa_r, got {self.kappa_l} and {self.kappa_r}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mask, entropy = rollout.mask, in_double(rollout.scored()[1])
        counted = mask & entropy.isfinite()
        sums = [torch.where(counted, entropy, 0.0).sum(), counted.sum(), mask.sum(), mask.any(dim=1).sum()]
        total, finite, tokens, responses = rollout.total(torch.stack([in_double(each) for each in sums])).tolist()
        shared = {}
        if "steps" in memory:
            shared["reference"] = entropy.new_tensor(memory["entropy_sum"] / memory["steps"])
        if finite:
            memory["entropy_sum"] = memory.get("entropy_sum", 0.0) + total / finite
            memory["steps"] = memory.get("steps", 0) + 1
        weight = in_double(mask)
        if self.average == "turns":
            weight = share_of_turns(mask) * tokens / max(responses, 1.0)  # the trainer divides by the tokens again
        ignored = Total(sums=((mask & ~counted).sum().float(),), form=float)
        return RolloutEffect(columns={"weight": weight.float()}, shared=shared, metrics=shared | {"ignored": ignored})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        entropy = torch.where(batch.mask, batch.entropy, 0.0)
        weight = batch.columns["weight"].to(entropy.dtype)
        if "reference" not in batch.shared:
            return Effect(loss=-weight * entropy)
        lower, upper = (kappa * batch.shared["reference"].to(entropy.dtype) for kappa in (self.kappa_l, self.kappa_r))
        is_outside = ((entropy < lower) | (entropy > upper)).to(entropy.dtype)
        distance = torch.relu(lower - entropy) + torch.relu(entropy - upper)
        penalty = self.alpha * (distance if self.penalty == "distance" else is_outside)
        beta = penalty_weight(batch.step, batch.progress, self.gamma)
        if self.schedule == "code":
            beta = released_penalty_weight(batch.step)
        metrics = {"outside": is_outside, "beta": entropy.new_tensor(beta)}
        return Effect(loss=-weight * (entropy - beta * penalty), metrics=metrics)


def penalty_weight(step: int, progress: float, gamma: float) -> float:
    """beta_k = 1 + exp(-gamma k / floor(K / 2)) at step k = `step` of K = step / progress: from 2 towards 1."""
    steps = round(step / progress) if progress else 0
    return 1 + math.exp(-gamma * step / max(steps // 2, 1))


def released_penalty_weight(step: int) -> float:
    """The released code's weight, with its 150 steps and the jump at their middle: 1 to 0.827, then 0.8 to 0.0398."""
    if step <= 75:
        return 1 - 0.2 * (1 - math.exp(-2 * step / 75))
    return 0.8 * math.exp(-3 * (min(step, 150) - 75) / 75)
