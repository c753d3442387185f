"""Majority vote, TTRL, the base of ETTRL: Zuo et al., 2025, arXiv:2504.16084"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import widest
from ..responses.answers import DEFAULT, by_group, clusters, equivalence, extractor
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class MajorityVote(Term):
    r"""Pays 1 to the responses that agree with the answer of most of their group, else 0: no labels.

    y is the most frequent answer of the group's G responses, the first seen among equals; R_i = 1 if answer i equals y.
    A missing answer neither votes nor is paid. majority_ratio = count(y) / G; near 1 with falling accuracy the policy
    has collapsed on its own mistakes. A unanimous group and one without answers get no advantage. It replaces the whole
    reward, so put it first; the verifier's rewards are only logged. ETTRL (arXiv:2508.11356) shapes the advantages
    afterwards, with the term entropy_advantage; its tree rollouts are not part of either. Refuses
    `samples` above the size of the group.

    Args:
        answer: regular expression with one group, or dotted path of a function text -> answer or None; default: the
            last \boxed{}, or a text of nothing but whole numbers
        equivalence: how answers are compared with y; "math_verify", as a verifier would, needs hclm-rl[eval]
        vote_by: the authors' code: 1/2 and 0.5 split the vote; not so in the other
        samples: the first so many responses of each group train, all vote; >= 2, None: all. The authors' 32 of 64.
            Those left out keep their tokens in the loss's denominator

    Metrics:
        majority_ratio (share): of a group that voted for the winner. Healthy: below 1, rising with held-out accuracy.
            Else: near 1 with falling accuracy the policy has collapsed on its own mistakes; stop
        empty (share): of the responses that have no answer. Healthy: near 0. Else: look at the completions; `answer`
            must fit how they end, and max_completion_length must let them end
    """

    shapes_rewards: ClassVar[bool] = True

    answer: str = DEFAULT
    equivalence: Literal["text", "math_verify"] = "text"
    vote_by: Literal["text", "equivalence"] = "text"
    samples: int | None = None

    def __post_init__(self) -> None:
        extractor(self.answer)
        equivalence(self.equivalence)
        if self.samples is not None and self.samples < 2:
            raise ValueError(f"samples must be at least 2 or None, got {self.samples}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        size = rollout.group_rewards.size(1)
        if self.samples is not None and self.samples > size:
            raise ValueError(f"samples must be at most num_generations, {size}, got {self.samples}")
        everyone = rollout.everywhere(rollout.rewards)
        # of each response: its reward, whether it has no answer, and count(y) / G of its group
        table = torch.zeros(len(everyone), 3, dtype=widest(everyone.device))
        for group, answers in by_group(rollout, extractor(self.answer)).items():
            rewards, ratio = self._paid(answers)
            rows = [[r, answer is None, ratio] for r, answer in zip(rewards, answers, strict=True)]
            table[group * size : (group + 1) * size] = table.new_tensor(rows)
        paid, empty, ratio = (rollout.here(column) for column in table.to(everyone.device).unbind(dim=1))
        is_left_out = None
        if self.samples is not None:
            place = torch.arange(len(everyone), device=everyone.device) % size
            is_left_out = rollout.here(place) >= self.samples
        return RolloutEffect(
            rewards=paid.to(everyone.dtype),
            is_left_out=is_left_out,
            metrics={"majority_ratio": ratio.mean(), "empty": empty.mean()},
        )

    def _paid(self, answers: Sequence[str | None]) -> tuple[list[float], float]:
        """The rewards of a group, and the share of its responses that voted for y."""
        same = equivalence(self.equivalence)
        numbers = clusters(answers, same if self.vote_by == "equivalence" else equivalence("text"))
        votes = Counter(n for n, answer in zip(numbers, answers, strict=True) if answer is not None)
        if not votes:
            return [0.0] * len(answers), 0.0
        winner, count = votes.most_common(1)[0]  # of equals the one met first
        elected = answers[numbers.index(winner)]
        assert elected is not None
        return [float(answer is not None and same(answer, elected)) for answer in answers], count / len(answers)
