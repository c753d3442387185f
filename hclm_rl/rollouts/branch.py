"""A response under way, which others can branch off from at any of its tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .cache import Kept
from .response import Response


@dataclass(eq=False)
class Branch:
    """What was drawn of a response, what tools wrote into it, and what it took over from another."""

    prompt: list[int]
    stream: random.Random = field(default_factory=random.Random)  # gives one number a token that is drawn
    ids: list[int] = field(default_factory=list)  # end of text included, if it came
    is_own: list[bool] = field(default_factory=list)  # False: a tool wrote it
    # nats, of the whole distribution, at the loss's temperature; with vLLM of that which vLLM drew from
    logps: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)  # nats, of the whole one; NaN where nobody asked for it
    of_likeliest: list[float] = field(default_factory=list)  # nats, sum of -p log p over the likeliest words alone
    parent: "Branch | None" = None
    shared: int = 0  # the first tokens, which it took over from the parent
    is_ended: bool = False
    kept: Kept | None = None
    talk: object = None  # what the tools know of it

    def fork(self, at: int, stream: random.Random) -> "Branch":
        """A branch that goes on behind the first `at` tokens, which are not drawn again.

        Refuses a place behind its end.
        """
        if not 0 <= at <= len(self.ids):
            raise ValueError(f"a branch starts at one of the {len(self.ids)} tokens of its parent, got {at}")
        return Branch(
            prompt=self.prompt,
            stream=stream,
            ids=self.ids[:at],
            is_own=self.is_own[:at],
            logps=self.logps[:at],
            entropies=self.entropies[:at],
            of_likeliest=self.of_likeliest[:at],
            parent=self,
            shared=at,
            kept=self.kept and self.kept.cut(len(self.prompt) + at),
        )

    def take(self, ids: list[int]) -> None:
        """What a tool wrote; the response goes on behind it."""
        self.ids += ids
        self.is_own += [False] * len(ids)
        for values in (self.logps, self.entropies, self.of_likeliest):
            values += [0.0] * len(ids)
        self.is_ended = False

    def response(self, *, trains_prefix: bool = True, **columns: object) -> Response:
        """As the trainer takes it; without `trains_prefix` what it took over has no part in the loss."""
        first = 0 if trains_prefix else self.shared
        return Response(
            ids=self.ids,
            logps=self.logps,
            is_trained=[own and t >= first for t, own in enumerate(self.is_own)],
            columns=columns,
            talk=self.talk,
        )


class Tools(Protocol):
    """The tools and environments of the run."""

    def begin(self, branch: Branch, prompt: int) -> None:
        """Gives a branch that starts at the prompt of this number an environment of its own."""
        ...

    def copy(self, branch: Branch) -> None:
        """Gives a branch the state that its parent is in now."""
        ...

    def reply(self, branches: Sequence[Branch]) -> list[list[int] | None]:
        """Runs the tools that the last turn of each calls; the tokens of their replies, None where none was called."""
        ...
