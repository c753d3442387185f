"""UCPO, Uniform-Correct Policy Optimization: UCPO, 2026, arXiv:2605.00365"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double
from ..responses.right_answers import is_right
from ..types import Direction, Rollout, RolloutEffect, Term
from .group_log_det import mean_advantage
from .right_kl import summed

RAREST = 1e-6  # least q, of the authors' code; never reached by mean log-probs in groups of up to 64


@dataclass(frozen=True, kw_only=True)
class UniformCorrect(Term):
    """Rare right responses get a larger share of their group's positive advantage, whose sum stays.

    Over the n right responses of a group with A > 0, n > 1, with x_i the mean log-prob of the response's tokens at the
    sampling policy,

        q = softmax(x)    t_i ~ 1 / max(q_i, 1e-6), sum t = 1    A_i <- A_i n ((1 - tau) / n + tau t_i)

    rescaled to the old sum where these A differ (ours). All others keep theirs, and so does a group that is all right,
    where A = 0: `arm` acts there. The unit is a response: copies of one right text keep a share each (`group_log_det`
    makes them share). Odd formatting, other languages and rambling are rare too, and right answers by luck get most:
    watch `favoured_length` and `favoured_perplexity`, of the response with the greatest factor of each group. Put it
    behind what sets the baseline.

    Args:
        tau: in [0, 1], the part of the advantage that is spread; 0 changes nothing; of the published scripts
        alpha: at least 0; wrong responses less likely than their entropy says lose alpha max(0, -log q_j - H), with q
            among the wrong ones and H = -sum q log q; 0 is off, as in the scripts
        per_token: False: x_i is the sum over tokens, which makes it a rule for the rarest alone
        right_at: the reward from which a response is right; ours, for graded rewards: the authors' code has R > 0

    Metrics:
        groups (share): of the groups with two right answers or more, in which alone it acts. Healthy: above a tenth.
            Else: it does nothing yet
        largest (factor): the largest that multiplies an advantage in this step
        favoured_length (tokens): mean length of the right answers that are raised. Healthy: near the mean length. Else:
            it favours length
        favoured_perplexity (perplexity): mean perplexity of these
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"
    shapes_advantages: ClassVar[bool] = True

    tau: float = 0.2
    alpha: float = 0.0
    per_token: bool = True
    right_at: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 0, got {self.alpha}")
        if not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward, got {self.right_at}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mask, size = rollout.mask, rollout.group_rewards.size(1)
        lengths = mask.sum(dim=1)
        likely = summed(rollout.scored()[0], mask) / lengths.clamp(min=1)
        x = likely if self.per_token else likely * lengths
        mean = mean_advantage(rollout.advantages, mask)
        rewards, x, a, tokens, likely = (
            rollout.everywhere(each).view(-1, size) for each in (rollout.rewards, x, mean, lengths, likely)
        )
        right = is_right(rewards, self.right_at) & (a > 0) & (tokens > 0)
        several = right & (right.sum(dim=1, keepdim=True) > 1)
        factor = factors(x, a, several, self.tau)
        wrong = ~is_right(rewards, self.right_at) & ~rewards.isnan() & (tokens > 0) & several.any(dim=1, keepdim=True)
        loss = self.alpha * surprise(x, wrong)
        of_row, less = (rollout.here(each.flatten()).to(rollout.advantages) for each in (factor, loss))
        if rollout.advantages.dim() == 2:
            of_row, less = of_row.unsqueeze(1), less.unsqueeze(1)
        favoured = several & (factor == factor.amax(dim=1, keepdim=True))
        count = favoured.sum().clamp(min=1)
        return RolloutEffect(
            advantages=rollout.advantages * of_row - less,
            metrics={
                "groups": in_double(several.any(dim=1)).mean(),
                "largest": torch.where(several, factor, 0).amax(),
                "favoured_length": torch.where(favoured, in_double(tokens), 0).sum() / count,
                "favoured_perplexity": torch.where(favoured, (-likely).exp(), 0).sum() / count,
            },
        )


def among(x: Float[Tensor, "P G"], chosen: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """log q of the chosen of each group, the log-softmax of x over them; 0 elsewhere."""
    alone = torch.where(chosen, x, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(chosen, x - alone, 0)


def factors(x: Float[Tensor, "P G"], a: Float[Tensor, "P G"], right: Bool[Tensor, "P G"], tau: float) -> Tensor:
    """What the advantages of the right ones are multiplied by, so that a group's sum stays; (P, G), 1 elsewhere."""

    def total(values: Tensor) -> Tensor:
        return torch.where(right, values, 0).sum(dim=1, keepdim=True)

    n = in_double(right.sum(dim=1, keepdim=True))
    v = 1 / among(x, right).exp().clamp(min=RAREST)
    factor = (1 - tau) + tau * n * v / total(v).clamp(min=1)
    after = total(factor * a)
    return torch.where(right, factor * total(a) / torch.where(after > 0, after, 1), 1)


def surprise(x: Float[Tensor, "P G"], wrong: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """max(0, -log q - H) among the wrong ones of each group; 0 elsewhere."""
    log_q = among(x, wrong)
    entropy = -torch.where(wrong, log_q.exp() * log_q, 0).sum(dim=1, keepdim=True)
    return torch.where(wrong, (-log_q - entropy).clamp(min=0), 0)
