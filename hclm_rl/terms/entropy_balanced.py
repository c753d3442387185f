"""Entropy-balanced clipping and advantages of AEPO-Agentic: Dong et al., 2025, arXiv:2510.14545"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

EQUAL_BELOW = 1e-6  # nats: a deviation that rounding alone can make


@dataclass(frozen=True, kw_only=True)
class EntropyBalanced(Term):
    """Trains uncertain tokens more, and keeps a bounded gradient on tokens that PPO's upper clip would drop.

    A~_t = A_t (1 + a z_t),  z_t = (H_t - mean H) / deviation H, H_t of the policy as it is, mean and deviation over the
    response tokens of the step at the sampling policy, nats.
    The upper clip becomes (1 + eps_high) r / stopgrad(r): same value of the loss, but a token with r > 1 + eps_high and
    A~ > 0 keeps the gradient (1 + eps_high) A~ instead of none. Above `dual_clip` a token with A~ < 0 has none.
    Both hold for the losses that clip (dapo, grpo, bnpo, dr_grpo) with one ratio a token, and are refused elsewhere in
    a run with several updates per rollout. The kept gradient is averaged
    over all tokens of the step, as in dapo; put the term last, since it reads the advantages that it leaves. Where each
    rollout is used for one update r = 1 and only the advantages change. For wrong answers uncertain tokens are punished
    more; the factor is negative where z < -1 / a. The rollout strategy of the paper is not part of this.

    Args:
        a: strength of the entropy in the advantage, >= 0; the authors' code. 0: the clipping rule alone
        keeps_clipped: whether tokens above the upper clip keep their gradient
        only_uncertain: True: only tokens with z > 0 do, as the paper's text says; its code takes all
        dual_clip: r at which a token with A~ < 0 stops, > 1; the authors'. None: never
        statistics: "micro_batch": as the authors' code, for parity with it

    Metrics:
        kept (share): of the tokens above the upper clip that keep their gradient; 0 where each rollout is used for one
            update
        stopped (share): of the tokens above `dual_clip` with A < 0, which have no gradient
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    a: float = 0.2
    keeps_clipped: bool = True
    only_uncertain: bool = False
    dual_clip: float | None = 3.0
    statistics: Literal["step", "micro_batch"] = "step"

    @property
    def needs_token_clip(self) -> bool:
        return self.keeps_clipped or self.dual_clip is not None

    def __post_init__(self) -> None:
        if not 0 <= self.a < torch.inf:
            raise ValueError(f"a must be >= 0 and finite, got {self.a}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, or None, got {self.dual_clip}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        scale = scale_of(rollout.everywhere(rollout.scored()[1]), rollout.everywhere(rollout.mask))
        return RolloutEffect(shared={"scale": scale})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        entropy = batch.entropy.detach()
        mean, inverse = batch.shared["scale"] if self.statistics == "step" else scale_of(entropy, batch.mask)
        z = torch.where(batch.mask, (in_double(entropy) - mean) * inverse, 0.0).to(entropy.dtype)
        advantages = torch.where(batch.mask, batch.advantages * (1 + self.a * z), 0.0)
        logps = torch.where(batch.mask, batch.logps, 0.0)
        old_logps = torch.where(batch.mask, batch.old_logps, 0.0)
        ratio = (logps.detach() - old_logps).exp()
        upper = 1 + batch.clip_range[1]
        is_kept = batch.mask & (ratio > upper) & (advantages > 0) & self.keeps_clipped
        if self.only_uncertain:
            is_kept = is_kept & (z > 0)
        is_stopped = torch.zeros_like(is_kept)
        if self.dual_clip is not None:
            is_stopped = batch.mask & (ratio > self.dual_clip) & (advantages < 0)
        # the values are those of the clipped loss: what is kept adds 0, what is stopped a constant
        kept = -upper * advantages * (logps - logps.detach())
        loss = torch.where(is_kept, kept, 0.0)
        if self.dual_clip is not None:
            loss = torch.where(is_stopped, -self.dual_clip * advantages, loss)
        return Effect(
            advantages=torch.where(is_stopped, 0.0, advantages),
            loss=loss,
            affected=is_kept,
            metrics={"kept": is_kept.float(), "stopped": is_stopped.float()},
        )


def scale_of(entropy: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "2"]:
    """Mean over the mask and 1 / deviation with n - 1, in double; 1 where all are equal, 0 for a single token."""
    values = in_double(entropy[mask])
    if len(values) < 2:
        return values.new_zeros(2)
    deviation = values.std()
    return torch.stack([values.mean(), 1 / torch.where(deviation > EQUAL_BELOW, deviation, 1.0)])
