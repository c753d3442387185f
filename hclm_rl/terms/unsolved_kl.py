"""KL to the start where a prompt is unsolved, derived here; its opposite holds solved ones: DPH-RL, arXiv:2509.07430"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..equations.functional import in_double, per_token
from ..responses.right_answers import successes, tell_of_unclear_rewards
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class UnsolvedKl(Term):
    """Holds the policy to its start on prompts that no response of the group solved, and leaves it free on the others.

    Such a group has no reward to learn from, so all that moves the policy there is what it learns elsewhere, and
    nothing stops that from taking the chance of an answer that was never found. The advantages of its tokens are those
    of a KL penalty to the reference,

        A_t <- A_t - beta (log pi(a_t) - log pi_ref(a_t))

    with pi the policy that sampled: the score-function gradient of KL(pi || pi_ref), token by token, in the unit of
    TRL's `beta`. It ends for a prompt with its first right response: what a KL to the start costs in learning it costs
    on solved prompts mostly. Beside `hold_coverage` or `right_anchor`, which hold what has been found, it holds the
    chance of what has not. Where the start cannot answer yet, it holds back learning (docs/log.md). A group of which
    nothing was scored is left alone.

    Args:
        beta: strength, advantages a nat, above 0; with MaxRL's weights (`max_rl`, `hold_coverage`) a nat of drift costs
            at 1 what a nat of success is worth.
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.

    Metrics:
        unsolved (share): of the groups, on which alone it acts. Healthy: falls. Else: what is held is not being learnt;
            lower `beta`
        drift (nats): mean over the tokens of those groups of log pi - log pi_ref. Healthy: levels off. Else: raise
            `beta`
    """

    needs_scores: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    beta: float = 1.0
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be finite and above 0, got {self.beta}")
        if self.right_at is not None and not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward or None, got {self.right_at}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if rollout.ref_logps is None:  # refused before loading unless the coefficient is 0
            return RolloutEffect()
        tell_of_unclear_rewards("unsolved_kl", rollout, self.right_at, memory)
        right, scored = successes(rollout.group_rewards, self.right_at)
        is_unsolved = (right == 0) & (scored > 0)
        held = rollout.mask & is_unsolved.unsqueeze(1)
        drift = torch.where(held, rollout.scored()[0] - rollout.ref_logps, 0)
        sums = rollout.total(torch.stack([in_double(drift).sum(), in_double(held).sum()]))
        return RolloutEffect(
            advantages=per_token(rollout.advantages, rollout.mask) - self.beta * drift.to(rollout.advantages),
            metrics={"unsolved": in_double(is_unsolved).mean(), "drift": sums[0] / sums[1].clamp(min=1)},
        )
