"""F-GRPO, focal weights of prompts: F-GRPO, 2026, arXiv:2602.06717"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..equations.functional import in_double, per_token
from ..responses.right_answers import successes
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class Focal(Term):
    """Prompts that are mostly solved weigh less, so that mass does not pile up on the common solutions.

    A_i <- (1 - mu)^gamma A_i,  mu = c / n,  c of the group's n scored responses right. The direction inside a group
    stays. GRPO's deviation alone gives the mean difference of a prompt with success rate p the weight
    1 / sqrt(p (1 - p)), with gamma 1/2 this makes it 1 / sqrt(p), half way to `max_rl`. mu counts this step's samples:
    with n = 4 it has five values. It only shrinks, so the step falls as training succeeds (`weight` logs the mean
    factor): compare at equal step sizes, or rescale. The failure in a nearly solved group is turned down too, the
    opposite of `qae`; `max_rl` and `passk_advantage` weigh by difficulty already. A KL and added losses keep their
    strength. Written from the abstract and a re-implementation by others: the paper's own gamma, its deviation and
    whether it averages mu over time are not verified.

    Args:
        gamma: at least 0; 0 changes nothing; of the re-implementation; to try: 0.5, 1, 2
        rescale: True: the factors are divided by their mean over the groups whose A are not all 0; ours
        right_at: the reward from which a response is right; ours, for graded rewards: the code that was read has R > 0

    Metrics:
        weight (factor): mean weight of the responses, (1 - success) to the power of gamma. Healthy: above a tenth.
            Else: nearly all prompts are solved, and hardly anything is learnt
    """

    shapes_advantages: ClassVar[bool] = True

    gamma: float = 0.5
    rescale: bool = False
    right_at: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, got {self.gamma}")
        if not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward, got {self.right_at}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        right, scored = successes(rollout.group_rewards, self.right_at)
        weight = (1 - in_double(right) / scored.clamp(min=1)) ** self.gamma
        if self.rescale:
            weight = weight / self._mean(rollout, weight)
        of_row = weight.to(rollout.advantages)
        return RolloutEffect(
            advantages=rollout.advantages * (of_row if rollout.advantages.dim() == 1 else of_row.unsqueeze(1)),
            metrics={"weight": weight.mean()},
        )

    def _mean(self, rollout: Rollout, weight: Float[Tensor, "N"]) -> Float[Tensor, ""]:
        """Over the groups of all processes that move something; 1 where that is 0."""
        moves = (rollout.mask & (per_token(rollout.advantages, rollout.mask) != 0)).any(dim=1)
        size = rollout.group_rewards.size(1)
        of_group = rollout.everywhere(weight).view(-1, size)[:, 0]
        of_group = of_group[rollout.everywhere(moves).view(-1, size).any(dim=1)]
        return of_group.mean() if of_group.any() else torch.ones_like(weight[0])
