"""No loss per prompt: derived here"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..responses.right_answers import is_right, prompt_numbers
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch
from .right_anchor import RightAnchor


@dataclass(frozen=True, kw_only=True)
class NoLoss(Term):
    """A prompt that was solved may not be solved less often: one that is weighs more until it is as good as it was.

    With k right of a rollout's G responses to prompt x, p = (k + 1/2) / (G + 1); p0 is that of the first rollout of x.
    Whenever x comes, its multiplier moves by

        mu <- clip(mu + eta (log p0 - log p - delta), 0, mu_max)    A_i <- (1 + mu) A_i    for its responses

    which is dual ascent on the constraint p >= p0 e^-delta. Advantages are all 0 where nothing is right: there each
    response replays one of the prompt's stored right answers, by `right_anchor`'s loss times mu times coef. A prompt
    that the start does not solve has p0 near 0, so its mu stays 0 and learning is free. Prompts that come once are
    never compared. p is a noisy count: with delta 0 a prompt whose first rollout was lucky gathers a multiplier. The
    store and the multipliers (24 bytes a prompt) are the same on all processes and go into checkpoints.

    Args:
        eta: step of the multiplier for each nat lost, above 0; the card's worked example.
        delta: nats of log p that may be lost, at least 0.
        mu_max: the most that a multiplier grows to, above 0; ours.
        capacity: right answers kept for a prompt, at least 1, as in `right_anchor`.
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.
        most_gb: the store takes no more responses beyond so many 10^9 bytes, and says so once; above 0.

    Metrics:
        mu (factor): mean multiplier over the responses
        held (share): of the responses whose prompt has a multiplier above 0. Healthy: does not rise for long. Else:
            what was solved is being lost
        kept (responses): number of those in the store
        prompts (prompts): number of those with a response in the store
        bytes (bytes): size of the store, in memory and in each checkpoint
        replayed (responses): number of those that are held in this step
        lost (share): of the replays that lie below their floor
        nats (nats): mean of what a replay lies below its floor, 0 where it does not
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    rescores_in_loss: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    eta: float = 0.1
    delta: float = 0.0
    mu_max: float = 3.0
    capacity: int = 16
    right_at: float | None = None
    most_gb: float = 1.0

    def __post_init__(self) -> None:
        for name in ("eta", "mu_max"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not (self.delta >= 0 and math.isfinite(self.delta)):
            raise ValueError(f"delta is a number of nats, at least 0, got {self.delta}")
        _ = self.anchor  # refuses what it does not allow

    @property
    def anchor(self) -> RightAnchor:
        """The stores and replays behind it."""
        return Replays(capacity=self.capacity, right_at=self.right_at, most_gb=self.most_gb)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        right = rollout.everywhere(is_right(rollout.rewards, self.right_at)).cpu()
        scored = rollout.everywhere(~rollout.rewards.isnan()).cpu()
        group = rollout.everywhere(rollout.group).cpu()
        mu = self.multipliers(prompt_numbers(rollout), right, scored, memory)
        is_solved = torch.zeros(int(group.max()) + 1, dtype=torch.long).index_add(0, group, right.long()) > 0
        found = self.anchor.on_rollout(rollout, memory, (mu > 0) & ~is_solved[group])
        own = rollout.here(mu.to(rollout.mask.device))
        factor = (1 + own).to(rollout.advantages)
        return RolloutEffect(
            advantages=rollout.advantages * (factor if rollout.advantages.dim() == 1 else factor.unsqueeze(1)),
            columns={**found.columns, "mu": own},
            shared=found.shared,
            metrics={**found.metrics, "mu": mu.mean(), "held": (mu > 0).to(mu).mean()},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        asked = self.anchor(batch, memory)
        if asked.loss is None:
            return asked
        weighed = asked.loss * batch.columns["mu"].to(asked.loss).unsqueeze(1)
        return Effect(loss=weighed, affected=asked.affected, metrics=asked.metrics)  # "lost" and "nats"

    def multipliers(
        self,
        prompt: Int[Tensor, "N"],
        right: Bool[Tensor, "N"],
        scored: Bool[Tensor, "N"],
        memory: dict,
    ) -> Float[Tensor, "N"]:
        """mu of each row's prompt after this rollout; p0 and mu of all prompts so far stay in memory."""
        known = memory.get("prompt", prompt[:0]).tolist()
        first = dict(zip(known, memory["first"].tolist(), strict=True)) if known else {}
        mu = dict(zip(known, memory["mu"].tolist(), strict=True)) if known else {}
        for x in dict.fromkeys(prompt.tolist()):  # several groups of a rollout may have one prompt
            own = (prompt == x) & scored
            if own.any():
                log_p = math.log((int(right[own].sum()) + 0.5) / (int(own.sum()) + 1))
                lost = first.setdefault(x, log_p) - log_p - self.delta
                mu[x] = min(max(mu.get(x, 0.0) + self.eta * lost, 0.0), self.mu_max)
        memory["prompt"] = torch.tensor(list(first), dtype=torch.long)
        memory["first"] = torch.tensor(list(first.values()), dtype=torch.float64)
        memory["mu"] = torch.tensor([mu[x] for x in first], dtype=torch.float64)
        return torch.tensor([mu.get(x, 0.0) for x in prompt.tolist()], dtype=torch.float32)


class Replays(RightAnchor):
    """The anchor within this term, which tells of itself by this term's name."""

    title: ClassVar[str] = "no_loss"
    of_none_again: ClassVar[str] = (
        "so it compares and holds nothing yet; right_anchor with source: any holds the right answers of all prompts"
    )
