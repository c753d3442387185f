"""Hold coverage, derived here; its parts: MaxRL, Tajwar et al., 2026, arXiv:2602.02710, and the anchor of right_anchor"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch
from .max_rl import relative_to_success
from .right_anchor import RightAnchor

START = LEAST = 0.0
MOST = 3.0
RATE = 0.05  # per nat and optimiser step


@dataclass(frozen=True, kw_only=True)
class HoldCoverage(Term):
    """docs to come"""

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    share: float = 1.0
    capacity: int = 16
    right_at: float | None = None
    most_gb: float = 1.0

    def __post_init__(self) -> None:
        _ = self.anchor  # refuses what it does not allow

    @property
    def anchor(self) -> RightAnchor:
        return Replays(
            source="any", share=self.share, capacity=self.capacity, right_at=self.right_at, most_gb=self.most_gb
        )

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        held = self.anchor.on_rollout(rollout, memory)
        memory.setdefault("strength", START)
        memory["budget"] = -math.log1p(-1 / rollout.group_rewards.size(1))
        return replace(
            held,
            advantages=relative_to_success(rollout, "hold_coverage"),
            metrics={**held.metrics, "strength": torch.tensor(memory["strength"])},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        asked = self.anchor(batch, memory)
        return asked if asked.loss is None else replace(asked, loss=memory["strength"] * asked.loss)

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        if "nats" in metrics:
            moved = memory["strength"] + RATE * (metrics["nats"] - memory["budget"])
            memory["strength"] = min(max(moved, LEAST), MOST)


class Replays(RightAnchor):
    """The anchor within this term, which tells of itself by this term's name."""

    title: ClassVar[str] = "hold_coverage"
