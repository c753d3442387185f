"""Unlikeliness reward, Rewarding the Unlikely: He et al., 2025, arXiv:2506.02355"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double
from ..types import Direction, Rollout, RolloutEffect, Term
from .right_kl import summed

TIED = 1e-6  # nats; log-probs of copies differ by rounding where they were read in different batches


@dataclass(frozen=True, kw_only=True)
class Unlikeliness(Term):
    """Right responses that were unlikely are paid more: R_i <- R_i (1 - beta k_i / G), of R > 0 alone.

    k_i is the rank of the response's mean log-prob at the sampling policy, ascending from 0 over all G responses of the
    group: the least likely keeps all, the likeliest loses beta (G - 1) / G. Wrong responses take ranks too, so two
    right ones may differ by one rank or by many, and ranks do not see by how much: -0.200 and -0.201 are as far apart
    as -0.2 and -5. Ties, such as copies, get their mean rank (ours; the code leaves them to the sort). Where a
    deviation divides rewards (scale_rewards: group) the shift grows in nearly solved groups. Unlikely may be odd
    formatting or rambling, and right by luck: the paper's answers are verified proofs. Responses without a token or a
    score have no rank, and graded rewards keep their size times the factor.

    Args:
        beta: in [0, 1]; 0 changes nothing; the paper's
        form: "code": as above; "paper": of a reader's note, (1 - beta (k + 1) / G), so the least likely pays too
        per_token: False: ranks by the whole response's log-prob, as that note has it, which pays for length
        mixed_only: only groups with both outcomes, R > 0 and not; the authors drop the others before: in a group that
            is all right the deviation would be of the factors alone, and push right answers down at full strength

    Metrics:
        mixed (share): of the groups with right and wrong responses, in which alone it acts
        factor (factor): mean factor of the right answers there
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"
    shapes_rewards: ClassVar[bool] = True

    beta: float = 0.25
    form: Literal["code", "paper"] = "code"
    per_token: bool = True
    mixed_only: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mask, size = rollout.mask, rollout.group_rewards.size(1)
        lengths = mask.sum(dim=1)
        x = summed(rollout.scored()[0], mask)
        x = x / lengths.clamp(min=1) if self.per_token else x
        rewards, x, tokens = (rollout.everywhere(each).view(-1, size) for each in (rollout.rewards, x, lengths))
        counts = ~rewards.isnan() & (tokens > 0)
        place = ranks(x, counts) + (self.form == "paper")
        factor = 1 - self.beta * place / in_double(counts.sum(dim=1, keepdim=True)).clamp(min=1)
        right = counts & (rewards > 0)
        is_mixed = right.any(dim=1, keepdim=True) & (rewards <= 0).any(dim=1, keepdim=True)
        acts = right & is_mixed if self.mixed_only else right
        of_row = rollout.here(torch.where(acts, factor, 1).flatten()).to(rollout.rewards)
        return RolloutEffect(
            rewards=rollout.rewards * of_row,
            metrics={
                "mixed": in_double(is_mixed).mean(),
                "factor": torch.where(acts, factor, 0).sum() / acts.sum().clamp(min=1),
            },
        )


def ranks(x: Float[Tensor, "P G"], counts: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """The 0-based rank of x among those of the group that count, ascending; ties have their mean rank."""
    behind = x.unsqueeze(2) - x.unsqueeze(1)  # (P, i, j): x_i - x_j
    among = counts.unsqueeze(1) & counts.unsqueeze(2)
    below, equal = ((among & each).sum(dim=2) for each in (behind > TIED, behind.abs() <= TIED))
    return in_double(below) + (in_double(equal) - 1).clamp(min=0) / 2
