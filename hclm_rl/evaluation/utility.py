"""Conditional-entropy reasoning utility: 2025, arXiv:2508.20395

How the entropy of the answer falls over the steps of a chain, the reference answer being known: a diagnostic of chains
that are already written, not a reward at test time. Splitting, cue and cutting are this library's.
"""

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..responses.answers import as_whole, normalised

CUE = "\n\nThe final answer is "
SETTLED = 0.1  # nats; below it, further steps are surplus length


@dataclass(frozen=True, kw_only=True)
class Utility:
    """One chain: after 0, 1, ..., J steps, means over the answer's tokens."""

    entropies: tuple[float, ...]  # H_j, nats: how unsure the scorer is, be it right or wrong
    losses: tuple[float, ...]  # N_j = -log p(answer), nats: low only where it is sure of the right answer

    @property
    def steps(self) -> list[float]:
        """u_j = H_{j-1} - H_j"""
        return [before - after for before, after in zip(self.entropies, self.entropies[1:], strict=False)]

    @property
    def total(self) -> float:
        """H_0 - H_J"""
        return self.entropies[0] - self.entropies[-1]

    @property
    def slope(self) -> float:
        """Of H_j against j by least squares; NaN for a chain without steps."""
        j = np.arange(len(self.entropies))
        return float(np.polyfit(j, self.entropies, 1)[0]) if len(j) > 1 else float("nan")

    @property
    def monotone_share(self) -> float:
        """Share of the steps with u_j > 0; NaN for a chain without steps."""
        return float(np.mean([u > 0 for u in self.steps])) if self.steps else float("nan")

    @property
    def settled(self) -> int | None:
        """The first j with H_j below 0.1 nats; None if there is none."""
        return next((j for j, entropy in enumerate(self.entropies) if entropy < SETTLED), None)


def answer_scores(logps: Float[Tensor, "m V"], answer: Int[Tensor, "m"]) -> tuple[float, float]:
    """(H, N): mean entropy and mean loss of the answer's tokens under the distributions that predict them."""
    entropies = torch.special.entr(logps.exp()).sum(dim=-1)
    losses = -logps.gather(1, answer[:, None])[:, 0]
    return entropies.mean().item(), losses.mean().item()


def split_steps(chain: str) -> list[str]:
    """At blank lines; a chain without one, at the ends of its sentences. The parts joined are the chain."""
    parts = re.split(r"(?<=\n\n)(?=[^\n])", chain)
    return parts if len(parts) > 1 else re.split(r"(?<=[.!?]\s)(?=\S)", chain)


def before_answer(steps: Sequence[str], answer: str) -> list[str]:
    """The steps up to the first that states the answer: from there on it is copied, not found."""
    states = as_whole(normalised(answer))
    first = next((j for j, step in enumerate(steps) if states.search(normalised(step))), len(steps))
    return list(steps[:first])


@torch.no_grad()
def measure_utility(  # long: one cache from its filling to its last use
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    steps: Sequence[str],
    answer: str,
    *,
    cue: str = CUE,
) -> Utility:
    """Scores `answer` after the question and after each step. Use a frozen scorer; cut the steps by `before_answer`.

    The chain is read once; for each boundary, the last one first, the cache is cropped to it and only cue and answer
    are read again. Question, steps, cue and answer are tokenised apart, so boundaries are those of the text. Refuses a
    question, cue or answer without a token.
    """

    def ids_of(text: str, special: bool = False) -> Tensor:
        found = tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        assert isinstance(found, Tensor)
        return found.long().to(model.device)

    parts = [ids_of(question, special=True), *map(ids_of, steps)]
    ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0).tolist()
    tail, target = ids_of(cue), ids_of(answer)
    if not target.shape[1] or not tail.shape[1] or not ends[0]:
        raise ValueError(
            f"question, cue and answer must have a token each, got {ends[0]}, {tail.shape[1]} and {target.shape[1]}"
        )
    asked = torch.cat([tail, target], dim=1)
    cache = DynamicCache()
    # transformers 5.24 renames the argument
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    read = functools.partial(model, use_cache=True, **{name: cache})
    read(input_ids=torch.cat(parts, dim=1))
    found = []
    for end in reversed(ends):
        if surplus := cache.get_seq_length() - end:
            cache.crop(-surplus)
        logits = read(input_ids=asked).logits
        predicting = logits[0, tail.shape[1] - 1 : -1]
        found.append(answer_scores(predicting.float().log_softmax(dim=-1), target[0]))
    entropies, losses = zip(*reversed(found), strict=True)
    return Utility(entropies=entropies, losses=losses)
