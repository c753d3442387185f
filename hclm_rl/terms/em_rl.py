"""EM-RL, entropy minimisation by RL: Agarwal et al., 2025, arXiv:2505.15134"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import in_double
from ..types import Direction, Rollout, RolloutEffect, Term

EPSILON = 1e-6  # added to the deviation of a group; verl's


@dataclass(frozen=True, kw_only=True)
class EmRl(Term):
    """Learns from its own certainty alone: the reward is minus the response's entropy, no answer is checked.

    "token": r_i = -sum_t H_t;  "sequence": r_i = sum_t log p_t, both in nats over the response's tokens, at the
    sampling policy and its temperature. A_i = r_i - mean of the r_j of the other responses to the prompt, not divided
    by a deviation; responses without tokens, such as truncated ones that are masked, have no part in it. It replaces
    the advantages of the terms before it; the verifier's rewards are only logged. A coef below 1 is the share of the
    way from the verifier's advantages.

    This is the opposite of an entropy bonus: collapse is the goal, so stopping early is part of the method (the paper:
    about 100 steps), and no controller that holds the entropy up belongs beside it. The sum favours short responses:
    watch their length. The KL to the base model is the trainer's `beta` (the paper: 0.001), with GRPO: RLOO has it in
    the reward, which this replaces. It fails where the model's prior is poor.

    RENT (Prabhudesai et al., 2025, arXiv:2505.22660) is reduction "mean" with scale "group": r_i = -mean_t H_t,
    A_i = (r_i - mean of the group) / (its unbiased deviation + 1e-6), beside a KL of 0.001.

    Args:
        reward: the paper reports 42.9 and 41.6 on Qwen2.5-Math-7B
        reduction: "mean" over the response's tokens: RENT's, not EM-RL's
        scale: "group": GRPO's advantage of r in place of the leave-one-out one; RENT's

    Metrics:
        reward (nats): mean of the reward that is trained on, minus the entropy of a response. Healthy: rises, with
            held-out accuracy. Else: where accuracy falls while it rises, stop: the policy has grown sure of its
            mistakes
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "less"
    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    reward: Literal["token", "sequence"] = "token"
    reduction: Literal["sum", "mean"] = "sum"
    scale: Literal["none", "group"] = "none"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        logps, entropy = rollout.scored()
        certainty = -entropy if self.reward == "token" else logps
        # float64: what a row sums to must not show how many padded slots it has
        rewards = torch.where(rollout.mask, in_double(certainty), 0).sum(dim=1)
        if self.reduction == "mean":
            rewards = rewards / rollout.mask.sum(dim=1).clamp(min=1)
        size = rollout.group_rewards.size(1)
        has_tokens = rollout.mask.any(dim=1)
        groups = rollout.everywhere(rewards).view(-1, size)[rollout.group]  # 0 where there are no tokens
        counts = rollout.everywhere(has_tokens).view(-1, size)[rollout.group]
        count, others = counts.sum(dim=1), (counts.sum(dim=1) - 1).clamp(min=1)
        mean = groups.sum(dim=1) / count.clamp(min=1)
        if self.scale == "group":
            squares = torch.where(counts, groups - mean.unsqueeze(1), 0.0).square().sum(dim=1)
            advantages = (rewards - mean) / ((squares / others).sqrt() + EPSILON)
        else:
            # r - (sum - r) / (n - 1) = n / (n - 1) (r - mean)
            advantages = (rewards - mean) * count / others
        advantages = torch.where(has_tokens, advantages, 0.0)
        return RolloutEffect(
            advantages=advantages.to(rollout.advantages.dtype), metrics={"reward": rewards.float().mean()}
        )
