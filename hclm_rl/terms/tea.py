"""TEA, token-wise entropy-adaptive regulariser of Light-IF: Qihoo 360, 2025, arXiv:2508.03178"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.flow import step_covariances
from ..equations.functional import covariance_contributions, masked_mean
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Tea(Term):
    """An entropy bonus that goes to the tokens whose update is about to lower the entropy.

    Adds -coef w_t H_t, in nats, to the loss of every token: w_t = min(factor softmax(cov)_t, cap), the softmax over the
    tokens of a response, cov_t = (A_t - mean A)(log p_t - mean log p) with the means over all tokens of the step, at
    the sampling policy. w is a constant for the gradient; `weight_gradient` lets it through, as the authors' code does.

    The weights of a response sum to `factor` whatever its length, so in a long one the bonus is about factor H / T a
    token; scale "length" multiplies them by T / factor, which makes their mean 1 where none is capped. Where |cov| is
    far below 1 the softmax is flat and this is a plain bonus. The raised tokens include improbable ones of bad
    responses: with a clip range that favours them the entropy can run away. The authors' public scripts do not run it,
    so treat its strength as untuned.

    Args:
        factor: sum of a response's weights, > 0; the authors' code
        cap: largest weight before the scale, > 0; the authors' code
        scale: "length": for responses of thousands of tokens
        statistics: "micro_batch": as the authors' code, for parity with it
        weight_gradient: with "micro_batch" alone: the log-probs are trained through w too, mean A and mean log p being
            constants; the authors' code

    Attributes:
        default_coef: lambda; the authors' code, for scale "response"; a third party has 0.05

    Metrics:
        weight (weight): mean weight of a token's entropy
    """

    needs_scores: ClassVar[bool] = True
    default_coef: ClassVar[float] = 1.0
    seeks: ClassVar[Direction | None] = "more"

    factor: float = 10.0
    cap: float = 5.0
    scale: Literal["response", "length"] = "response"
    statistics: Literal["step", "micro_batch"] = "step"
    weight_gradient: bool = False

    def __post_init__(self) -> None:
        if self.weight_gradient and self.statistics == "step":
            raise ValueError(
                "weight_gradient needs weights of the current policy, statistics='micro_batch': those of the step are "
                "of the sampling policy, which is a constant"
            )
        for name in ("factor", "cap"):
            if not 0 < vars(self)[name] < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {vars(self)[name]}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        cov, mask = step_covariances(rollout)
        return RolloutEffect(columns={"weight": rollout.here(self._weight(cov, mask))})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.statistics == "step":
            weight = batch.columns["weight"]
        else:
            cov = covariance_contributions(batch.logps, batch.advantages, batch.mask)
            if self.weight_gradient:
                advantages = torch.where(batch.mask, batch.advantages - masked_mean(batch.advantages, batch.mask), 0)
                cov = cov + torch.where(batch.mask, advantages * (batch.logps - batch.logps.detach()), 0)
            weight = self._weight(cov, batch.mask)
        entropy = torch.where(batch.mask, batch.entropy, 0)
        return Effect(loss=-weight * entropy, metrics={"weight": weight.detach()})

    def _weight(self, cov: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "rows T"]:
        """w_t, 0 off the mask; a response without tokens has none."""
        share = torch.where(mask, torch.where(mask, cov, -math.inf).softmax(dim=1), 0)
        weight = (self.factor * share).clamp(max=self.cap)
        return weight * mask.sum(dim=1, keepdim=True) / self.factor if self.scale == "length" else weight
