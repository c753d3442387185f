"""EAR, Entropy-based Advantage Reshaping (of ETTRL): Liu et al., 2025, arXiv:2508.11356"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import in_double
from ..types import Direction, Rollout, RolloutEffect, Term

CERTAIN = 1e-5  # nats, the rounding of exact entropies in float32: where m is no more, Y = 1, not noise or 0 / 0


@dataclass(frozen=True, kw_only=True)
class EntropyAdvantage(Term):
    """Trusts the certain responses of a group more, and the uncertain ones less: A_i <- Y_i A_i.

    Y_i = 1 + (m - Hbar_i) / m,  Hbar_i the mean entropy of the response's tokens at the sampling policy in nats, m the
    mean of Hbar over the group. Certain winners are paid more, which lowers the entropy further. The paper's other
    form, "clip", bounds advantages instead: A_i <- clip(A_i, -beta, beta); with GRPO's scaling |A_i| passes 2 only in
    groups of six or more.

    Args:
        form: the paper's Adv-Res and Adv-Clip, alternatives there
        beta: bound of "clip", in units of the advantage, > 0; the paper's value
        floor: least Y_i, <= 1, ours: None, the paper's, lets a response with Hbar_i > 2 m change the sign of its
            advantage

    Metrics:
        negative (share): of the responses whose weight Y is below 0 before `floor`, that is with over twice the group's
            entropy
    """

    shapes_advantages: ClassVar[bool] = True

    form: Literal["residual", "clip"] = "residual"
    beta: float = 2.0
    floor: float | None = 0.0

    @property
    def needs_scores(self) -> bool:
        return self.form == "residual"

    @property
    def seeks(self) -> Direction | None:
        return "less" if self.form == "residual" else None

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.floor is not None and not self.floor <= 1:
            raise ValueError(f"floor must be at most 1 or None, got {self.floor}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.form == "clip":
            return RolloutEffect(advantages=rollout.advantages.clamp(-self.beta, self.beta))
        # float64: what a row sums to must not show how many padded slots it has
        entropy = torch.where(rollout.mask, in_double(rollout.scored()[1]).clamp(min=0), 0.0)
        mean_entropy = entropy.sum(dim=1) / rollout.mask.sum(dim=1)  # NaN for a response without tokens
        counted = torch.where(rollout.rewards.isnan(), torch.nan, mean_entropy)  # what has no reward is left out of m
        group = rollout.everywhere(counted).view(-1, rollout.group_rewards.size(1))[rollout.group]  # (N, G)
        m = group.nanmean(dim=1)
        weight = torch.where(m > CERTAIN, 1 + (m - mean_entropy) / m, 1.0).nan_to_num(nan=1.0)
        is_negative = weight < 0
        if self.floor is not None:
            weight = weight.clamp(min=self.floor)
        weight = weight.to(rollout.advantages.dtype)
        return RolloutEffect(
            advantages=rollout.advantages * (weight if rollout.advantages.dim() == 1 else weight.unsqueeze(1)),
            metrics={"negative": in_double(is_negative).mean()},
        )
