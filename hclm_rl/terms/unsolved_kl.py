"""KL to the start where a prompt is unsolved, derived here; its opposite holds solved ones: DPH-RL, arXiv:2509.07430"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from ..equations.functional import in_double, per_token
from ..responses.right_answers import count_in, sampled_before, successes, tell_of_unclear_rewards, text_numbers
from ..types import Rollout, RolloutEffect, Term

PROMPTS, VISITS = "prompts", "visits"  # in the memory: numbers that stand for prompts, and rollouts that asked them


@dataclass(frozen=True, kw_only=True)
class UnsolvedKl(Term):
    """Holds the policy to its start on prompts that stay unsolved, and leaves it free on the others.

    A group without a right response has no reward to learn from, so all that moves the policy there is what it learns
    elsewhere, and nothing stops that from taking the chance of an answer that was never found. The advantages of its
    tokens are those of a KL penalty to the reference,

        A_t <- A_t - beta (log pi(a_t) - log pi_ref(a_t))

    with pi the policy that sampled: the score-function gradient of KL(pi || pi_ref), token by token, in the unit of
    TRL's `beta`. It ends for a prompt with its first right response: what a KL to the start costs in learning it costs
    on solved prompts mostly. Beside `hold_coverage` or `right_anchor`, which hold what has been found, it holds the
    chance of what has not. A group of which nothing was scored is left alone.

    The first time that a prompt is asked it is left alone: what is being learned from the others may be about to reach
    it, and where the start cannot answer yet, holding it there cost learning (docs/log.md). What comes again unsolved
    is what a pass over the data did not reach. So within the first pass this term does nothing with its default.

    Args:
        beta: strength, advantages a nat, above 0; with MaxRL's weights (`max_rl`, `hold_coverage`) a nat of drift costs
            at 1 what a nat of success is worth.
        free_visits: rollouts in which a prompt is asked before it may be held, >= 0; 0 holds from the first on. How
            often each prompt was asked goes into checkpoints, 12 bytes a prompt, told apart by its text.
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.

    Metrics:
        unsolved (share): of the groups. Healthy: falls. Else: what is held is not being learnt; lower `beta`
        held (share): of the groups, on which alone it acts: unsolved, and asked before
        drift (nats): mean over the tokens of the held groups of log pi - log pi_ref. Healthy: levels off. Else: raise
            `beta`
    """

    needs_scores: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    beta: float = 1.0
    free_visits: int = 1
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be finite and above 0, got {self.beta}")
        if self.free_visits < 0:
            raise ValueError(f"free_visits must be at least 0, got {self.free_visits}")
        if self.right_at is not None and not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward or None, got {self.right_at}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if rollout.ref_logps is None:  # refused before loading unless the coefficient is 0
            return RolloutEffect()
        tell_of_unclear_rewards("unsolved_kl", rollout, self.right_at, memory)
        right, scored = successes(rollout.group_rewards, self.right_at)
        is_unsolved = (right == 0) & (scored > 0)
        is_held = is_unsolved & self._is_late(rollout, memory) if self.free_visits else is_unsolved
        held = rollout.mask & is_held.unsqueeze(1)
        drift = torch.where(held, rollout.scored()[0] - rollout.ref_logps, 0)
        sums = rollout.total(torch.stack([in_double(drift).sum(), in_double(held).sum()]))
        return RolloutEffect(
            advantages=per_token(rollout.advantages, rollout.mask) - self.beta * drift.to(rollout.advantages),
            metrics={
                "unsolved": in_double(is_unsolved).mean(),
                "held": in_double(is_held).mean(),
                "drift": sums[0] / sums[1].clamp(min=1),
            },
        )

    def _is_late(self, rollout: Rollout, memory: dict) -> Bool[Tensor, "N"]:
        """Which rows' prompts were asked in `free_visits` earlier rollouts or more; counts this one."""
        asked = text_numbers(rollout)
        before = sampled_before(memory, PROMPTS, VISITS)
        is_late = [before.get(number, 0) >= self.free_visits for number in asked.tolist()]
        count_in(memory, asked.unique(), PROMPTS, VISITS)
        return rollout.here(torch.tensor(is_late, device=rollout.mask.device))
