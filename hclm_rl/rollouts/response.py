"""What a rollout gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response. A mapping of `columns` goes to the reward functions and to terms (`Rollout.rows`), row by row."""

    ids: Sequence[int]  # at least one token, at most `Asked.longest`; what tools wrote included
    logps: Sequence[float]  # nats, of each token when it was drawn, at the loss's temperature; 0 where a tool wrote it
    is_trained: Sequence[bool] | None = None  # False: no part in the loss, as what tools wrote; None: all are trained
    prompt: Sequence[int] | None = None  # the tokens that it answers, where not those that were asked
    columns: Mapping[str, object] = field(default_factory=dict)  # the same names for all responses
    talk: object = None  # of a Branch: what the tools know of it
