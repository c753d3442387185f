"""Draws responses by an engine with weights of its own, such as vLLM, and has the policy score what was drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..equations.temperature import tempered
from .branch import Branch
from .cache import Kept, gathered, layers_of
from .sampler import Front, Sampler

AT_ONCE = 2**27  # scores of a pass, (rows, tokens, V): half a GiB in float32


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text that is to go on."""

    ids: list[int]
    most: int  # tokens, at least 1
    seed: int  # of its own, from 0 to 2^63 - 1


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the engine drew; end of text included, if it came."""

    ids: list[int]
    logps: list[float | None]  # nats, of the distribution that was drawn from; None where the engine has no number
    is_ended: bool
    reused: int = 0  # tokens of the request that the engine found in its own cache, as it says


class Engine(Protocol):
    """What draws in the policy's place, with the policy's weights."""

    @property
    def context(self) -> int:
        """Tokens of a request and what is drawn, together."""
        ...

    def draw(self, requests: Sequence[Request], temperature: float) -> list[Continuation]:
        """One for each request, in their order; each depends on its text and seed alone."""
        ...


@dataclass(kw_only=True)
class VllmSampler(Sampler):
    """A sampler whose words come from an engine: one request for each branch, its prompt and tokens so far.

    The engine's own cache of prefixes holds what a branch takes over. Each request has a seed from the branch's stream.
    The log-probs are the engine's, of the distribution that it drew from: TRL weighs tokens by them. Entropies are the
    policy's: it reads what was drawn once, behind keys and values that are kept as in `Sampler`.
    """

    engine: Engine

    def is_open(self, branch: Branch) -> bool:
        return super().is_open(branch) and len(branch.prompt) + len(branch.ids) < self.engine.context

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[Branch]:
        """As in `Sampler`; refuses a prompt that fills the engine's context."""
        longest = max(map(len, prompts), default=0)
        if longest >= self.engine.context:
            raise ValueError(
                f"a prompt has {longest} tokens, and vLLM takes texts of {self.engine.context} with the response: "
                "raise vllm_max_model_length, or leave such prompts out"
            )
        return super().begin(prompts)

    @torch.no_grad()
    def extend(
        self, branches: Sequence[Branch], *, temperature: float | None = None, with_entropies: bool = True
    ) -> None:
        rows = [each for each in branches if self.is_open(each)]
        if not rows:
            return
        drawn_at = self.temperature if temperature is None else temperature
        starts = [len(each.ids) for each in rows]
        found = self.engine.draw([self._request(each) for each in rows], drawn_at)
        for branch, drawn in zip(rows, found, strict=True):
            self._take(branch, drawn)
        if with_entropies or drawn_at != self.temperature or any(None in each.logps for each in found):
            self._score(rows, starts, found, drawn_at)

    def _request(self, branch: Branch) -> Request:
        text = branch.prompt + branch.ids
        most = min(self.longest - len(branch.ids), self.engine.context - len(text))
        return Request(ids=text, most=most, seed=branch.stream.getrandbits(63))

    def _take(self, branch: Branch, drawn: Continuation) -> None:
        """Puts what was drawn behind the branch; what is not yet known of it is NaN."""
        if not drawn.ids:
            raise ValueError(f"vLLM drew no token behind a text of {len(branch.prompt) + len(branch.ids)} tokens")
        self.counts.reused += drawn.reused
        self.counts.read += max(0, len(branch.prompt) + len(branch.ids) - drawn.reused - 1)  # the last: a draw
        self.counts.drawn += len(drawn.ids)
        unknown = [float("nan")] * len(drawn.ids)
        branch.ids += drawn.ids
        branch.is_own += [True] * len(drawn.ids)
        branch.logps += [float("nan") if logp is None else logp for logp in drawn.logps]
        branch.entropies += unknown
        branch.of_likeliest += unknown
        branch.is_ended = drawn.is_ended or drawn.ids[-1] in self.ends

    def _score(
        self, rows: Sequence[Branch], starts: Sequence[int], found: Sequence[Continuation], drawn_at: float
    ) -> None:
        """What the policy says of the tokens from `starts` on.

        Where another temperature than the loss's drew, the engine's log-probs are moved to the loss's by the policy's
        own difference: TRL then weighs the engine's error alone and does not undo the temperature.
        """
        seen = self._read(rows, starts, drawn_at)
        for branch, start, drawn, (own, at_draw, entropies, likely) in zip(rows, starts, found, seen, strict=True):
            pairs = zip(drawn.logps, own, at_draw, strict=True)
            if drawn_at != self.temperature:
                branch.logps[start:] = [here if q is None else min(0.0, q + here - there) for q, here, there in pairs]
            else:
                branch.logps[start:] = [here if q is None else q for q, here, _ in pairs]
            branch.entropies[start:] = entropies
            branch.of_likeliest[start:] = likely

    def _read(self, rows: Sequence[Branch], starts: Sequence[int], drawn_at: float) -> list[list[list[float]]]:
        """For each row, of its tokens from the start on: log-probs at the loss's temperature and at that of the draw,
        entropies, and their sums over the likeliest words. The keys and values are kept."""
        texts = [each.prompt + each.ids for each in rows]
        first = [len(each.prompt) + start - 1 for each, start in zip(rows, starts, strict=True)]  # predicts the first
        cached = [min(each.kept.length if each.kept else 0, at) for each, at in zip(rows, first, strict=True)]
        rest = [text[n:-1] for text, n in zip(texts, cached, strict=True)]
        self.counts.read += sum(map(len, rest))
        front, ids = self._behind(rows, rest, cached)
        targets = torch.full_like(ids, self.pad)
        for row, text, n in zip(targets, texts, cached, strict=True):
            row[: len(text) - n - 1] = torch.tensor(text[n + 1 :], device=ids.device)
        mask, width, before = front.mask, max(1, AT_ONCE // (len(rows) * self.words)), max(cached)
        parts = []
        for at in range(0, ids.shape[1], width):
            front.mask = mask[:, : before + at + width]
            part = ids[:, at : at + width]
            scores = self._scores(front, part, last=part.shape[1])
            parts.append(self._seen(scores, targets[:, at : at + width], drawn_at))
        self._keep_all(front, cached, [len(each) for each in rest])
        seen = torch.cat(parts, dim=2).tolist()  # (4, rows, tokens)
        spans = [(at - n, len(each)) for at, n, each in zip(first, cached, rest, strict=True)]
        return [[kind[i][begin:end] for kind in seen] for i, (begin, end) in enumerate(spans)]

    def _behind(self, rows: Sequence[Branch], rest: list[list[int]], cached: list[int]) -> tuple[Front, Tensor]:
        """The rest of each text right behind the end of its cached part, filled up on the right."""
        device = self.model.device
        cache, before, width = gathered([each.kept for each in rows], cached), max(cached), max(map(len, rest))
        ids = torch.tensor([each + [self.pad] * (width - len(each)) for each in rest], device=device)
        columns, lengths = torch.arange(before + width, device=device), [len(each) for each in rest]
        starts, ends = before - torch.tensor(cached, device=device), before + torch.tensor(lengths, device=device)
        mask = ((columns >= starts[:, None]) & (columns < ends[:, None])).long()
        return Front(rows=list(rows), cache=cache, mask=mask), ids

    def _seen(self, scores: Tensor, words: Tensor, drawn_at: float) -> Tensor:
        """(4, rows, tokens) of scores (rows, tokens, V): what `_read` says of each word."""
        logps = tempered(scores, self.temperature)
        own = logps.gather(2, words[..., None])[..., 0]
        there = own
        if drawn_at != self.temperature:
            there = tempered(scores, drawn_at).gather(2, words[..., None])[..., 0]
        return torch.stack([own, there, *self._entropies(logps)])

    def _keep_all(self, front: Front, cached: Sequence[int], read: Sequence[int]) -> None:
        """What the cache holds of all rows, for those that branch off from them."""
        layers, before = layers_of(front.cache, range(len(front.rows))), max(cached)
        for row, (branch, n, more) in enumerate(zip(front.rows, cached, read, strict=True)):
            branch.kept = Kept(layers=layers, row=row, start=before - n, length=n + more)
