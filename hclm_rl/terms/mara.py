"""MARA, Mode Anchored Reward Augmentation: GX-Chen et al., 2025, arXiv:2510.20817"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double, quantile
from ..responses.right_answers import tell_once
from ..types import Direction, Rollout, RolloutEffect, Term
from .right_kl import summed


@dataclass(frozen=True, kw_only=True)
class Mara(Term):
    """Right answers are relieved of the KL penalty, so that all of them are paid alike, however the start weighed them.

    With equal rewards the optimum of R - beta KL(pi || ref) keeps the reference's proportions among right answers for
    every beta. L_i = log ref(o_i), summed over the response, z the response of the group with the greatest L among
    those with R >= threshold:

        R_i <- R_z + beta (L_z - L_i) for R_i >= threshold    others, and groups without such a response, stay

    beta is the run's own, that of the loss. The optimum is then the constant ref(z) exp(R_z / beta) on all of them.
    That holds for the rewards as they are: `scale_rewards: none` (another one is told of), since the KL is not divided
    along; in a group that is all right the deviation would be that of the relief alone. It pays for surprise under the
    reference, so for length and rambling: `best_length` is the length of the best paid. It is uniform over texts, not
    over answers; differences of quality above the threshold are erased; the anchor moves from step to step. Truncated
    responses look likely or not by accident: leave them out with mask_truncated_completions. Not verified: which
    quantile the authors take, whether the anchor is a group's or the batch's in their code, their estimator of the KL
    (TRL has k3).

    Args:
        threshold: the reward from which a response is right; the paper's example for 0/1 rewards
        quantile: in (0, 1): that of the step's rewards in the place of `threshold`, for graded ones; None: off
        cap: the most that is added to R_z, above 0; None: no cap, as in the paper; ours

    Metrics:
        groups (share): of the groups that hold a right answer
        relief (advantage): mean of what the right answers get beside their advantage
        best_length (tokens): length of the answer that got most of it
    """

    needs_reference: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"
    shapes_rewards: ClassVar[bool] = True

    threshold: float = 0.8
    quantile: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be a finite reward, got {self.threshold}")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be in (0, 1) or None, got {self.quantile}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap must be above 0 or None, got {self.cap}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if rollout.ref_logps is None or not rollout.beta:  # refused before loading unless the coefficient is 0
            return RolloutEffect()
        self._tell_of_scaled_rewards(rollout, memory)
        size, lengths = rollout.group_rewards.size(1), rollout.mask.sum(dim=1)
        rewards, likely, tokens = (
            rollout.everywhere(each).view(-1, size)
            for each in (rollout.rewards, summed(rollout.ref_logps, rollout.mask), lengths)
        )
        right = (rewards >= self._from(rewards)) & (tokens > 0)
        relief = relieved(rewards, likely, right, rollout.beta, self.cap)
        shaped = rollout.here(torch.where(right, relief, in_double(rewards)).flatten()).to(rollout.rewards)
        added = torch.where(right, relief - in_double(rewards), 0)
        return RolloutEffect(
            rewards=shaped,
            metrics={
                "groups": in_double(right.any(dim=1)).mean(),
                "relief": added.sum() / right.sum().clamp(min=1),
                "best_length": in_double(tokens.flatten()[added.argmax()]),
            },
        )

    def _from(self, rewards: Float[Tensor, "P G"]) -> float | Float[Tensor, ""]:
        """The reward from which a response is right."""
        scored = rewards[~rewards.isnan()]
        return self.threshold if self.quantile is None or not len(scored) else quantile(scored, self.quantile)

    @staticmethod
    def _tell_of_scaled_rewards(rollout: Rollout, memory: dict) -> None:
        scale = rollout.everywhere(rollout.reward_scale)
        if (~scale.isnan() & (scale != 1)).any():
            tell_once(
                memory,
                "scaled",
                "mara: rewards are divided by their deviation and the KL is not, so that no beta makes right answers "
                "equally likely: set scale_rewards: none",
            )


def relieved(
    rewards: Float[Tensor, "P G"],
    likely: Float[Tensor, "P G"],
    right: Bool[Tensor, "P G"],
    beta: float,
    cap: float | None,
) -> Float[Tensor, "P G"]:
    """What the right ones are paid: the reward of the likeliest of them, and beta for each nat below it."""
    anchor = torch.where(right, likely, -torch.inf).argmax(dim=1, keepdim=True)
    added = beta * (likely.gather(1, anchor) - likely)
    return in_double(rewards).gather(1, anchor) + (added if cap is None else added.clamp(max=cap))
