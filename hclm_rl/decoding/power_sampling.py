"""Power sampling, without training: Karan and Du, 2025, arXiv:2510.14901"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .rows import Drawn, draw


@dataclass
class Powered:
    """A response, and what it cost."""

    response: Drawn = field(default_factory=Drawn)
    tokens: int = 0  # drawn in all: the response's own and those of every proposal
    moves: int = 0
    accepted: int = 0  # of the moves


def log_acceptance(old: Drawn, new: Drawn, start: int, alpha: float) -> float:
    """log r of a move that drew the tokens from `start` on anew: it is accepted with probability min(1, r).

    alpha (log p(new) - log p(old)) + log q(old) - log q(new), all from `start` on, p the model at temperature 1 and q
    what was drawn from. Whole texts are compared: one that has ended has no further tokens. The last part is the
    different number of places to choose from.
    """
    gain = math.fsum(new.logps[start:]) - math.fsum(old.logps[start:])
    proposals = math.fsum(old.drawn_logps[start:]) - math.fsum(new.drawn_logps[start:])
    return alpha * gain + proposals + math.log(len(old.ids) / len(new.ids))


@dataclass(frozen=True, kw_only=True)
class PowerSampling:
    """Draws whole texts from p^alpha, normalised: what sharpening alone makes of a model, as the bar for training.

    Tokens are drawn at temperature 1 / alpha, block by block; after each block come moves of Metropolis and Hastings:
    a place among the response's tokens is chosen, all from there on is drawn anew, and the move is accepted with
    probability min(1, r) (`log_acceptance`). Temperature 1 / alpha alone is another distribution: it is greedy about
    the first tokens. No top-p or top-k, since the proposal must cover p.

    The chain is short, so responses depend on its start: look at the share of moves accepted. With `stops_at_end`, as
    in the authors' code, a text that has ended after a block's moves gets no more of them; without, the last block's
    moves are those of a chain whose law is p^alpha of whole texts exactly. The fair opponent is a majority vote of as
    many tokens.

    Args:
        alpha: more than 0; the paper's value; 1 is plain sampling
        moves: after each block, at least 0; the paper's value; most of the gain comes by 2
        blocks: into which the longest response is cut, at least 1; the paper's value, for 3072 tokens
        stops_at_end: whether a text that has ended is left alone from the next block on
    """

    alpha: float = 4.0
    moves: int = 10
    blocks: int = 16
    stops_at_end: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be more than 0 and finite, got {self.alpha}")
        if self.moves < 0 or self.blocks < 1:
            raise ValueError(f"moves must be at least 0 and blocks at least 1, got {self.moves} and {self.blocks}")

    # long: the whole chain in its order, with the one step that it repeats
    def __call__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[random.Random],
        *,
        max_new_tokens: int,
        ends: Sequence[int],
        pad: int,
    ) -> list[Powered]:
        """A response to each prompt (ids), the same whatever the batch."""
        found = [Powered() for _ in prompts]

        def redrawn(rows: Sequence[int], starts: Sequence[int], longest: int) -> list[Drawn]:
            """The responses of the rows, drawn anew from these places on."""
            kept = [found[i].response.cut(start) for i, start in zip(rows, starts, strict=True)]
            contexts = [[*prompts[i], *each.ids] for i, each in zip(rows, kept, strict=True)]
            limits = [longest - start for start in starts]
            mine = [streams[i] for i in rows]
            drawn = draw(model, contexts, mine, limits, ends=ends, pad=pad, temperature=1 / self.alpha)
            for i, each in zip(rows, drawn, strict=True):
                found[i].tokens += len(each.ids)
            return [a + b for a, b in zip(kept, drawn, strict=True)]

        is_done = [False] * len(prompts)
        for block in range(1, self.blocks + 1):
            longest = math.ceil(max_new_tokens * block / self.blocks)
            open_rows = [i for i, each in enumerate(found) if not each.response.is_ended]
            starts = [len(found[i].response.ids) for i in open_rows]
            for i, text in zip(open_rows, redrawn(open_rows, starts, longest) if open_rows else [], strict=True):
                found[i].response = text
            moving = [i for i, done in enumerate(is_done) if not done]
            for _ in range(self.moves if moving else 0):
                starts = [int(streams[i].random() * len(found[i].response.ids)) for i in moving]
                for i, start, text in zip(moving, starts, redrawn(moving, starts, longest), strict=True):
                    log_r = log_acceptance(found[i].response, text, start, self.alpha)
                    found[i].moves += 1
                    # a number for every move: whether log r is 0 or a rounding below it must not shift the stream
                    if streams[i].random() < math.exp(min(log_r, 0.0)):
                        found[i].response = text
                        found[i].accepted += 1
            is_done = [self.stops_at_end and each.response.is_ended for each in found]
        return found
