"""CANON, Conditional advantage estimation: Chen et al., 2025, arXiv:2509.23962"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..equations.functional import in_double
from ..types import Rollout, RolloutEffect, Term

FEWEST_RESPONSES = 4  # below it a half is one response or none


@dataclass(frozen=True, kw_only=True)
class Canon(Term):
    """Compares each response with the half of its group on the other side of a metric, so data say which side is right.

    A_i = mu inter_i + (1 - mu) intra_i,  inter_i = R_i - mean R of the opposite half,  intra_i = R_i - mean R of its
    own. The halves are the floor(G/2) responses with the lowest metric, ties by their order, and the rest. It takes the
    place of the base algorithm's advantages and is not divided by a deviation; with even G, mu = 0.5 is R - mean R.
    A large mu lowers the entropy, a small one raises it. alpha < 1 asks more of one half: inter_i = alpha R_i - mean
    R of the opposite half for it, R_i - alpha mean R of it for the other. The authors sum token losses over a constant
    length: `loss_type: dr_grpo`. A response can be right and have A = 0. What has no reward or no tokens, such as a
    truncated response that is masked, is in neither half. Refuses groups of fewer than 4.

    Args:
        metric: of a response: the mean entropy of its tokens at the sampling policy, or their number
        mu: in [0, 1]; 1 is CANON-Inter, 0 CANON-Intra; CANON-Eff has 0.5; read where schedule is "constant"
        schedule: CANON-Dynamic: mu = 1 - a (inter first) or a (intra first, as the released code does), a the mean
            reward of the step, clipped to [0, 1]; or cosines with warm restarts, 1.0 to 0.4 (inter first), 1 - (0.6 to
            0.0) (intra first)
        total: optimiser steps of the cosine schedules; the authors', who count batches of rollouts
        warmup: of them, in [0, total); the mu of these steps starts at the wrong end, as in the authors' code
        cycles: of the rest, >= 1
        alpha: in (0, 1]; 0.96 the balanced one of CANON-Eff, tried from 0.5 on
        favoured: the half with alpha; None: "low" for entropy (the authors' code), "high" for length (shortens answers)
        offset: added to inter_i of the half with the higher metric, taken from the other's, whichever is favoured; the
            authors' beta, in the code, not in the paper

    Metrics:
        mu (weight): of the comparison with the opposite half, in [0, 1]
        high_minus_low (reward): mean over groups of the reward of the half with the higher metric less that of the
            other: which side is right
    """

    needs_scores: ClassVar[bool] = True
    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    metric: Literal["entropy", "length"] = "entropy"
    mu: float = 1.0
    schedule: Literal[
        "constant", "accuracy_inter_first", "accuracy_intra_first", "cosine_inter_first", "cosine_intra_first"
    ] = "constant"
    total: int = 150
    warmup: int = 30
    cycles: int = 3
    alpha: float = 1.0
    favoured: Literal["low", "high"] | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu must be in [0, 1], got {self.mu}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        if self.cycles < 1 or not 0 <= self.warmup <= self.total - self.cycles:
            raise ValueError(
                "the cosine needs cycles >= 1 and warmup >= 0 with a step for each cycle left in total, got "
                f"cycles {self.cycles}, warmup {self.warmup}, total {self.total}"
            )
        if not math.isfinite(self.offset):
            raise ValueError(f"offset must be finite, got {self.offset}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        size = rollout.group_rewards.size(1)
        if size < FEWEST_RESPONSES:
            raise ValueError(f"canon splits a group in halves: num_generations must be at least 4, got {size}")
        rewards = rollout.everywhere(rollout.rewards).view(-1, size)
        values = rollout.everywhere(self._metric(rollout)).view(-1, size)
        is_scored = ~rewards.isnan()
        accuracy = (torch.where(is_scored, rewards, 0.0).sum() / is_scored.sum().clamp(min=1)).item()
        mu = self._mu(accuracy, rollout.step)
        has_tokens = rollout.everywhere(rollout.mask.any(dim=1)).view(-1, size)
        advantages, gap = self._advantages(torch.where(has_tokens, rewards, torch.nan), values, mu)
        return RolloutEffect(
            advantages=rollout.here(advantages.reshape(-1)),
            metrics={"mu": rewards.new_tensor(mu), "high_minus_low": gap},
        )

    def _metric(self, rollout: Rollout) -> Float[Tensor, "N"]:
        length = in_double(rollout.mask.sum(dim=1))
        if self.metric == "length":
            return length
        return torch.where(rollout.mask, in_double(rollout.scored()[1]), 0.0).sum(dim=1) / length.clamp(min=1)

    def _mu(self, accuracy: float, step: int) -> float:
        accuracy = min(max(accuracy, 0.0), 1.0)
        match self.schedule:
            case "accuracy_inter_first":
                return 1 - accuracy
            case "accuracy_intra_first":
                return accuracy
            case "cosine_inter_first":
                return self._restarts(step, 1.0, 0.4)
            case "cosine_intra_first":
                return 1 - self._restarts(step, 0.6, 0.0)
        return self.mu

    def _restarts(self, step: int, high: float, low: float) -> float:
        """A straight rise to `high` in the warm-up, then half a cosine from `high` to `low` in each cycle."""
        if step < self.warmup:
            return high * (step + 1) / self.warmup
        length = (self.total - self.warmup) // self.cycles
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * ((step - self.warmup) % length) / length))

    def _advantages(
        self, rewards: Float[Tensor, "P G"], values: Float[Tensor, "P G"], mu: float
    ) -> tuple[Float[Tensor, "P G"], Float[Tensor, ""]]:
        """A, 0 for what has no reward and where a half has no scored response; and mean R of HIGH less that of LOW."""
        is_scored = ~rewards.isnan()
        rank = torch.where(is_scored, values, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        is_low = rank < is_scored.sum(dim=1, keepdim=True) // 2
        is_high = is_scored & ~is_low
        low, high = (
            torch.where(half, rewards, 0.0).sum(dim=1, keepdim=True) / half.sum(dim=1, keepdim=True)
            for half in (is_low, is_high)
        )
        own, opposite = torch.where(is_low, low, high), torch.where(is_low, high, low)
        favoured = self.favoured or ("low" if self.metric == "entropy" else "high")
        is_favoured = is_low if favoured == "low" else is_high
        inter = torch.where(is_favoured, self.alpha * rewards - opposite, rewards - self.alpha * opposite)
        inter = inter + torch.where(is_high, self.offset, -self.offset)
        has_halves = is_scored & is_low.any(dim=1, keepdim=True)
        gaps = torch.where(is_low.any(dim=1), (high - low).squeeze(1), 0.0)
        gap = gaps.sum() / is_low.any(dim=1).sum().clamp(min=1)
        return torch.where(has_halves, mu * inter + (1 - mu) * (rewards - own), 0.0), gap
