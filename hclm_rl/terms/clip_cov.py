"""Clip-Cov: Cui et al., 2025, arXiv:2505.22617"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.flow import step_covariances
from ..equations.functional import covariance_contributions
from ..equations.selections import between, drawn, quota
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ClipCov(Term):
    """Drops the gradient of a few random tokens whose log-prob and advantage are high (or low) together.

    cov_t = (A_t - mean A)(log p_t - mean log p); among the tokens with lower < cov_t < upper, max(floor(ratio N), 1)
    are drawn and their advantage is set to 0. They stay in the denominator. The bounds assume advantages divided by
    the group's standard deviation; on a confident model few tokens reach them and the method is plain GRPO: watch
    `affected` and `candidates`. The authors run it with epsilon = epsilon_high = 1.

    Args:
        ratio: of all response tokens, in (0, 1]; the paper's value
        lower: in units of log-prob x advantage; the paper's value
        upper: the paper's value
        statistics: "micro_batch": as the authors' code, for parity with it

    Metrics:
        candidates (share): of the tokens between `lower` and `upper`, of which `ratio` are dropped. Healthy: above
            `ratio`. Else: at 0 the method is plain GRPO; lower `lower`
    """

    seeks: ClassVar[Direction | None] = "more"

    ratio: float = 2e-4
    lower: float = 1.0
    upper: float = 5.0
    statistics: Literal["step", "micro_batch"] = "step"

    @property
    def needs_scores(self) -> bool:
        return self.statistics == "step"

    def caveats(self) -> list[str]:
        if self.ratio <= 0.05:
            return []
        return [
            f"ratio {self.ratio:g} is a fraction: it drops up to {100 * self.ratio:g} % of all tokens, where the paper "
            "has 2e-4 and SPEAR 0.02; a percentage must be divided by 100"
        ]

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper, got {self.lower} and {self.upper}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        # at the sampling policy every ratio is 1, so no token is out of PPO's range yet
        cov, mask = step_covariances(rollout)
        is_candidate = between(cov, mask, self.lower, self.upper)
        is_dropped = drawn(is_candidate, quota(self.ratio, mask), rollout.generator)
        share = is_candidate.sum() / mask.sum().clamp(min=1)
        return RolloutEffect(columns={"is_dropped": rollout.here(is_dropped)}, metrics={"candidates": share})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.statistics == "step":
            return Effect(advantages=torch.where(batch.columns["is_dropped"], 0.0, batch.advantages))
        ratio = (batch.logps.detach() - batch.old_logps).exp()
        clipped = ratio.clamp(1 - batch.clip_range[0], 1 + batch.clip_range[1])
        is_clipped = -batch.advantages * clipped > -batch.advantages * ratio
        cov = covariance_contributions(batch.logps, batch.advantages, batch.mask)
        is_candidate = between(cov, batch.mask & ~is_clipped, self.lower, self.upper)
        is_dropped = drawn(is_candidate, quota(self.ratio, batch.mask), batch.generator)
        share = is_candidate.sum() / batch.mask.sum().clamp(min=1)
        return Effect(advantages=torch.where(is_dropped, 0.0, batch.advantages), metrics={"candidates": share})
