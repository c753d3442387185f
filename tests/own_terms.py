"""Terms of a stranger, as a user's own file would hold them: named by dotted path in a recipe."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from accelerate import PartialState

from hclm_rl import Effect, Rollout, RolloutEffect, Term, TokenBatch, Transcript
from hclm_rl.equations.flow import loss_weights

SEEN: list[torch.Tensor] = []  # gradients at the log-probs, one a micro-batch


@dataclass(frozen=True, kw_only=True)
class TokenWeight(Term):
    """Multiplies the advantage of every response's second token by `weight`, and keeps the gradient at log-probs."""

    weight: float = 1.0

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        batch.logps.register_hook(lambda gradient: SEEN.append(gradient.clone()))
        weights = torch.ones_like(batch.advantages)
        weights[:, 1] = self.weight
        return Effect(advantages=weights * batch.advantages)


ACTING: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []  # one a micro-batch, of Acting


@dataclass(frozen=True, kw_only=True)
class Acting(Term):
    """Keeps, beside the gradient at log-probs, the advantages, the loss's weights of tokens, and what it clips."""

    needs_scores: ClassVar[bool] = True

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(columns={"weights": loss_weights(rollout)})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        batch.logps.register_hook(lambda gradient: SEEN.append(gradient.clone()))
        ACTING.append((batch.advantages, batch.columns["weights"], batch.is_clipped))
        return Effect()


@dataclass(frozen=True, kw_only=True)
class ShapedReward(Term):
    """Rewards times `factor` plus `offset`."""

    factor: float = 1.0
    offset: float = 0.0

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect(rewards=self.factor * rollout.rewards + self.offset)


@dataclass(frozen=True, kw_only=True)
class BreaksAt(Term):
    """Produces a NaN at one step, in one of its quantities."""

    at: int = 1
    quantity: str = "loss"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        broken = torch.full_like(rollout.rewards, torch.nan if rollout.step == self.at else 0.0)
        if self.quantity == "reward":
            return RolloutEffect(rewards=rollout.rewards + broken)
        return RolloutEffect(columns={"side": broken} if self.quantity == "column" else {})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        broken = torch.nan if batch.step == self.at else 0.0
        if self.quantity == "loss":
            return Effect(loss=batch.entropy * broken)
        return Effect(advantages=batch.advantages + broken if self.quantity == "advantage" else None)


@dataclass(frozen=True, kw_only=True)
class Remembers(Term):
    """A bonus that grows with what it has seen: memory of numbers, lists and tensors, and randomness."""

    needs_scores: ClassVar[bool] = True

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mean = float(rollout.everywhere(rollout.rewards).mean())
        memory["history"] = [*memory.get("history", []), mean]
        memory["trace"] = memory.get("trace", torch.zeros(3)) * 0.9 + mean
        noise = rollout.here(torch.rand(rollout.everywhere(rollout.mask).shape, generator=rollout.generator))
        order = rollout.here(torch.arange(len(rollout.everywhere(rollout.rewards))))
        return RolloutEffect(columns={"noise": noise, "order": order})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        strength = float(memory["trace"][0]) + len(memory["history"])
        return Effect(loss=-0.01 * strength * batch.entropy * batch.columns["noise"])


@dataclass(frozen=True, kw_only=True)
class Rarely(Term):
    """Doubles the advantages of every n-th step and leaves the others alone."""

    every: int = 4

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(advantages=batch.advantages * 2) if batch.step % self.every == 0 else Effect()


@dataclass(frozen=True, kw_only=True)
class ReadsVocabulary(Term):
    """A bonus on the Renyi-2 entropy of the whole next-token distribution."""

    needs_vocab_gradient: ClassVar[bool] = True

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        collision = batch.over_vocab(lambda logps: torch.logsumexp(2 * logps, dim=-1))
        shannon = batch.over_vocab(lambda logps: -(logps.exp() * logps).sum(dim=-1))
        gap = torch.where(batch.mask, (shannon - batch.entropy).abs(), 0.0).max()
        return Effect(loss=collision, metrics={"gap_to_entropy": gap.detach()})


READ: list[tuple[torch.Tensor, ...]] = []  # prompts, their mask, log-probs and entropies, one a generation batch


@dataclass(frozen=True, kw_only=True)
class ReadsPrompts(Term):
    """Lets a model read the prompts, and keeps what it said."""

    needs_rescoring: ClassVar[bool] = True

    scorer: str = "policy"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        assert rollout.transcript is not None
        ids, mask = rollout.transcript.prompt_ids, rollout.transcript.prompt_mask
        text = Transcript.of(ids, mask, ids.size(1) - 1)
        READ.append((ids, mask, *rollout.score(text, scorer=self.scorer)))
        return RolloutEffect()


@dataclass(frozen=True, kw_only=True)
class TrapOnOne(Term):
    """A loss of 0 whose gradient is NaN, on the second process alone."""

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        edge = -1.0 if PartialState().process_index == 1 else 1.0
        return Effect(loss=torch.where(batch.logps.detach() > 1e9, (edge + 0 * batch.logps).sqrt(), 0.0))


NOT_A_TERM = 3
