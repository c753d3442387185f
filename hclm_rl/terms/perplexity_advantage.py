"""Perplexity-based advantage shaping: Deng et al., 2025, arXiv:2508.02260"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import in_double
from ..types import Direction, Rollout, RolloutEffect, Term

EQUAL_PERPLEXITIES = 1e-6  # nats a token: below this deviation w_i is l_i - mean, undivided, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class PerplexityAdvantage(Term):
    """Gives the confident responses of a group more weight: A_i <- A_i clamp(1 - alpha w_i, smallest, largest).

    w_i = (l_i - mean_K l) / std_K l,  l_i = -(1/|o_i|) sum_t log p_t the log-perplexity at the sampling policy, K the
    responses of the group within 1.5 interquartile ranges of its quartiles, with population deviation. Outliers get
    their w_i from the statistics of K. It acts on both signs: confident right answers are paid more, which lowers the
    entropy, confident wrong ones punished harder. At the default alpha an advantage moves by about 1%. In the released
    code the weight of favours "low" is made and printed but never applied: their public run of it is plain GRPO.

    Args:
        alpha: per deviation of the group, >= 0; the paper's value
        favours: the perplexity; "high": the authors' other variant, 1 + alpha w_i, the one that their code applies
        smallest: bounds of the weight, 0 <= smallest <= 1 <= largest: in the authors' code, not in the paper
        largest: upper bound of the weight, see `smallest`

    Metrics:
        outliers (share): of the responses outside 1.5 interquartile ranges, whose perplexity is no part of mean and
            deviation
    """

    needs_scores: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    alpha: float = 0.01
    favours: Literal["low", "high"] = "low"
    smallest: float = 0.8
    largest: float = 1.2

    @property
    def seeks(self) -> Direction | None:
        return "less" if self.favours == "low" else "more"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {self.alpha}")
        if not 0 <= self.smallest <= 1 <= self.largest:
            raise ValueError(
                f"the weight's bounds must be 0 <= smallest <= 1 <= largest, got {self.smallest} and {self.largest}"
            )

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        # float64: what a row sums to must not show how many padded slots it has
        logps = torch.where(rollout.mask, in_double(rollout.scored()[0]), 0.0)
        log_perplexity = -logps.sum(dim=1) / rollout.mask.sum(dim=1)  # NaN for a response without tokens
        group = rollout.everywhere(log_perplexity).view(-1, rollout.group_rewards.size(1))[rollout.group]  # (N, G)
        quartile_1, quartile_3 = (torch.nanquantile(group, level, dim=1, keepdim=True) for level in (0.25, 0.75))
        reach = 1.5 * (quartile_3 - quartile_1)
        is_kept = (quartile_1 - reach <= group) & (group <= quartile_3 + reach)
        count = is_kept.sum(dim=1).clamp(min=1)
        mean = torch.where(is_kept, group, 0.0).sum(dim=1) / count
        variance = torch.where(is_kept, (group - mean.unsqueeze(1)) ** 2, 0.0).sum(dim=1) / count
        std = variance.sqrt()
        w = (log_perplexity - mean) / torch.where(std <= EQUAL_PERPLEXITIES, 1.0, std)
        slope = -self.alpha if self.favours == "low" else self.alpha
        weight = (1 + slope * w).clamp(self.smallest, self.largest).nan_to_num(nan=1.0).to(rollout.advantages.dtype)
        is_outlier = ~is_kept & ~group.isnan()
        return RolloutEffect(
            advantages=rollout.advantages * (weight if rollout.advantages.dim() == 1 else weight.unsqueeze(1)),
            metrics={"outliers": in_double(is_outlier).mean()},
        )
