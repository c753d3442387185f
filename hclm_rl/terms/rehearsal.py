"""DPH-RL, rehearsal by an f-divergence: Li et al., 2025, arXiv:2509.07430"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import per_token
from ..responses.right_answers import is_right, kept_in, prompt_numbers, tell_of_unclear_rewards
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch
from .right_anchor import RightAnchor

FURTHEST = 20.0  # nats that d is cut to, as the authors' k3 does; here in every mode: exp(d) overflows otherwise


@dataclass(frozen=True, kw_only=True)
class Rehearsal(Term):
    """Prompts that the start always solved are not rewarded but rehearsed: a divergence keeps one right answer of each.

    A prompt is judged when it first comes. If all its responses are right, the first of them is stored with its
    log-probs, and from then on the prompt's own responses get A = 0. Stored texts are read again, d_t = log pi(o_t) now
    less then, and coef times the mean of f_t over their tokens is added:

        forward  f = exp(d) - d - 1, whose mean is KL(start || pi); the gradient exp(d) - 1 pushes up what was lost
        js       f = u log u - (u + 1) log((u + 1) / 2), u = exp(d); in the mean twice the Jensen-Shannon divergence
        alpha    f = (u^(1-a) - (1-a) u - a) / (a (a - 1))

    At d = 0 the gradient is 0, unlike that of fine-tuning on the same texts. The other prompts are plain GRPO; the
    authors have no KL there (`beta: 0`) and clip at 0.2 and 0.28. They sample all prompts before training, from the
    start alone. Here a prompt that first comes later is judged and stored by the policy of then: `fill: 1` takes the
    start alone, of the prompts of one rollout. It is the divergence of the next token along fixed texts, one sample a
    prompt, so it holds one solution of each. Their fourth mode (js_definition), which reads the start on fresh samples
    too, is not here, and their settings for mathematics were not read. A stored row costs one more pass, forward and
    backward; the store takes 28 bytes a prompt, 4 a token of it and 9 a token of its answer, in checkpoints too.

    Args:
        mode: the divergence; the default coefficient is 0.01, of "js" 0.05: the README's, which has 0.01 to 0.05 for
            "forward" and "alpha", 0.05 to 0.2 for "js"
        a: of "alpha", in (0, 1); the authors'
        most: of "forward", what f is cut to, above 0; beyond it, at d below -11 or above 2.6, a token has no gradient;
            the authors'; None for no cut
        checks: of the prompt's responses so many, the first, must be right; None: all; the authors' text has 8, their
            code 4
        fill: optimiser steps in which prompts are judged, at least 1; None: all; ours
        rows: stored texts of a rollout, at least 1; None: as many as a group has; ours, theirs are 512 to 128 prompts
        rewarded: True: prompts in the store keep their advantages too; ours
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1
        most_gb: the store takes no more responses beyond so many 10^9 bytes, and says so once; above 0; ours

    Metrics:
        solved (share): of the prompts judged so far, which are in the store and rehearsed
        divergence (nats): mean divergence of the replayed answers from the start. Healthy: does not rise for long.
            Else: raise `coef`
        kept (responses): number of those in the store
        prompts (prompts): number of those with a response in the store
        bytes (bytes): size of the store, in memory and in each checkpoint
        replayed (responses): number of those that are read in this step
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    rescores_in_loss: ClassVar[bool] = True

    mode: Literal["forward", "js", "alpha"] = "forward"
    a: float = 0.2
    most: float | None = 10.0
    checks: int | None = None
    fill: int | None = None
    rows: int | None = None
    rewarded: bool = False
    right_at: float | None = None
    most_gb: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.a < 1:
            raise ValueError(f"a must be in (0, 1), got {self.a}")
        if self.most is not None and not self.most > 0:
            raise ValueError(f"most must be above 0 or None, got {self.most}")
        for name in ("checks", "fill", "rows"):
            if (given := getattr(self, name)) is not None and given < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {given}")
        if self.right_at is not None and not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward or None, got {self.right_at}")
        self._store()  # refuses what it does not allow

    @property
    def default_coef(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride] (one for each divergence)
        return 0.05 if self.mode == "js" else 0.01

    @property
    def shapes_advantages(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (an option decides)
        return not self.rewarded

    @property
    def least_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] (`checks` decides)
        return max(2, self.checks or 2)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        tell_of_unclear_rewards("rehearsal", rollout, self.right_at, memory)
        prompt = prompt_numbers(rollout)
        chosen = self._to_store(rollout, prompt, memory)
        rows = min(self.rows or rollout.group_rewards.size(1), len(prompt))
        # what is to be stored is all that is right here
        view = replace(rollout, rewards=rollout.here(chosen.to(rollout.rewards)))
        stored = self._store(share=rows / len(prompt)).on_rollout(view, memory)
        kept = kept_in(memory)
        assert kept is not None
        is_stored = rollout.here(torch.isin(prompt, kept.prompt).to(rollout.mask.device))
        solved = len(kept) / max(len(memory.get("judged", ())), 1)
        return RolloutEffect(
            advantages=None if self.rewarded else self._unpaid(rollout, is_stored),
            columns=stored.columns,
            shared=stored.shared,
            metrics={**stored.metrics, "solved": torch.tensor(solved)},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        effect = self._store().__call__(batch, memory)
        if effect.loss is None:
            return effect
        return replace(effect, metrics={"divergence": effect.metrics["nats"]})

    def _store(self, share: float = 1.0) -> "Stored":
        return Stored(source="any", capacity=1, share=share, most_gb=self.most_gb, divergence=self.f)

    def f(self, d: Float[Tensor, "R T"]) -> Float[Tensor, "R T"]:
        """f of each token, d = log pi now less then, in nats."""
        d = d.clamp(-FURTHEST, FURTHEST)
        if self.mode == "forward":
            return (torch.expm1(d) - d).clamp(max=math.inf if self.most is None else self.most)
        u = d.exp()
        if self.mode == "js":
            return u * d - (u + 1) * (torch.nn.functional.softplus(d) - math.log(2))
        return (((1 - self.a) * d).exp() - (1 - self.a) * u - self.a) / (self.a * (self.a - 1))

    def _to_store(self, rollout: Rollout, prompt: Int[Tensor, "N"], memory: dict) -> Bool[Tensor, "N"]:
        """Of the rows of all processes the first of each prompt that came for the first time and is solved."""
        size, known = rollout.group_rewards.size(1), set(memory.get("judged", prompt[:0]).tolist())
        right = is_right(rollout.everywhere(rollout.rewards), self.right_at)
        right = (right & rollout.everywhere(rollout.mask.any(dim=1))).cpu().view(-1, size)
        takes = []
        for number, first in zip(prompt.view(-1, size)[:, 0].tolist(), right[:, : self.checks].tolist(), strict=True):
            takes.append(number not in known and all(first))
            known.add(number)
        if self.fill is not None and rollout.step >= self.fill:
            return torch.zeros_like(right).flatten()
        memory["judged"] = torch.tensor(sorted(known), dtype=torch.long)
        return (torch.tensor(takes).unsqueeze(1) & (torch.arange(size) == 0)).flatten()

    @staticmethod
    def _unpaid(rollout: Rollout, is_stored: Bool[Tensor, "N"]) -> Tensor:
        """The advantages with 0 for the responses to prompts in the store."""
        a = rollout.advantages
        rows = is_stored if a.dim() == 1 else per_token(is_stored, rollout.mask)
        return torch.where(rows, 0.0, a)


@dataclass(frozen=True, kw_only=True)
class Stored(RightAnchor):
    """The store of `right_anchor` with another loss on what it reads again."""

    title: ClassVar[str] = "rehearsal"
    of_room: ClassVar[str] = "raise most_gb"

    divergence: Callable[[Tensor], Tensor]

    @property
    def is_one_sided(self) -> bool:
        return False

    def lost(
        self, first: Float[Tensor, "R T"], now: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]
    ) -> Float[Tensor, "R"]:
        return torch.where(mask, self.divergence(torch.where(mask, now - first, 0.0)), 0.0).sum(dim=1)
