"""Draws responses from a model in batches, with a cache from which a branch goes on at any token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..decoding.rows import left_padded
from ..equations.functional import widest
from ..equations.temperature import tempered
from .branch import Branch, Tools
from .cache import Kept, arguments_of, gathered, layers_of, select, unforkable


@dataclass
class Counts:
    """Tokens, counted where they pass."""

    drawn: int = 0  # from the model
    read: int = 0  # that were run through it without a draw: prompts, what tools wrote, what is read a second time
    reused: int = 0  # that a text took from the cache when it went on, instead of running them through the model


def filled(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, longest) of rows that end together, filled up in front with words of their own: a penalty on words that
    stand in the text must not meet a padding, which depends on the batch mates."""
    width = max(map(len, texts))
    return torch.tensor([[text[0]] * (width - len(text)) + list(text) for text in texts], device=device)


@dataclass
class Front:
    """The rows that are being drawn, which end together."""

    rows: list[Branch]
    cache: DynamicCache
    mask: Tensor  # (rows, columns), 1 on tokens, of the cache and of what is read next


class Tempered(LogitsProcessor):
    """Divides by a temperature above 0, however small or large."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tempered(scores, self.temperature)


@dataclass
class Sampler:
    """A model and how its words are drawn: each row by its own stream, so that its batch mates change nothing.

    Up to rounding in the network's own kernels. Log-probs and entropies are those of the whole distribution at
    `temperature`, which is the loss's; `top_k` and the like act on the draw alone, as in TRL.
    """

    model: PreTrainedModel
    ends: Sequence[int]
    pad: int
    longest: int  # tokens of a response
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    likeliest: int = 10  # words of which Branch.of_likeliest is the sum
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        if why := unforkable(self.model):
            raise ValueError(f"a rollout goes on from the middle of a text, which this model cannot do: {why}")
        self._cache_name, self._known = arguments_of(self.model)

    @property
    def words(self) -> int:
        """Of the vocabulary."""
        return self.model.config.get_text_config().vocab_size

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sequence[int]]) -> list[Branch]:
        """A root for each prompt, which is read once: fork it at 0 for each response. Refuses an empty prompt."""
        roots = [Branch(prompt=list(each)) for each in prompts]
        if not all(prompts):
            raise ValueError("every prompt must have at least one token, got an empty one")
        longer = [each for each in roots if len(each.prompt) > 1]  # the last token gives the first draw
        if longer:
            front, ids = self._front(longer, [each.prompt[:-1] for each in longer], [0] * len(longer))
            self.counts.read += sum(len(each.prompt) - 1 for each in longer)
            self._forward(front, ids)
            self._keep(front, range(len(longer)))
        return roots

    def is_open(self, branch: Branch) -> bool:
        """Whether a token may still be drawn: it has not ended and is not as long as allowed."""
        return not branch.is_ended and len(branch.ids) < self.longest

    @torch.no_grad()
    def extend(
        self, branches: Sequence[Branch], *, temperature: float | None = None, with_entropies: bool = True
    ) -> None:
        """Draws each to its end of text or to the longest; `temperature` is another than the loss's.

        Without `with_entropies` those of the tokens drawn may be NaN: with vLLM that saves a pass.
        """
        rows = [each for each in branches if self.is_open(each)]
        if not rows:
            return
        texts = [each.prompt + each.ids for each in rows]
        in_cache = [each.kept.length if each.kept else 0 for each in rows]
        # rows end together and have no hole, so one with a shorter rest reads some of it a second time
        width = max(len(text) - min(n, len(text) - 1) for n, text in zip(in_cache, texts, strict=True))
        found = [max(0, len(text) - width) for text in texts]
        self.counts.reused += sum(found)
        self.counts.read += sum(map(len, texts)) - sum(found) - len(rows)  # the last of each gives the first draw
        front, ids = self._front(rows, texts, found)
        processors = self._processors(self.temperature if temperature is None else temperature)
        while True:
            words = self._draw(front, self._forward(front, ids), processors)
            going = [i for i, each in enumerate(front.rows) if self.is_open(each)]
            self._keep(front, [i for i, each in enumerate(front.rows) if not self.is_open(each)])
            if not going:
                return
            ids = self._advance(front, words, going)

    def complete(self, branches: Sequence[Branch], tools: Tools | None = None) -> None:
        """Draws each to its end, through all turns where there are tools."""
        rows = list(branches)
        while rows:
            self.extend(rows)
            rows = self.answered(rows, tools)

    def answered(self, branches: Sequence[Branch], tools: Tools | None) -> list[Branch]:
        """Those whose last turn called a tool, with its reply, if that has room; the others are done."""
        replies = tools.reply(branches) if tools is not None and branches else [None] * len(branches)
        live = []
        for branch, reply in zip(branches, replies, strict=True):
            if reply is not None and len(branch.ids) + len(reply) <= self.longest:
                branch.take(reply)
                live.append(branch)
        return live

    def _front(self, rows: list[Branch], texts: list[list[int]], found: list[int]) -> tuple[Front, Tensor]:
        """The texts' first `found` tokens in the cache, and the rest of them, which is to be read."""
        rest = [text[n:] for text, n in zip(texts, found, strict=True)]
        ids, present = left_padded(rest, self.pad, self.model.device)
        cache, width = gathered([each.kept for each in rows], found), max(found)
        columns = torch.arange(width, device=ids.device)
        cached = columns >= width - torch.tensor(found, device=ids.device)[:, None]
        mask = torch.cat([cached.to(present.dtype), present], dim=1)
        return Front(rows=rows, cache=cache, mask=mask), ids

    def _forward(self, front: Front, ids: Tensor) -> Tensor:
        """The scores (rows, V) of the next word."""
        return self._scores(front, ids, last=1)[:, 0]

    def _scores(self, front: Front, ids: Tensor, last: int) -> Tensor:
        """The scores (rows, last, V) that the last so many tokens give to the word behind each."""
        width = ids.shape[1]
        given = {"input_ids": ids, "attention_mask": front.mask, self._cache_name: front.cache, "use_cache": True}
        if "position_ids" in self._known:
            given["position_ids"] = (front.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        if "logits_to_keep" in self._known:
            given["logits_to_keep"] = last
        return self.model(**given).logits[:, -last:].float()

    def _processors(self, temperature: float) -> list[LogitsProcessor]:
        """In the order in which `generate` applies them."""
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        if temperature != 1.0:
            found.append(Tempered(temperature))
        if self.top_k:
            found.append(TopKLogitsWarper(top_k=self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(top_p=self.top_p))
        if self.min_p is not None:
            found.append(MinPLogitsWarper(min_p=self.min_p))
        return found

    def _entropies(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """Of log-probs (..., V): the entropies (...), and the sums of -p log p over the likeliest words alone."""
        likeliest = logps.topk(min(self.likeliest, logps.shape[-1])).values
        return torch.special.entr(logps.exp()).sum(dim=-1), torch.special.entr(likeliest.exp()).sum(dim=-1)

    def _draw(self, front: Front, logits: Tensor, processors: Sequence[LogitsProcessor]) -> Tensor:
        """A word (rows, 1) for each row by its own stream."""
        logps = (logits / self.temperature).log_softmax(dim=-1)
        entropies, of_likeliest = self._entropies(logps)
        scores = logits
        if processors:
            texts = filled([each.prompt + each.ids for each in front.rows], logits.device)
            for processor in processors:
                scores = processor(texts, scores)  # pyright: ignore[reportArgumentType]
        wide = widest(logits.device)
        sums = scores.log_softmax(dim=-1).to(wide).exp().cumsum(dim=-1)
        numbers = torch.tensor([each.stream.random() for each in front.rows], dtype=wide, device=logits.device)
        words = torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        seen = (words, logps.gather(1, words), sums[:, -1], entropies, of_likeliest)
        for branch, word, logp, total, entropy, likely in zip(
            front.rows, *(each.flatten().tolist() for each in seen), strict=True
        ):
            if math.isnan(logp + total):
                raise ValueError(
                    f"a response has no distribution to draw token {len(branch.ids)} (counted from 0) from: its scores "
                    "are NaN or infinite; a weight of the model is not finite, or the temperature is too small"
                )
            branch.ids.append(word)
            branch.is_own.append(True)
            branch.logps.append(logp)
            branch.entropies.append(entropy)
            branch.of_likeliest.append(likely)
            branch.is_ended = word in self.ends
        self.counts.drawn += len(front.rows)
        return words

    def _keep(self, front: Front, rows: Sequence[int]) -> None:
        """What the cache holds of these rows, for those that branch off from them."""
        if not rows:
            return
        layers, lengths = layers_of(front.cache, rows), front.mask.sum(dim=1).tolist()
        for place, row in enumerate(rows):
            length = lengths[row]
            start = front.mask.shape[1] - length
            front.rows[row].kept = Kept(layers=layers, row=place, start=start, length=length)

    def _advance(self, front: Front, words: Tensor, going: list[int]) -> Tensor:
        """The rows that go on, and the words just drawn as what is read next."""
        if len(going) < len(front.rows):
            select(front.cache, going)
            front.rows = [front.rows[i] for i in going]
            front.mask, words = front.mask[going], words[going]
        front.mask = torch.cat([front.mask, front.mask.new_ones(len(going), 1)], dim=1)
        return words
