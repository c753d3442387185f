"""Entropy-discriminator clipping, the batch-centred Clip_B: Wang et al., 2026, arXiv:2602.03392"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..chain import per_token
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

EQUAL_BELOW = 1e-12  # deviation of S, in nats, below which the authors' code keeps all tokens


@dataclass(frozen=True, kw_only=True)
class DiscriminatorClip(Term):
    """Drops the tokens of bad responses whose push-down would lower the entropy most.

    S_t = p_t (log p_t + H_t), H_t the entropy; raising one logit by e changes the entropy by -e S_t. With the mean and
    the population deviation of S over all response tokens of the step, of either sign of A, a token with A_t < 0 is
    dropped where S_t - mean S < -mu * deviation: a rare token, with S near its lower end. Selected once, at the
    sampling policy, as in the authors' code, which takes the whole batch too.

    S >= -exp(-1 - H), so a token reaches a large mu only where most tokens are nearly certain (S near 0) and the
    deviation is small: on spread distributions nothing is dropped (watch `affected` and `lowest`). Dropped tokens leave
    the denominator: normalise_by "kept" multiplies the advantages of the others by N / N_kept, which is that mean for
    the token-mean losses (dapo, bnpo, cispo, vespo); "all" leaves them as they are.
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    mu: float = 2.5  # in deviations of S, > 0; the authors' code and recipe, the paper sweeps 2.0 to 3.0
    normalise_by: Literal["kept", "all"] = "kept"  # "kept" is the authors'
    is_symmetric: bool = False  # also drop A_t > 0 with S_t - mean S > mu * deviation; inferred, not in the code

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf:
            raise ValueError(f"mu must be positive and finite, got {self.mu}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        logps, entropy = (x.double() for x in rollout.scored())  # log p + H cancels where p is near 1
        s = torch.where(rollout.mask, logps.exp() * (logps + entropy), 0)
        advantages = rollout.everywhere(per_token(rollout.advantages, rollout.mask))
        s, mask = rollout.everywhere(s), rollout.everywhere(rollout.mask)
        count = mask.sum().clamp(min=1)
        z = torch.where(mask, s - s.sum() / count, 0)
        deviation = (z.square().sum() / count).sqrt()
        if deviation < EQUAL_BELOW:
            return RolloutEffect(columns={"weight": rollout.here(mask.float())}, metrics={"lowest": z.new_zeros(())})
        is_kept = mask & ~self._is_outlier(z / deviation, advantages)
        scale = count / is_kept.sum().clamp(min=1) if self.normalise_by == "kept" else 1.0
        lowest = torch.where(mask & (advantages < 0), z / deviation, 0).min()
        return RolloutEffect(columns={"weight": rollout.here(is_kept.float() * scale)}, metrics={"lowest": lowest})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        weight = batch.columns["weight"]
        return Effect(advantages=torch.where(batch.mask, weight * batch.advantages, batch.advantages))

    def _is_outlier(self, z: Float[Tensor, "rows T"], advantages: Float[Tensor, "rows T"]) -> Bool[Tensor, "rows T"]:
        """`z` in deviations; a token at the bound is kept."""
        is_outlier = (advantages < 0) & (z < -self.mu)
        return is_outlier | ((advantages > 0) & (z > self.mu)) if self.is_symmetric else is_outlier
