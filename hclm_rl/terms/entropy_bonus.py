"""Plain entropy bonus, as in TRL's `entropy_coef`; with the coefficient StepToTarget it is Skywork Open Reasoner 1's
adaptive bonus: He et al., 2025, arXiv:2505.22312"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..responses.right_answers import is_right, tell_of_unclear_rewards
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Term):
    """Rewards uncertainty everywhere: adds -coef * H_t, H_t = -sum_v p_v log p_v in nats, to the loss of every token.

    It lifts the tail of all tokens, noise included. Averaged over the tokens of the whole optimiser step and all
    processes, whatever the base loss averages over, so a coefficient means the same in every run; TRL's own averages
    each micro-batch by itself, which weights short micro-batches more.

    With `by_difficulty` a token of a prompt with success rate p has the weight w = (1 - p) / mean of (1 - p) over the
    step's responses, and 1 where no prompt fails; with the coefficient `aer` that is AER (arXiv:2510.10959), of whose
    weights only the direction was at hand: the formula is ours. Where p = 0 the bonus is then all that acts.

    Args:
        by_difficulty: True: hard prompts have a larger bonus
        right_at: of `by_difficulty`, the reward from which a response is right; None: 1, with a warning where rewards
            are not 0 or 1

    Attributes:
        default_coef: Cui et al., arXiv:2505.22617: the value that held entropy without exploding
    """

    seeks: ClassVar[Direction | None] = "more"
    default_coef: ClassVar[float] = 0.005

    by_difficulty: bool = False
    right_at: float | None = None

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if not self.by_difficulty:
            return RolloutEffect()
        tell_of_unclear_rewards("entropy_bonus", rollout, self.right_at, memory)
        scored = ~rollout.group_rewards.isnan()
        wrong = (scored & ~is_right(rollout.group_rewards, self.right_at)).sum(dim=1)
        failure = wrong / scored.sum(dim=1)  # NaN where no response of the prompt was scored
        mean = rollout.everywhere(failure).nanmean()
        weight = torch.where(mean > 0, failure / mean, 1.0).nan_to_num(nan=1.0)
        return RolloutEffect(columns={"weight": weight})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if self.by_difficulty:
            return Effect(loss=-batch.columns["weight"].unsqueeze(1) * batch.entropy)
        return Effect(loss=-batch.entropy)
