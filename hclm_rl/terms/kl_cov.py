"""KL-Cov: Cui et al., 2025, arXiv:2505.22617"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.flow import step_covariances
from ..equations.functional import covariance_contributions
from ..equations.selections import largest, quota
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class KlCov(Term):
    """Pulls the tokens with the highest covariance of log-prob and advantage back to the sampling policy.

    Adds beta * |log p_t - log p_old,t| to the loss of the max(1, floor(ratio N)) tokens with the largest
    cov_t = (A_t - mean A)(log p_t - mean log p). The pull has constant size, however far the token moved. It does
    nothing where each rollout is used for one update, since p is then p_old. The authors run it without PPO's clip: set
    `epsilon` large for that. With log-probs of an inference engine as p_old it is noise of size beta.

    Args:
        ratio: of all response tokens, in (0, 1]; the paper's for 32B, 2e-3 for 7B (their code takes percent)
        beta: >= 0; the paper's value
        statistics: "micro_batch": as the authors' code, for parity with it

    Metrics:
        selected (share): of the tokens that are pulled back. Healthy: `ratio`, or one token where that is none
    """

    inert_on_policy: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    ratio: float = 2e-4
    beta: float = 1.0
    statistics: Literal["step", "micro_batch"] = "step"

    @property
    def needs_scores(self) -> bool:
        return self.statistics == "step"

    def caveats(self) -> list[str]:
        if self.ratio <= 0.02:
            return []
        return [
            f"ratio {self.ratio:g} is a fraction: it pulls {100 * self.ratio:g} % of all tokens back, where the paper "
            "has 2e-4 for 32B and 2e-3 for 7B; its code takes percent, where 0.2 means 2e-3 here"
        ]

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is a fraction in (0, 1], not a percentage, got {self.ratio}")
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, got {self.beta}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        cov, mask = step_covariances(rollout)
        return RolloutEffect(columns={"is_penalised": rollout.here(largest(cov, mask, quota(self.ratio, mask)))})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.statistics == "step":
            is_penalised = batch.columns["is_penalised"]
        else:
            cov = covariance_contributions(batch.logps, batch.advantages, batch.mask)
            is_penalised = largest(cov, batch.mask, quota(self.ratio, batch.mask))
        drift = torch.where(is_penalised, batch.logps - batch.old_logps, 0.0)
        return Effect(loss=self.beta * drift.abs(), metrics={"selected": is_penalised.float()})
