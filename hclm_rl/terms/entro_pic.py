"""EntroPIC, entropy stabilisation with proportional-integral control: 2025, arXiv:2511.15248"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

LARGEST_LOG_RATIO = 20.0  # nats; the authors' code, against an overflow


@dataclass(frozen=True, kw_only=True)
class EntroPic(Term):
    """Reweights confident tokens of good against bad responses, so that the entropy stays at a target.

    Adds alpha s (-r_t |A_t|) to the loss of the tokens with log p_t > log threshold, s = N / N_high: the mean over
    them. alpha is the link's coef, by default a proportional-integral controller of H - target. At such a token a
    positive advantage is weighted 1 + alpha s, a negative one 1 - alpha s: with alpha > 0 confident successes are
    reinforced and confident failures spared, and the entropy falls; with alpha < 0 it rises. Others are untouched.

    That weight is the one for token-mean losses (dapo, bnpo, cispo, vespo). With few confident tokens alpha s passes 1
    and the policy would un-learn what is right: weights "bounded" keeps both weights in [0, 2]. r is not clipped. Where
    most groups have no advantage, alpha has nothing to act on and the integral grows to its bound: watch `affected`. It
    uses |A|, and so goes badly with what zeroes one side, as qae does.

    Args:
        threshold: probability of the sampled token, in [0, 1); the authors' code
        weights: "bounded" is ours; "unbounded": as the authors' code
        denominator: "all": s = 1, which needs no bound; not the authors'
        statistics: of N / N_high; "micro_batch": as the authors' code

    Attributes:
        default_coef: target 0.1 nats, k_p 1, k_i 0.01 and alpha in [-1, 1]: the authors' values, at their temperature
            of 0.6. The rule "lagged" and the anti-windup are ours: theirs are "same_step", by micro-batch and process,
            and none

    Metrics:
        confident (share): of the tokens with a probability above `threshold`. Healthy: not near 0. Else: alpha s passes
            its bound and the control saturates; lower `threshold`
    """

    needs_scores: ClassVar[bool] = True
    default_coef: ClassVar[float | Mapping[str, object]] = {"kind": "proportional_integral", "target": 0.1}
    seeks: ClassVar[Direction | None] = "level"

    threshold: float = 0.95
    weights: Literal["bounded", "unbounded"] = "bounded"
    denominator: Literal["confident", "all"] = "confident"
    statistics: Literal["step", "micro_batch"] = "step"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        counts = torch.stack([rollout.mask.sum(), self._is_confident(rollout.scored()[0], rollout.mask).sum()])
        tokens, confident = in_double(rollout.total(counts))
        return RolloutEffect(
            shared={"scale": tokens / confident.clamp(min=1)},
            metrics={"confident": confident / tokens.clamp(min=1)},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        is_confident = self._is_confident(batch.logps.detach(), batch.mask)
        if self.denominator == "all":
            scale = batch.logps.new_ones(())
        elif self.statistics == "step":
            scale = batch.shared["scale"].to(batch.logps.dtype)
        else:
            scale = batch.mask.sum().to(batch.logps.dtype) / is_confident.sum().clamp(min=1)
        if self.weights == "bounded" and batch.coef:
            scale = scale.clamp(max=1 / abs(batch.coef))
        drift = torch.where(is_confident, batch.logps - batch.old_logps, 0)
        ratio = drift.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
        return Effect(loss=torch.where(is_confident, -scale * ratio * batch.advantages.abs(), 0))

    def _is_confident(self, logps: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Bool[Tensor, "rows T"]:
        return mask & (logps > (math.log(self.threshold) if self.threshold else -math.inf))
