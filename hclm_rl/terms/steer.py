"""STEER, Stabilizing Token-level Entropy-changE via Reweighting: Hao et al., 2025, arXiv:2510.10150"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.flow import discriminator, mean_discriminator
from ..equations.functional import per_token, quantile
from ..types import Effect, Quantiles, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Steer(Term):
    """Down-weights a token the more, the more its update is estimated to move the entropy, up or down.

    m_t = |A_t / p_old,t * p_t (1 - p_t) (log p_t + H_t)|, H_t the entropy of the sampling policy.
    "exponential": w_t = min_weight^(m_t / M), M = max m, at least `floor`; min_weight at the largest change, 1 at none.
    "linear": from max_weight at the smallest m to min_weight at the largest; the middle where all are equal.

    It stabilises and aims at no level. The estimate lacks one factor p_t and the baseline of the exact first-order
    change -A r (S_t - sum_v p_v S_v), S_v = p_v (log p_v + H), so rare tokens set the scale: one outlier flattens all
    other weights to about 1, and the term vanishes (watch the quantiles of `weight`). estimate "exact" is that change,
    with S of the sampling policy and r = p_t / p_old,t. "linear" mostly raises the step.
    With "step" the scale is taken once, at the sampling policy; a token that moves beyond it keeps min_weight.

    Args:
        estimate: the authors' code; "exact" reads the whole next-token distribution
        weighting: the paper's; "linear" is an alternative in its code
        min_weight: in (0, 1]; the authors' run scripts
        max_weight: of "linear" alone, >= min_weight; the authors' run scripts
        floor: of M, > 0, in units of m (A x nats); the authors' code; of "exponential" alone
        scale_level: quantile of m that gets min_weight, in (0, 1]; 1 is the authors' maximum
        statistics: "micro_batch": as the authors' code, for parity with it

    Metrics:
        largest_change (A x nats): M, the scale: the estimate of the token that moves the entropy most
        weight/q* (weight): quantiles of the tokens' weights. Healthy: q05 clearly below 1. Else: one outlier flattens
            the others; lower `scale_level`
    """

    needs_scores: ClassVar[bool] = True

    estimate: Literal["code", "exact"] = "code"
    weighting: Literal["exponential", "linear"] = "exponential"
    min_weight: float = 0.8
    max_weight: float = 1.2
    floor: float = 0.02
    scale_level: float = 1.0
    statistics: Literal["step", "micro_batch"] = "step"

    def __post_init__(self) -> None:
        if not 0 < self.min_weight <= 1:
            raise ValueError(f"min_weight must be in (0, 1], got {self.min_weight}")
        if not self.min_weight <= self.max_weight < math.inf:
            raise ValueError(f"max_weight must be finite and >= min_weight = {self.min_weight}, got {self.max_weight}")
        if not 0 < self.floor < math.inf:
            raise ValueError(f"floor must be positive and finite, got {self.floor}")
        if not 0 < self.scale_level <= 1:
            raise ValueError(f"scale_level must be in (0, 1], got {self.scale_level}")

    @property
    def needs_vocab(self) -> bool:
        return self.estimate == "exact"

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (mean_discriminator,) if self.estimate == "exact" else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        logps, entropy = rollout.scored()
        columns = {"entropy": torch.where(rollout.mask, entropy, 0)}
        if self.estimate == "exact":
            columns["s"] = torch.where(
                rollout.mask, discriminator(logps, entropy) - rollout.over_vocab(mean_discriminator), 0
            )
        if self.statistics == "micro_batch":
            return RolloutEffect(columns=columns)
        advantages = per_token(rollout.advantages, rollout.mask)
        change = self._change(logps, logps, columns, advantages, rollout.mask)
        smallest, scale = self._range(rollout.everywhere(change), rollout.everywhere(rollout.mask))
        return RolloutEffect(
            columns=columns, shared={"smallest": smallest, "scale": scale}, metrics={"largest_change": scale}
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        change = self._change(batch.logps, batch.old_logps, batch.columns, batch.advantages, batch.mask).detach()
        if self.statistics == "step":
            smallest, scale = batch.shared["smallest"], batch.shared["scale"]
        else:
            smallest, scale = self._range(change, batch.mask)
        weight = self._weight(change, smallest, scale)
        return Effect(
            advantages=torch.where(batch.mask, weight * batch.advantages, batch.advantages),
            metrics={"weight": Quantiles(values=weight)},
        )

    def _change(
        self,
        logps: Float[Tensor, "rows T"],
        old_logps: Float[Tensor, "rows T"],
        columns: Mapping[str, Tensor],
        advantages: Float[Tensor, "rows T"],
        mask: Bool[Tensor, "rows T"],
    ) -> Float[Tensor, "rows T"]:
        """m_t by the estimate that was chosen; 0 off the mask."""
        if self.estimate == "code":
            return entropy_change(logps, old_logps, columns["entropy"], advantages, mask)
        ratio = torch.where(mask, logps - old_logps, 0).exp()
        return (torch.where(mask, advantages, 0) * ratio * columns["s"]).abs()

    def _range(
        self, change: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The smallest change and the one that gets min_weight; 0 where no token counts."""
        values = change[mask]
        if values.numel() == 0:
            return change.new_zeros(()), change.new_zeros(())
        return values.min(), quantile(values, self.scale_level)

    def _weight(
        self, change: Float[Tensor, "B T"], smallest: Float[Tensor, ""], scale: Float[Tensor, ""]
    ) -> Float[Tensor, "B T"]:
        if self.weighting == "exponential":
            steepness = -math.log(self.min_weight) / scale.clamp(min=self.floor)
            return (-steepness * change).exp().clamp(self.min_weight, 1.0)
        if scale <= smallest:
            return torch.full_like(change, (self.min_weight + self.max_weight) / 2)
        share = ((change - smallest) / (scale - smallest)).clamp(0.0, 1.0)
        return self.max_weight - share * (self.max_weight - self.min_weight)


def entropy_change(
    logps: Float[Tensor, "rows T"],
    old_logps: Float[Tensor, "rows T"],
    entropy: Float[Tensor, "rows T"],
    advantages: Float[Tensor, "rows T"],
    mask: Bool[Tensor, "rows T"],
) -> Float[Tensor, "rows T"]:
    """m_t = |A_t / o_t * p_t (1 - p_t) (log p_t + H_t)|, p and o at least 1e-8 as in the authors' code; 0 off the mask.

    The size of the estimated change of the entropy per unit of step, with the log-probs of now and of sampling.
    """
    p = torch.where(mask, logps, 0).exp().clamp(1e-8, 1 - 1e-8)
    o = torch.where(mask, old_logps, 0).exp().clamp(min=1e-8)
    change = torch.where(mask, advantages, 0) / o * p * (1 - p) * (p.log() + torch.where(mask, entropy, 0))
    return change.abs()
