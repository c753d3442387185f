"""Reasoning with Exploration, an entropy perspective: Cheng et al., 2025, arXiv:2506.14758"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import per_token
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ExplorationAdvantage(Term):
    """Trains uncertain tokens of right responses more and those of wrong ones less, by a bounded share of A.

    A'_t = A_t + min(alpha H_t, |A_t| / kappa), H_t the entropy of the next token in nats, without gradient. No sign
    flips and A = 0 stays 0. It is a bonus on A, not on the entropy: a right token that was uncertain becomes likelier,
    which mostly lowers its entropy. The net push is positive, and a later link that centres advantages takes it away.
    Wrong tokens are pushed down less where they are uncertain, so responses grow: watch repetition.

    Args:
        alpha: in advantages a nat, > 0; the authors' for GRPO, 0.1 for PPO. At |A| = 1 and kappa 2 the bound is reached
            at 1.25 nats
        kappa: a share of 1 / kappa of |A| is the most, >= 1; the authors'. One published port has 1, where an uncertain
            wrong token gets exactly 0
        at: whose entropy: "current", the policy as it is, as in the authors' loss; "sampling", one value for all
            updates on a rollout; ours

    Metrics:
        bonus (advantage): what is added to the tokens' advantages, mean. Healthy: well below their mean size. Else:
            lower `alpha`
    """

    alpha: float = 0.4
    kappa: float = 2.0
    at: Literal["current", "sampling"] = "current"

    @property
    def needs_scores(self) -> bool:
        return self.at == "sampling"

    @property
    def shapes_advantages(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (`at` decides)
        return self.at == "sampling"

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {self.alpha}")
        if not 1 <= self.kappa < math.inf:
            raise ValueError(f"kappa must be at least 1, or a wrong token could be paid, and finite, got {self.kappa}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.at == "current":
            return RolloutEffect()
        advantages = per_token(rollout.advantages, rollout.mask)
        bonus = self._bonus(rollout.scored()[1], advantages, rollout.mask)
        return RolloutEffect(advantages=advantages + bonus, metrics={"bonus": bonus})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.at == "sampling":
            return Effect()
        bonus = self._bonus(batch.entropy.detach(), batch.advantages, batch.mask)
        return Effect(advantages=batch.advantages + bonus, metrics={"bonus": bonus})

    def _bonus(
        self, entropy: Float[Tensor, "rows T"], advantages: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]
    ) -> Float[Tensor, "rows T"]:
        """psi; the entropy of a certain token may be below 0 by rounding."""
        bonus = torch.minimum(self.alpha * entropy.clamp(min=0), advantages.abs() / self.kappa)
        return torch.where(mask, bonus, 0.0)
