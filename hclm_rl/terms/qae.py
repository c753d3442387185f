"""QAE, Quantile Advantage Estimation: Wu et al., 2025, arXiv:2509.22611"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..equations.functional import quantile_baseline
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class Qae(Term):
    """Hard prompts learn from successes only, easy ones from failures only: the baseline is a quantile of the group.

    A_i = (R_i - b) / scale, b = inf {x : share of the group's rewards <= x is at least `quantile_k`}, with the scale of
    the base algorithm. A larger quantile_k explores more. Clean for 0/1 rewards alone: with graded rewards the quantile
    is an arbitrary middle value. About four responses in five get no gradient, so the step is smaller than GRPO's.
    An estimator that centres or whitens advantages afterwards undoes it.

    Args:
        quantile_k: in (0, 1); 0.4 with clip-higher, 0.6 where entropy is low or falling (the paper's values)
        interpolate: True: the linear interpolation of the authors' released code, which the paper does not want
    """

    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    quantile_k: float = 0.4
    interpolate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.quantile_k < 1:
            raise ValueError(f"quantile_k must be in (0, 1), got {self.quantile_k}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        baseline = quantile_baseline(rollout.group_rewards, self.quantile_k, interpolate=self.interpolate)
        advantages = (rollout.rewards - baseline) / rollout.reward_scale
        # a response that no reward function scored moves nothing, nor does the only scored one of its group
        moves = ~(rollout.rewards.isnan() | rollout.reward_scale.isnan())
        return RolloutEffect(advantages=torch.where(moves, advantages, 0.0))
