"""Responses drawn row by row: each row has its own stream of random numbers, so that its batch mates change nothing."""

import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..equations.functional import widest
from ..equations.temperature import entropy_of, tempered


@dataclass
class Drawn:
    """One response, and of each of its tokens what was seen when it was drawn."""

    ids: list[int] = field(default_factory=list)  # end of text included, if it came
    logps: list[float] = field(default_factory=list)  # nats, of the processed scores at temperature 1
    drawn_logps: list[float] = field(default_factory=list)  # nats, of the distribution that was drawn from
    entropies: list[float] = field(default_factory=list)  # nats, of the model's own distribution at temperature 1
    is_ended: bool = False

    def cut(self, length: int) -> "Drawn":
        """The first so many tokens; less than all of them have no end of text."""
        return Drawn(
            ids=self.ids[:length],
            logps=self.logps[:length],
            drawn_logps=self.drawn_logps[:length],
            entropies=self.entropies[:length],
            is_ended=self.is_ended and length >= len(self.ids),
        )

    def __add__(self, more: "Drawn") -> "Drawn":
        return Drawn(
            ids=self.ids + more.ids,
            logps=self.logps + more.logps,
            drawn_logps=self.drawn_logps + more.drawn_logps,
            entropies=self.entropies + more.entropies,
            is_ended=more.is_ended,
        )


class RowSampler(LogitsProcessor):
    """Draws the next word of each row by the row's own stream and leaves no other; `generate` then takes it greedily.

    A stream gives one number a token of its row and none after its end or limit. Temperature 0 takes the top word.
    Scores that are no distribution, NaN or infinite, are refused with the row.
    """

    def __init__(
        self, streams: Sequence[random.Random], limits: Sequence[int], ends: Sequence[int], temperature: float
    ) -> None:
        self.streams, self.limits, self.ends, self.temperature = streams, limits, frozenset(ends), temperature
        self.rows = [Drawn() for _ in streams]

    def is_open(self, row: int) -> bool:
        """Whether the row has not ended and has room for a token."""
        return not self.rows[row].is_ended and len(self.rows[row].ids) < self.limits[row]

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        logps = scores.float().log_softmax(dim=-1)
        drawn = logps if self.temperature in (0, 1) else tempered(scores, self.temperature)
        is_open = [self.is_open(i) for i in range(len(self.rows))]
        if self.temperature:
            numbers = [stream.random() if on else 0.0 for stream, on in zip(self.streams, is_open, strict=True)]
            wide = widest(scores.device)
            sums = drawn.to(wide).exp().cumsum(dim=-1)
            place = torch.tensor(numbers, dtype=wide, device=scores.device).unsqueeze(1) * sums[:, -1:]
            words = torch.searchsorted(sums, place, right=True).clamp(max=scores.shape[1] - 1)
        else:
            words = logps.argmax(dim=-1, keepdim=True)
        seen = zip(words[:, 0].tolist(), logps.gather(1, words)[:, 0].tolist(), strict=True)
        for i, ((word, logp), q) in enumerate(zip(seen, drawn.gather(1, words)[:, 0].tolist(), strict=True)):
            row = self.rows[i]
            if is_open[i]:
                if math.isnan(logp + q):
                    raise ValueError(
                        f"row {i} of the batch has no distribution to draw token {len(row.ids)} from (both counted "
                        "from 0): its scores are NaN or infinite; a value of the method is too large, or a weight of "
                        "the model is not finite"
                    )
                row.ids.append(word)
                row.logps.append(logp)
                row.drawn_logps.append(q)
                row.is_ended = word in self.ends
        # a row that has reached its limit is closed with an end of text, which is none of its tokens
        closed = [i for i, row in enumerate(self.rows) if not row.is_ended and not self.is_open(i)]
        if closed:
            words = words.clone()
            words[closed] = min(self.ends) if self.ends else 0
        return torch.full_like(scores, -torch.inf).scatter(1, words, 0.0)


class _OwnEntropies(LogitsProcessor):
    """Stands first and keeps the entropies of the model's own distribution, for the rows that still go on."""

    def __init__(self, sampler: RowSampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        for i, entropy in enumerate(entropy_of(scores).tolist()):
            if self.sampler.is_open(i):
                self.sampler.rows[i].entropies.append(entropy)
        return scores


def streams_of(seed: int, rows: Sequence[object]) -> list[random.Random]:
    """A stream for each row, by seed and name alone."""
    return [random.Random(f"{seed}/{row}") for row in rows]


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) of rows that end together. Both (rows, longest prompt). Refuses an empty prompt."""
    if not all(prompts):
        raise ValueError("every prompt must have at least one token, got an empty one")
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(each)) + list(each) for each in prompts]
    mask = [[0] * (width - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside; none of the model's own sampling settings (top-k, penalties, ...)."""
    was_training, settings = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings
        model.train(was_training)


def draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    streams: Sequence[random.Random],
    limits: Sequence[int],
    *,
    ends: Sequence[int],
    pad: int,
    temperature: float = 1.0,
    processors: Sequence[LogitsProcessor] = (),
    use_cache: bool = True,
) -> list[Drawn]:
    """A response of at most so many tokens to each prompt (ids), from the scores that the processors leave.

    The same whatever the batch, up to what rounding in the network's own kernels does to a near tie. Refuses a
    temperature below 0.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    sampler = RowSampler(streams, limits, ends, temperature)
    if max(limits, default=0) < 1:
        return sampler.rows
    for rows in within_context(model, prompts, limits):
        part = RowSampler([streams[i] for i in rows], [limits[i] for i in rows], ends, temperature)
        generate(model, [prompts[i] for i in rows], part, processors=processors, pad=pad, use_cache=use_cache)
        for i, row in zip(rows, part.rows, strict=True):
            sampler.rows[i] = row
    return sampler.rows


def within_context(model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
    """Rows in parts whose longest prompt and longest response fit into the model's context together.

    A row that has closed goes on beside the others, so a long prompt next to a long limit would run over it.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def parts(rows: list[int]) -> list[list[int]]:
        together = max(len(prompts[i]) for i in rows) + max(limits[i] for i in rows)
        if together <= context or len({(len(prompts[i]), limits[i]) for i in rows}) == 1:
            return [rows]
        half = len(rows) // 2
        return [*parts(rows[:half]), *parts(rows[half:])]

    return parts(sorted(range(len(prompts)), key=lambda i: (limits[i], -len(prompts[i]), i)))


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampler: RowSampler,
    *,
    processors: Sequence[LogitsProcessor],
    pad: int,
    use_cache: bool,
) -> None:
    """Fills the sampler's rows."""
    ends, limits = sampler.ends, sampler.limits
    ids, mask = left_padded(prompts, pad, model.device)
    with in_evaluation(model), torch.no_grad():
        model.generate(  # pyright: ignore[reportCallIssue]  (it comes with the concrete classes)
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([_OwnEntropies(sampler), *processors, sampler]),
            max_new_tokens=max(limits),
            do_sample=False,
            use_cache=use_cache,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
        )
