"""Forking tokens: Wang et al., 2025, arXiv:2506.01939"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.selections import largest, quota
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ForkingTokens(Term):
    """Trains only on the most uncertain share of the response tokens: A_t = 0 below the quantile of the entropy.

    Ties at the quantile are kept, so a batch of equal entropies is trained whole; ties "cut" keeps exactly the authors'
    number, of equal ones the first. With statistics "step" the tokens are chosen once, at the sampling policy; the
    authors choose anew in each micro-batch. The paper's mean is over the kept tokens: normalise_by "kept" multiplies
    their advantages by N / N_kept, which is that mean for the losses that divide by the tokens of the step (dapo,
    cispo, vespo), with "micro_batch" for the one that divides by those of the micro-batch (bnpo); "all" is TRL's and
    ms-swift's form, a step about `share` times as large. A KL penalty and an entropy bonus keep acting on all tokens.

    Args:
        share: of the response tokens, in (0, 1]; the paper's value
        normalise_by: "kept": the mean is over the kept tokens, the paper's; "all": over all, as in TRL and ms-swift
        ties: "cut": as the authors' top-k, for parity with it
        statistics: "micro_batch": as the authors' code, for parity with it

    Metrics:
        kept (share): of the tokens that are trained. Healthy: near `share`. Else: near 1 most entropies are equal, as
            where the policy is certain; set ties "cut"
    """

    share: float = 0.2
    normalise_by: Literal["kept", "all"] = "kept"
    ties: Literal["kept", "cut"] = "kept"
    statistics: Literal["step", "micro_batch"] = "step"

    @property
    def needs_scores(self) -> bool:
        return self.statistics == "step"

    def caveats(self) -> list[str]:
        if self.share >= 0.02:
            return []
        return [
            f"share {self.share:g} trains one token in {1 / self.share:.0f}, where the paper has one in 5: most of the "
            "uncertain tokens, which carry its gain, are left out too"
        ]

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        weight = self._weight(rollout.everywhere(rollout.scored()[1]), rollout.everywhere(rollout.mask))
        return RolloutEffect(columns={"weight": rollout.here(weight)})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.statistics == "step":
            weight = batch.columns["weight"]
        else:
            weight = self._weight(batch.entropy.detach(), batch.mask)
        metrics = {"kept": (weight > 0).float()}
        return Effect(advantages=torch.where(batch.mask, weight * batch.advantages, batch.advantages), metrics=metrics)

    def _weight(self, entropy: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "rows T"]:
        """0 on the tokens left out; 1, or N / N_kept, on the others."""
        is_kept = largest(entropy, mask, quota(self.share, mask, "up"), self.ties)
        scale = int(mask.sum()) / is_kept.sum().clamp(min=1) if self.normalise_by == "kept" else 1.0
        return is_kept.float() * scale
