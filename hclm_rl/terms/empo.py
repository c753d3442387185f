"""EMPO, Entropy Minimized Policy Optimization: Zhang et al., 2025, arXiv:2504.05812"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import widest
from ..responses.answers import DEFAULT, by_group, clusters, equivalence, extractor, final_text, repeats
from ..types import Direction, Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class Empo(Term):
    r"""Pays each response the share of its group that gives the same answer: no labels, semantic entropy falls.

    r_i = |cluster of i| / G, in the order of the group: an answer joins the first cluster whose first member it equals.
    H = -sum_c p(c) ln p(c), p(c) = |c| / G; a group outside the gate gets r = 0 throughout, so no advantage, and one
    below `min_max_share` r = 0 but for missing answers, which get `empty_reward`. A missing answer is a cluster of its
    own. It replaces the whole reward, so put it first; the verifier's rewards are only logged. Agreement is not truth:
    watch `majority_share` against held-out accuracy. The defaults are the authors' TRL code for mathematics; their verl
    code is empty_reward None and gate "none" (with filtering, min_max_share 0.3), their TRL code for free-form answers
    empty_reward -0.5, gate "none", min_max_share 0.2 and max_overlap 0.8.

    Args:
        answer: regular expression with one group, or dotted path of a function text -> answer or None; default: the
            last \boxed{}, or a text of nothing but whole numbers
        equivalence: "math_verify", as the authors' on mathematics, needs [eval]
        empty_reward: of a missing answer; their TRL code's (free-form -0.5); None: 1 / G
        gate: closed where no two answers agree; the TRL code's
        min_max_share: in [0, 1]; closed where the largest cluster is smaller, but for missing answers; free-form 0.2,
            verl 0.3
        delta_low: nats; open only where delta_low < H < delta_high, the paper's form, which gives no numbers
        delta_high: nats; see `delta_low`
        max_overlap: in [0, 1]; an answer gets 0 if more than this share of its words repeats the question (ROUGE-L
            precision), or all of it stands there; free-form 0.8. For short answers leave it out: "4" stands in many
            questions

    Metrics:
        empty (share): of the responses that have no answer. Healthy: near 0. Else: look at the completions; `answer`
            must fit how they end, and max_completion_length must let them end
        semantic_entropy (nats): of which answer a response to a prompt gives, mean over prompts; falling is the
            method's goal. Healthy: above 0. Else: at 0 every group agrees and there is no advantage left
        majority_share (share): of a group that gives its commonest answer. Healthy: rises with held-out accuracy. Else:
            agreement without accuracy is collapse on mistakes; stop
        gated (share): of the prompts whose group is outside the gate and pays nothing. Healthy: not near 1. Else: set
            gate "none", or take easier prompts
    """

    seeks: ClassVar[Direction | None] = "less"
    shapes_rewards: ClassVar[bool] = True

    answer: str = DEFAULT
    equivalence: Literal["text", "math_verify"] = "text"
    empty_reward: float | None = 0.0
    gate: Literal["all_distinct", "none"] = "all_distinct"
    min_max_share: float = 0.0
    delta_low: float | None = None
    delta_high: float | None = None
    max_overlap: float | None = None

    def __post_init__(self) -> None:
        extractor(self.answer)
        equivalence(self.equivalence)
        if self.empty_reward is not None and not math.isfinite(self.empty_reward):
            raise ValueError(f"empty_reward must be finite or None, got {self.empty_reward}")
        for name in ("min_max_share", "max_overlap"):
            value = vars(self)[name]
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name in ("delta_low", "delta_high"):
            value = vars(self)[name]
            if value is not None and math.isnan(value):
                raise ValueError(f"{name} must be a number of nats or None, got {value}")
        if self.delta_low is not None and self.delta_high is not None and self.delta_low >= self.delta_high:
            raise ValueError(f"delta_low must be below delta_high, got {self.delta_low} and {self.delta_high}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        size = rollout.group_rewards.size(1)
        questions = dict(zip(rollout.group.tolist(), map(final_text, rollout.prompts), strict=False))
        everyone = rollout.everywhere(rollout.rewards)
        # of each response: its reward, whether it has no answer, and of its group: H, the largest share, closed or not
        table = torch.zeros(len(everyone), 5, dtype=widest(everyone.device))
        for group, answers in by_group(rollout, extractor(self.answer)).items():
            paid, *of_group = self._paid(answers, questions.get(group, ""))
            rows = [[r, answer is None, *of_group] for r, answer in zip(paid, answers, strict=True)]
            table[group * size : (group + 1) * size] = table.new_tensor(rows)
        rewards, *others = (rollout.here(column) for column in table.to(everyone.device).unbind(dim=1))
        names = ("empty", "semantic_entropy", "majority_share", "gated")
        return RolloutEffect(
            rewards=rewards.to(everyone.dtype),
            metrics={name: values.mean() for name, values in zip(names, others, strict=True)},
        )

    def _paid(self, answers: Sequence[str | None], question: str) -> tuple[list[float], float, float, bool]:
        """The rewards of a group, its H in nats, its largest share, and whether the gate is closed."""
        numbers = clusters(answers, equivalence(self.equivalence))
        sizes = Counter(numbers)
        shares = {number: count / len(numbers) for number, count in sizes.items()}
        entropy = -sum(share * math.log(share) for share in shares.values())
        largest = max(shares.values())
        low = -math.inf if self.delta_low is None else self.delta_low
        high = math.inf if self.delta_high is None else self.delta_high
        # not H = ln G: in floating point a group of 6 or 7 different answers falls short of it
        is_scattered = self.gate == "all_distinct" and len(sizes) == len(numbers)
        if is_scattered or not low < entropy < high:
            return [0.0] * len(numbers), entropy, largest, True
        is_below = largest < self.min_max_share
        paid = [0.0 if is_below else shares[number] for number in numbers]
        for i, answer in enumerate(answers):
            if answer is None:
                paid[i] = paid[i] if self.empty_reward is None else self.empty_reward
            elif self.max_overlap is not None and repeats(question, answer, self.max_overlap):
                paid[i] = 0.0
        return paid, entropy, largest, is_below
