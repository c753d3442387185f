"""Conditional-entropy reasoning utility: Guo, 2025, arXiv:2508.20395"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import in_double, ratio, widest
from ..responses.answers import DEFAULT, answer_of, as_whole, extractor, normalised
from ..responses.turns import ends_of_steps
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch, Total, Transcript


@dataclass(frozen=True, kw_only=True)
class ConditionalEntropy(Term):
    r"""Measures how much each step of a response lowers the uncertainty about its answer; with coef > 0 pays for it.

    H_j = mean entropy, in nats, of the scorer's predictions of the answer's tokens after question, steps 1 to j and
    cue; u_j = H_(j-1) - H_j. `coef` times clip(u_j, -limit, limit) is added to the advantage of the last token of step
    j. H sees no mistakes: a scorer that is certain of something else has a low H too, so look at `nll`, which asks for
    the answer itself. Once an answer stands in the text it is copied: `cuts` drops those steps. Pay only by the frozen
    reference (beta > 0), or the policy learns to be certain of everything. Costs N forward passes a step. Splitter, cue
    and payment are ours.

    Args:
        answer: regular expression with one group, or dotted path of a function text -> answer or None; default: the
            last \boxed{}, or a text of nothing but whole numbers
        answer_column: of the data set: the answer to ask for, as in the paper; None: the response's own
        cue: stands before the answer; ours
        step_end: regular expression; the token in which a match ends, ends a step; ours: blank lines
        step_tokens: instead, a step is so many response tokens; 0: step_end
        most_steps: of a response, >= 1; where there are more, evenly spaced ones
        cuts: leave out the steps in which, or after which, the answer stands in the text
        scorer: the authors' is another model, Qwen3-8B
        limit: nats, > 0; ours
        certain: nats; steps after the first H_j below are `surplus`; ours
        every: optimiser steps between measurements, >= 1

    Attributes:
        default_coef: lambda, ours; at most 0.1; 0 only measures, as the paper does

    Metrics:
        utility_total (nats): H before the first step of a response less H after its last: what the whole reasoning
            tells of the answer. Healthy: above 0. Else: the steps tell nothing; look at `nll_total` before you pay for
            them
        utility_slope (nats a step): slope of H over the steps of a response. Healthy: below 0
        useful_steps (share): of a response's steps that lower H
        surplus (share): of a response's steps after H first fell below `certain`. Healthy: near 0. Else: responses go
            on after the answer is clear
        nll_total (nats): the same as `utility_total` for the answer's own negative log-likelihood. Healthy: above 0.
            Else: the scorer grows certain of something else; do not pay for it
    """

    needs_rescoring: ClassVar[bool] = True
    default_coef: ClassVar[float] = 0.0

    answer: str = DEFAULT
    answer_column: str | None = None
    cue: str = "\n\nThe final answer is "
    step_end: str = r"\n\s*\n"
    step_tokens: int = 0
    most_steps: int = 10
    cuts: bool = True
    scorer: Literal["policy", "reference"] = "policy"
    limit: float = 0.5
    certain: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        extractor(self.answer)
        try:
            re.compile(self.step_end)
        except re.error as error:
            raise ValueError(f"step_end must be a regular expression ({error}), got {self.step_end!r}") from error
        if self.step_tokens < 0 or self.most_steps < 1 or self.every < 1:
            raise ValueError(
                "step_tokens must be >= 0, most_steps and every >= 1, got "
                f"{self.step_tokens}, {self.most_steps} and {self.every}"
            )
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {self.limit}")
        if not 0 <= self.certain < math.inf:
            raise ValueError(f"certain must be >= 0 and finite, got {self.certain}")

    def caveats(self) -> list[str]:
        if self.scorer == "reference":
            return []
        return [
            "it pays by the policy's own certainty, which the policy can raise by being sure of everything; use "
            "scorer: reference with a small beta"
        ]

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if 0 < rollout.step - memory.get("measured_at", rollout.step) < self.every:
            return RolloutEffect()
        memory["measured_at"] = rollout.step
        asked, encode = self._asked(rollout), rollout.tokenizer.encode
        answers = [[] if each is None else encode(each, add_special_tokens=False) for each in asked]
        if self.step_tokens:
            is_end = rollout.mask & (rollout.mask.cumsum(dim=1) % self.step_tokens == 0)
        else:
            is_end = ends_of_steps(rollout.tokenizer, rollout.ids, rollout.mask, re.compile(self.step_end))
        own = (each.tolist() for each in (rollout.ids, rollout.mask, is_end))  # read from the device once
        ends = [
            self._ends(rollout, ids, counts, marks, text) if text and answer else []
            for ids, counts, marks, text, answer in zip(*own, asked, answers, strict=True)
        ]
        entropy, nll = self._read(rollout, answers, ends)
        paid = torch.zeros(rollout.mask.shape, dtype=widest(rollout.mask.device), device=rollout.mask.device)
        count = torch.tensor([len(steps) for steps in ends], device=paid.device)
        gains = entropy[:, :-1] - entropy[:, 1:]
        is_step = torch.arange(gains.size(1), device=paid.device) < count.unsqueeze(1)
        places = [(row, end - 1) for row, steps in enumerate(ends) for end in steps]
        if places:
            row, token = torch.tensor(places, device=paid.device).unbind(dim=1)
            paid[row, token] = gains[is_step].clamp(-self.limit, self.limit).to(paid)
        sums = self._sums(entropy, nll, is_step, count)
        names = ("utility_total", "utility_slope", "useful_steps", "surplus", "nll_total")
        return RolloutEffect(
            columns={"paid": paid.to(rollout.advantages.dtype)},
            metrics={name: Total(sums=(value, sums[-1]), form=ratio) for name, value in zip(names, sums, strict=False)},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "paid" not in batch.columns:
            return Effect()
        return Effect(advantages=batch.advantages + batch.columns["paid"])

    def _sums(
        self,
        entropy: Float[Tensor, "N steps"],
        nll: Float[Tensor, "N steps"],
        is_step: Bool[Tensor, "N gains"],
        count: Int[Tensor, "N"],
    ) -> Float[Tensor, "6"]:
        """What the metrics are made of, summed over the responses that have steps; their number is the last."""
        steps = in_double(count).clamp(min=1)
        rises = in_double(is_step & (entropy[:, :-1] > entropy[:, 1:])).sum(dim=1) / steps
        is_read = torch.nn.functional.pad(is_step, (1, 0), value=True)
        is_certain = is_read & (entropy < self.certain)
        surplus = torch.where(is_certain.any(dim=1), count - is_certain.int().argmax(dim=1), 0) / steps
        total, worse = entropy[:, 0] - entropy[:, -1], nll[:, 0] - nll[:, -1]  # the last one is repeated
        each = (total, slopes(entropy, is_read), rises, surplus, worse, torch.ones_like(rises))
        values = torch.stack([in_double(value) for value in each])
        return torch.where(count > 0, values, 0).sum(dim=1)

    def _asked(self, rollout: Rollout) -> list[str | None]:
        """The answer that is asked for after each step, as text."""
        if self.answer_column is None:
            return [answer_of(text, extractor(self.answer)) for text in rollout.texts]
        if self.answer_column not in rollout.rows[0]:
            raise ValueError(f"the data set has no column '{self.answer_column}', only {', '.join(rollout.rows[0])}")
        given = [row[self.answer_column] for row in rollout.rows]
        return [None if value is None else normalised(str(value)) or None for value in given]

    def _ends(self, rollout: Rollout, ids: list[int], counts: list[bool], is_end: list[bool], asked: str) -> list[int]:
        """The number of completion tokens read at the end of each step of a response."""
        own = [at for at, is_own in enumerate(counts) if is_own]
        if own and ids[own[-1]] in rollout.tokenizer.all_special_ids:
            own.pop()  # the end of the text: nothing is asked behind it
        last = own[-1] if own else -1
        ends = [
            at + 1
            for at in dict.fromkeys([*(at for at, is_last in enumerate(is_end) if is_last), last])
            if 0 <= at <= last
        ]
        if self.cuts:
            stands = as_whole(asked)
            ends = [end for end in ends if not stands.search(normalised(rollout.tokenizer.decode(ids[:end])))]
        if len(ends) > self.most_steps:
            ends = [ends[round((k + 1) * len(ends) / self.most_steps) - 1] for k in range(self.most_steps)]
        return ends

    def _read(
        self, rollout: Rollout, answers: Sequence[list[int]], ends: Sequence[list[int]]
    ) -> tuple[Float[Tensor, "N steps"], Float[Tensor, "N steps"]]:
        """H_j and the mean of -log p of the answer after step j = 0, 1, ..., the last one repeated."""
        assert rollout.transcript is not None
        prompts, present = rollout.transcript.prompt_ids, rollout.transcript.prompt_mask
        most = rollout.everywhere(torch.tensor([len(steps) for steps in ends], device=rollout.mask.device))
        width = int(most.max()) + 1  # the same on all processes, so that all make the same number of passes
        cue = rollout.tokenizer.encode(self.cue, add_special_tokens=False)
        texts, lengths = [], []
        rows = zip(*(each.tolist() for each in (prompts, present, rollout.ids)), strict=True)
        for row, (steps, (asked_ids, is_there, ids)) in enumerate(zip(ends, rows, strict=True)):
            prompt = [token for token, counts in zip(asked_ids, is_there, strict=True) if counts]
            stops = [0, *steps] + [steps[-1] if steps else 0] * (width - len(steps) - 1)
            asked = answers[row] or prompt[-1:]  # what has no answer is read for the number of passes alone
            texts += [prompt + ids[:stop] + cue + asked for stop in stops]
            lengths += [len(asked)] * width
        read, tail = max(map(len, texts)), max(lengths)
        padded = torch.tensor([[0] * (read - len(text)) + text for text in texts], device=rollout.mask.device)
        place = torch.arange(read, device=rollout.mask.device)
        mask = place >= read - torch.tensor([len(text) for text in texts], device=place.device).unsqueeze(1)
        logps, entropy = rollout.score(Transcript.of(padded, mask, tail), scorer=self.scorer)
        is_answer = place[:tail] >= tail - torch.tensor(lengths, device=place.device).unsqueeze(1)
        means = mean_of_rows(in_double(entropy), is_answer), -mean_of_rows(in_double(logps), is_answer)
        return means[0].view(-1, width), means[1].view(-1, width)


def mean_of_rows(values: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "rows"]:
    """Mean over the tokens of each row that count."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1)


def slopes(values: Float[Tensor, "rows M"], mask: Bool[Tensor, "rows M"]) -> Float[Tensor, "rows"]:
    """Of the line through (j, values_j) by least squares, over each row's first values; 0 of a single one."""
    j = torch.arange(values.size(1), dtype=values.dtype, device=values.device)
    centred = torch.where(mask, j - (mask.sum(dim=1, keepdim=True) - 1).to(j) / 2, 0)
    return (centred * torch.where(mask, values, 0)).sum(dim=1) / (centred**2).sum(dim=1).clamp(min=0.5)
