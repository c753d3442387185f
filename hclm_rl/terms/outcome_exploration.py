"""Outcome-based exploration: Song, Kempe and Munos, 2025, arXiv:2509.06941"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import in_double, per_token, widest
from ..responses.answers import DEFAULT, clusters, equivalence, extractor, of_everyone
from ..responses.right_answers import is_right, prompt_keys, tell_of_unclear_rewards
from ..types import Rollout, RolloutEffect, Term

COUNTS = "counts"  # in the memory: {prompt: {answer: how often it was sampled}}


@dataclass(frozen=True, kw_only=True)
class OutcomeExploration(Term):
    r"""Pays answers that a prompt has seldom been given (history), or makes copies within a group cheaper (batch).

    A'_i = A_i + c b_i, a_i the answer of response i, N(x, a) how often prompt x was answered a, this batch included:

        history  b_i = 1 / sqrt(N(x, a_i)), less a baseline     batch  b_i = -#{j != i : a_j = a_i} / (G - 1)

    Without a readable answer, a score or a token b_i = 0, and such a response is in no count and no mean. Answers alone
    are looked at: where a prompt has one right answer, what it spreads are wrong ones, so c must stay small beside A
    (watch `flipped`). With one pass over the data N is the count within a group.

    Not verified, since the paper's text and code were not at hand: the square root and its bound of 1, G - 1 against G,
    that the bonus joins the advantage and not the reward, and where N begins.

    Args:
        by: what is compared: all that the run has sampled for the prompt, or the group; the paper's two forms
        c: in advantages, >= 0; the paper's
        baseline: of "history": "mean", of the other responses to the prompt; "constant", `b0`; "none" pays all that is
            new and takes from nothing; the paper has the first two
        b0: of baseline "constant"; the paper's for easy data, 0.5 for medium
        skips_settled: no bonus in a group whose one answer is right, which "batch" would push away from it; ours
        answer: regular expression with one group, or dotted path of a function text -> answer or None; default: the
            last \boxed{}, or a text of nothing but whole numbers
        equivalence: of answers; take the verifier's, or writing 1/2 for 0.5 is new; "math_verify" needs hclm-rl[eval]
        capacity: answers kept a prompt, the commonest and of equals the older, >= 1; what was dropped is new again;
            ours
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1

    Metrics:
        flipped (share): of the tokens whose advantage changed its sign. Healthy: near 0. Else: lower the bonus
        empty (share): of the responses without an answer. Healthy: near 0. Else: set `answer`, which must find the
            answers
    """

    shapes_advantages: ClassVar[bool] = True

    by: Literal["history", "batch"] = "history"
    c: float = 0.2
    baseline: Literal["none", "mean", "constant"] = "mean"
    b0: float = 1.0
    skips_settled: bool = True
    answer: str = DEFAULT
    equivalence: Literal["text", "math_verify"] = "text"
    capacity: int = 256
    right_at: float | None = None

    def __post_init__(self) -> None:
        extractor(self.answer)
        equivalence(self.equivalence)
        if not 0 <= self.c < math.inf:
            raise ValueError(f"c must be >= 0 and finite, got {self.c}")
        if not 0 <= self.b0 <= 1:
            raise ValueError(f"b0 must be in [0, 1], as the bonus of a count is, got {self.b0}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.skips_settled:
            tell_of_unclear_rewards("outcome_exploration", rollout, self.right_at, memory)
        size, device = rollout.group_rewards.size(1), rollout.mask.device
        counts = rollout.everywhere(rollout.mask.any(dim=1) & ~rollout.rewards.isnan()).tolist()
        right = rollout.everywhere(is_right(rollout.rewards, self.right_at)).tolist()
        said = of_everyone(rollout, extractor(self.answer))
        answers = [answer if is_in else None for answer, is_in in zip(said, counts, strict=True)]
        groups = [answers[first : first + size] for first in range(0, len(answers), size)]
        seen: list[dict[str, int]] = [{} for _ in groups]
        if self.by == "history":
            keys = prompt_keys(rollout)[::size]
            memory[COUNTS] = self._counted(memory.get(COUNTS, {}), keys, groups)
            seen = [memory[COUNTS][key] for key in keys]
        b = []
        for i, (group, of_prompt) in enumerate(zip(groups, seen, strict=True)):
            is_settled = self.skips_settled and self._is_settled(group, right[i * size : (i + 1) * size])
            b += [0.0] * size if is_settled else self._bonus(group, of_prompt)
        bonus = self.c * rollout.here(torch.tensor(b, dtype=widest(device), device=device)).to(rollout.advantages)
        shaped = rollout.advantages + (bonus if rollout.advantages.dim() == 1 else bonus.unsqueeze(1))
        flipped = per_token(rollout.advantages * shaped < 0, rollout.mask).float()
        empty = torch.tensor([answer is None for answer in answers], device=device)
        return RolloutEffect(
            advantages=shaped, metrics={"flipped": flipped, "empty": rollout.here(in_double(empty)).mean()}
        )

    def _is_settled(self, answers: Sequence[str | None], right: Sequence[bool]) -> bool:
        """Whether there is one answer, and it is right."""
        given = [i for i, answer in enumerate(answers) if answer is not None]
        numbers = clusters([answers[i] for i in given], equivalence(self.equivalence))
        return bool(given) and max(numbers) == 0 and any(right[i] for i in given)

    def _counted(
        self, before: Mapping[str, Mapping[str, int]], keys: Sequence[str], groups: Sequence[Sequence[str | None]]
    ) -> dict[str, dict[str, int]]:
        """The counts with those of this batch."""
        counts = {key: dict(of_prompt) for key, of_prompt in before.items()}
        for key, group in zip(keys, groups, strict=True):
            of_prompt = counts.setdefault(key, {})
            for answer in group:
                if answer is not None:
                    name = self._name(answer, of_prompt)
                    of_prompt[name] = of_prompt.get(name, 0) + 1
        for key in set(keys):
            commonest = sorted(counts[key].items(), key=lambda each: -each[1])  # stable: of equals the older first
            kept = {name for name, _ in commonest[: self.capacity]}
            counts[key] = {name: n for name, n in counts[key].items() if name in kept}
        return counts

    def _name(self, answer: str, known: Mapping[str, int]) -> str:
        """The answer as it was first given."""
        same = equivalence(self.equivalence)
        return answer if answer in known else next((each for each in known if same(each, answer)), answer)

    def _bonus(self, answers: Sequence[str | None], counts: Mapping[str, int]) -> list[float]:
        """b of a group; 0 without an answer."""
        if self.by == "batch":
            numbers = clusters(answers, equivalence(self.equivalence))  # a missing answer is a cluster of its own
            return [-(numbers.count(number) - 1) / max(len(answers) - 1, 1) for number in numbers]
        new = [None if a is None else 1 / math.sqrt(counts.get(self._name(a, counts), 1)) for a in answers]
        given = [b for b in new if b is not None]
        if self.baseline == "mean":  # a response alone is its own measure
            others = max(len(given) - 1, 1)
            return [0.0 if b is None or len(given) == 1 else b - (sum(given) - b) / others for b in new]
        b0 = self.b0 if self.baseline == "constant" else 0.0
        return [0.0 if b is None else b - b0 for b in new]
