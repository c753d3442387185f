"""MaxRL, Maximum Likelihood Reinforcement Learning: Tajwar et al., 2026, arXiv:2602.02710"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class MaxRl(Term):
    """Hard prompts weigh more: the gradient is that of the log of a prompt's success rate instead of the rate itself.

    A_i = (R_i - m) / m, m the mean reward of the group's G responses. For 0/1 rewards and success rate p the policy
    gradient is then that of sum over k < G of pass@k / k, which tends to log p as G grows; GRPO's, which divides by the
    deviation, weighs a prompt by 1 / sqrt(p (1 - p)) instead of 1 / p. A group with m = 0 moves nothing. Rewards
    below 0, which have no success rate and make a weight without bound where m is near 0, are refused; graded ones have
    only the name of it. An estimator that whitens advantages undoes it.
    """

    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(advantages=relative_to_success(rollout, "max_rl"))


def relative_to_success(rollout: Rollout, term: str) -> Float[Tensor, "N"]:
    """(R_i - m) / m; 0 where m is 0 and where nothing scored the response. `term`: whose name the refusal has."""
    rewards = rollout.rewards
    if below := int(rollout.total((rewards < 0).sum())):
        raise ValueError(
            f"{term} divides by a group's mean reward, so it needs rewards of 0 or more; {below} responses have "
            "less: pay 0 and 1 instead of -1 and 1, and give a term that lowers rewards before it a floor"
        )
    mean = rollout.group_rewards.nanmean(dim=1)
    moves = ~rewards.isnan() & (mean > 0)
    return torch.where(moves, (rewards - mean) / mean, 0.0)
