"""Hold coverage, derived here; a part is MaxRL: Tajwar et al., 2026, arXiv:2602.02710"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch
from .max_rl import relative_to_success
from .right_anchor import RightAnchor

START = LEAST = 0.0
MOST = 3.0
RATE = 0.05


@dataclass(frozen=True, kw_only=True)
class HoldCoverage(Term):
    """Learns where prompts are unsolved and holds right answers by as much as they are being lost; no strength to set.

    Two objectives in one unit, nats: what prompts win, and what right answers lose. (The loss is a mean over tokens, so
    both are divided by the mean length of their responses.)

        J = mean over prompts of log p_x - lambda * mean over stored right answers of max(0, l_0 - l)

    p_x is the prompt's success rate, whose log has the gradient of MaxRL's weights A_i = (R_i - m) / m (`max_rl`): an
    unsolved prompt weighs 1 / p, a solved one next to nothing. The second sum is `right_anchor`'s, over the answers of
    any prompt, so that it works where prompts come once. lambda is the price of a nat of a right answer in nats of
    success. It is the multiplier of the constraint that the loss stays within a budget, by dual ascent after each
    optimiser step, with the loss L that the step's replays showed:

        lambda <- clip(lambda + 0.05 (L - budget), 0, 3)    budget = -log(1 - 1 / G)

    The budget is what a group of G responses cannot tell from nothing: an answer that it found once it now finds
    1 - 1 / G times. lambda begins at 0, as multipliers do: until something right is lost, learning is all there is; it
    rises by as much as is lost and for as long, and falls again once what was won is held. What stands in place of a
    number to set: a nat above the budget for 20 steps makes a nat of either worth the same; at 3 the price rises no
    more, as a loss that no price prevents would otherwise end learning. Of these two one value was tried.

    Rewards below 0 are refused, as by `max_rl`; graded ones count as right from `right_at` on. Cost and memory are
    `right_anchor`'s, and the multiplier goes into checkpoints with the store. `strength` logs lambda, `nats` is L.

    Args:
        budget: what may be lost: as much as a "group" cannot see, or "none", under which lambda never falls; untried.
        share: of the rows, in (0, 1]: those that replay, hence the cost: a pass forward each, and another with gradient
            for those below their floor.
        capacity: right answers kept for a prompt, at least 1, as in `right_anchor`.
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.
        most_gb: the store takes no more responses beyond so many 10^9 bytes, and says so once; above 0.

    Metrics:
        strength (nats a nat): lambda, the price of a nat of a right answer. Healthy: below 3 after the first third.
            Else: right answers are lost whatever the price: a smaller learning rate
        kept (responses): number of those in the store
        prompts (prompts): number of those with a response in the store
        bytes (bytes): size of the store, in memory and in each checkpoint. Healthy: under `most_gb`. Else: lower
            `capacity`
        replayed (responses): number of those that are held in this step
        lost (share): of the replays that lie below their floor
        nats (nats): mean of what a replay lies below its floor, 0 where it does not: L. Healthy: near the budget. Else:
            see `strength`
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    rescores_in_loss: ClassVar[bool] = True
    sets_baseline: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    budget: Literal["group", "none"] = "group"
    share: float = 1.0
    capacity: int = 16
    right_at: float | None = None
    most_gb: float = 1.0

    def __post_init__(self) -> None:
        _ = self.anchor  # refuses what it does not allow

    @property
    def anchor(self) -> RightAnchor:
        """The stores and replays behind it."""
        return Replays(
            source="any", share=self.share, capacity=self.capacity, right_at=self.right_at, most_gb=self.most_gb
        )

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        held = self.anchor.on_rollout(rollout, memory)
        memory.setdefault("strength", START)
        memory["budget"] = -math.log1p(-1 / rollout.group_rewards.size(1)) if self.budget == "group" else 0.0
        return RolloutEffect(
            advantages=relative_to_success(rollout, "hold_coverage"),
            columns=held.columns,
            shared=held.shared,
            metrics={**held.metrics, "strength": torch.tensor(memory["strength"])},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        asked, strength = self.anchor(batch, memory), memory["strength"]
        if asked.loss is None:
            return asked
        affected = asked.affected if strength else None
        return Effect(loss=strength * asked.loss, affected=affected, metrics=asked.metrics)

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        if "nats" in metrics:
            moved = memory["strength"] + RATE * (metrics["nats"] - memory["budget"])
            memory["strength"] = min(max(moved, LEAST), MOST)


class Replays(RightAnchor):
    """The anchor within this term, which tells of itself by this term's name."""

    title: ClassVar[str] = "hold_coverage"
