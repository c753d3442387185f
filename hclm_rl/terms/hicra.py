"""HICRA, Hierarchy-Aware Credit Assignment: Wang et al., 2025, arXiv:2509.03646"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from ..equations.functional import in_double, per_token, widest
from ..equations.selections import above_own_quantile
from ..responses.turns import BETWEEN, locate
from ..types import Rollout, RolloutEffect, Term

# A word, or any other character that is no space: punctuation parts a phrase, spaces and newlines do not.
WORD = re.compile(rf"\w+(?:['\u2019]\w+)*|[^\w\s]|{BETWEEN}")
GRAMS = (
    "let me think about", "let me check", "let me verify", "let me try", "let me see if", "let us consider",
    "let's try to", "let's check if", "let's consider the", "we need to find", "we need to determine", "we can use the",
    "wait , maybe", "wait a minute", "but wait ,", "another way to", "an alternative approach is", "on the other hand",
    "if we assume that", "suppose that the", "the key idea is", "this means that", "this implies that",
    "it follows that", "which is a contradiction", "going back to", "i made a mistake", "that can't be right",
    "to double check", "the first step is", "the next step is", "break this down into", "in other words ,",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Hicra(Term):
    """Raises the advantage of planning tokens: more credit in right answers, a lighter penalty in wrong ones.

    A_t = A + alpha |A| on the tokens of a strategic gram, a phrase that steers the reasoning; A elsewhere. Found in the
    text of each turn as whole words, whatever their case and the spaces between them. The phrases gain on both sides of
    a group, so they become likelier whatever the outcome: watch `planning`. `grams` belong to a language and a domain.
    The paper mines its own from right solutions (clusters of 3- to 5-word grams, the 20% that occur in most solutions);
    the default is a short English list made for this library, so mine yours. On weak base models it may hurt (the
    paper's Llama): start it later with a schedule of `coef`. `semantic_entropy` is the entropy, in nats, of which gram
    an occurrence is, over the whole step; every occurrence of every gram counts, nested ones too.

    Args:
        alpha: >= 0; the paper's value
        grams: phrases of one word or more; () with form "verl": uncertain tokens alone
        form: "verl": as a port describes the released code. In right answers (A > 0) longer than their group's mean the
            tokens above the response's quantile 1 - `top` of the entropy count too; A_t = A (1 + alpha sign A) on
            either
        top: of a response's tokens, in (0, 1); the port's, read by "verl"

    Metrics:
        planning (share): of the tokens in a strategic gram. Healthy: above 0, not rising for long. Else: at 0 the
            `grams` are not of this language or domain; where it rises without the reward, the phrases are learnt for
            their own sake: lower `alpha`
        semantic_entropy (nats): of which gram an occurrence is. Healthy: does not fall for long. Else: one phrase takes
            over; lower `alpha`
        grams_found (grams): number of different grams that were found in the step. Healthy: above 0. Else: give `grams`
            of your own
    """

    shapes_advantages: ClassVar[bool] = True

    alpha: float = 0.2
    grams: tuple[str, ...] = GRAMS
    form: Literal["paper", "verl"] = "paper"
    top: float = 0.3

    def caveats(self) -> list[str]:
        if self.form != "verl" or self.top >= 0.03:
            return []
        return [
            f"top {self.top:g} raises one token in {1 / self.top:.0f} of a long right answer, where the port has the "
            "most uncertain 3 in 10"
        ]

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < torch.inf:
            raise ValueError(f"alpha must be >= 0 and finite, got {self.alpha}")
        if not 0 < self.top < 1:
            raise ValueError(f"top must be in (0, 1), got {self.top}")
        if not (self.grams or self.form == "verl") or not all(words_of(gram) for gram in self.grams):
            raise ValueError(f"grams must be one or more phrases of at least one word, got {self.grams}")

    @property
    def needs_scores(self) -> bool:
        return self.form == "verl"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        numbers = {gram: i for i, gram in enumerate(sorted({words_of(gram) for gram in self.grams}))}
        lengths = {len(gram) for gram in numbers}
        counts = torch.zeros(len(numbers), dtype=widest(rollout.mask.device), device=rollout.mask.device)
        is_planning = torch.zeros_like(rollout.mask)
        for row, (text, places) in enumerate(locate(rollout.tokenizer, rollout.ids, rollout.mask)):
            found = list(WORD.finditer(text))
            words = [folded(each.group()) for each in found]
            is_covered = [False] * len(text)
            for length in lengths:
                for first in range(len(words) - length + 1):
                    number = numbers.get(tuple(words[first : first + length]))
                    if number is not None:
                        counts[number] += 1
                        start, end = found[first].start(), found[first + length - 1].end()
                        is_covered[start:end] = [True] * (end - start)
            covered = [t for t, place in enumerate(places) if any(is_covered[slice(*place)])]
            is_planning[row, covered] = True
        counts = rollout.total(counts)
        advantages = per_token(rollout.advantages, rollout.mask)
        is_raised = is_planning
        if self.form == "verl":
            is_raised = is_planning | (self._is_uncertain(rollout) & (advantages > 0))
        return RolloutEffect(
            # A + alpha |A| = A (1 + alpha sign A)
            advantages=torch.where(is_raised, advantages + self.alpha * advantages.abs(), advantages),
            metrics={
                "planning": is_planning.float(),
                "semantic_entropy": semantic_entropy(counts),
                "grams_found": in_double(counts > 0).sum(),
            },
        )

    def _is_uncertain(self, rollout: Rollout) -> Bool[Tensor, "N T"]:
        """Above the entropy at place int((1 - top) n) of a response's n, in responses longer than the group's mean."""
        length = rollout.mask.sum(dim=1)
        groups = rollout.everywhere(length).view(-1, rollout.group_rewards.size(1))
        is_long = length > in_double(groups).mean(dim=1)[rollout.group]
        is_highest = above_own_quantile(rollout.scored()[1], rollout.mask, 1 - self.top, "order")
        return is_highest & is_long.unsqueeze(1)


def words_of(text: str) -> tuple[str, ...]:
    """The words of the text, folded."""
    return tuple(folded(each) for each in WORD.findall(text))


def folded(word: str) -> str:
    """In lower case, with a straight apostrophe."""
    return word.lower().replace("\u2019", "'")


def semantic_entropy(counts: torch.Tensor) -> torch.Tensor:
    """-sum q log q of q = counts / their sum, in nats; 0 where nothing was found."""
    q = counts / counts.sum().clamp(min=1)
    return torch.special.entr(q).sum()
