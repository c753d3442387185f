"""Entropy-discriminator clipping, Clip_B and Clip_V: Wang et al., 2026, arXiv:2602.03392"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.flow import discriminator, mean_discriminator
from ..equations.functional import in_double, per_token
from ..equations.selections import quota, smallest
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

EQUAL_BELOW = 1e-12  # deviation of S or D, in nats, below which the authors' code keeps all tokens


@dataclass(frozen=True, kw_only=True)
class DiscriminatorClip(Term):
    """Drops the tokens of bad responses whose push-down would lower the entropy most.

    S_t = p_t (log p_t + H_t), H_t the entropy; raising one logit by e changes the entropy by -e S_t. Selected once, at
    the sampling policy, with population deviations over all response tokens of the step, of either sign of A.
    over "batch" (Clip_B): a token with A_t < 0 is dropped where S_t - mean S < -mu * deviation of S, a rare token.
    over "vocabulary" (Clip_V): D_t = N_t - S_t, N = sum_v p_v S_v, so that D is 0 on average at each position; a token
    with A_t < 0 is dropped where D_t > mu * deviation of D, at most `max_frac` of all, those with the largest D. The
    authors drop tokens with A_t = 0 too, which moves nothing but the denominator; here they stay.

    S >= -exp(-1 - H), so a token reaches a large mu only where most tokens are nearly certain (S near 0) and the
    deviation is small: on spread distributions nothing is dropped (watch `affected` and `lowest`). Dropped tokens leave
    the denominator: normalise_by "kept" multiplies the advantages of the others by N / N_kept, which is that mean for
    the losses that divide by the tokens of the step (dapo, cispo, vespo); "all" leaves them as they are.

    Args:
        over: "vocabulary" reads the whole next-token distribution
        mu: in deviations, > 0; None: 2.5 over the batch (the paper sweeps 2.0 to 3.0), 8.5 over the vocabulary (7.5 to
            8.5); the authors' recipes. D has heavy tails, so the two never share a value.
        max_frac: of all response tokens, in (0, 1], at least one; of "vocabulary" alone; the authors' code; 1: no cap
        normalise_by: "kept" is the authors'
        is_symmetric: also drop A_t > 0 with S_t - mean S > mu * deviation; of "batch" alone; inferred, not in the code

    Metrics:
        lowest (deviations): the least centred S (over the vocabulary: the least -D) among tokens with A < 0. Healthy:
            below -`mu`. Else: nothing is dropped and the method is plain GRPO
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    over: Literal["batch", "vocabulary"] = "batch"
    mu: float | None = None
    max_frac: float = 1e-4
    normalise_by: Literal["kept", "all"] = "kept"
    is_symmetric: bool = False

    def caveats(self) -> list[str]:
        if self.over != "vocabulary" or self.max_frac <= 0.01 or self.max_frac == 1:
            return []
        return [
            f"max_frac {self.max_frac:g} lets {100 * self.max_frac:g} % of the tokens be dropped, where the authors "
            "have 0.01 %: a cap so wide is none; 1 says so"
        ]

    def __post_init__(self) -> None:
        if self.mu is not None and not 0 < self.mu < math.inf:
            raise ValueError(f"mu must be positive and finite, got {self.mu}")
        if not 0 < self.max_frac <= 1:
            raise ValueError(f"max_frac must be in (0, 1], got {self.max_frac}")
        if self.is_symmetric and self.over == "vocabulary":
            raise ValueError("is_symmetric is a form of over='batch', got over='vocabulary'")

    @property
    def needs_vocab(self) -> bool:
        return self.over == "vocabulary"

    @property
    def bound(self) -> float:
        """mu, in deviations."""
        return self.mu if self.mu is not None else {"batch": 2.5, "vocabulary": 8.5}[self.over]

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (mean_discriminator,) if self.over == "vocabulary" else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        logps, entropy = (in_double(x) for x in rollout.scored())  # log p + H cancels where p is near 1
        s = torch.where(rollout.mask, discriminator(logps, entropy), 0)
        if self.over == "vocabulary":
            s = torch.where(rollout.mask, s - rollout.over_vocab(mean_discriminator), 0)
        advantages = rollout.everywhere(per_token(rollout.advantages, rollout.mask))
        s, mask = rollout.everywhere(s), rollout.everywhere(rollout.mask)
        count = mask.sum().clamp(min=1)
        centred = torch.where(mask, s - s.sum() / count, 0)
        deviation = (centred.square().sum() / count).sqrt()
        if deviation < EQUAL_BELOW:
            return RolloutEffect(columns={"weight": rollout.here(mask.float())}, metrics={"lowest": s.new_zeros(())})
        if self.over == "batch":
            s = centred
        is_kept = mask & ~self._is_outlier(s, advantages, mask, self.bound * deviation)
        scale = count / is_kept.sum().clamp(min=1) if self.normalise_by == "kept" else 1.0
        # in deviations; below -mu a token is dropped
        lowest = torch.where(mask & (advantages < 0), s, 0).min() / deviation.clamp(min=EQUAL_BELOW)
        return RolloutEffect(columns={"weight": rollout.here(is_kept.float() * scale)}, metrics={"lowest": lowest})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        weight = batch.columns["weight"]
        return Effect(advantages=torch.where(batch.mask, weight * batch.advantages, batch.advantages))

    def _is_outlier(
        self,
        s: Float[Tensor, "rows T"],
        advantages: Float[Tensor, "rows T"],
        mask: Bool[Tensor, "rows T"],
        bound: Float[Tensor, ""],
    ) -> Bool[Tensor, "rows T"]:
        """`s` is S - mean S or S - N, `bound` in its unit; a token at the bound is kept."""
        is_outlier = mask & (advantages < 0) & (s < -bound)
        if self.is_symmetric:
            is_outlier = is_outlier | (mask & (advantages > 0) & (s > bound))
        if self.over == "vocabulary" and is_outlier.sum() > self.max_frac * mask.sum():
            is_outlier = smallest(s, is_outlier, quota(self.max_frac, mask))
        return is_outlier
