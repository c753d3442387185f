"""What a rollout is asked for and what it gives back: all that the author of one must read."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..types import Term

if TYPE_CHECKING:  # which make what is described here
    from .branch import Branch
    from .sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response. A mapping of `columns` goes to the reward functions and to terms (`Rollout.rows`), row by row."""

    ids: Sequence[int]  # at least one token, at most `Asked.longest`; what tools wrote included
    logps: Sequence[float]  # nats, of each token when it was drawn, at the loss's temperature; 0 where a tool wrote it
    is_trained: Sequence[bool] | None = None  # False: no part in the loss, as what tools wrote; None: all are trained
    prompt: Sequence[int] | None = None  # the tokens that it answers, where not those that were asked
    columns: Mapping[str, object] = field(default_factory=dict)  # the same names for all responses
    talk: object = None  # of a Branch: what the tools know of it


class Tools(Protocol):
    """The tools and environments of the run."""

    def begin(self, branch: "Branch", prompt: int) -> None:
        """Gives a branch that starts at the prompt of this number an environment of its own."""
        ...

    def copy(self, branch: "Branch") -> None:
        """Gives a branch the state that its parent is in now."""
        ...

    def reply(self, branches: Sequence["Branch"]) -> list[list[int] | None]:
        """Runs the tools that the last turn of each calls; the tokens of their replies, None where none was called."""
        ...


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A generation batch of this process."""

    prompts: list[list[int]]  # token ids, one entry a prompt
    responses: int  # to each prompt: exactly so many
    longest: int  # tokens of a response
    sampler: "Sampler"
    # stream(prompt number, any name) -> a source of random numbers, by seed, step and name alone: on any number of
    # processes and after a resume the same
    stream: Callable[..., random.Random]
    raw: list  # the prompts as the data set has them: text, or the messages of a chat
    encode: Callable[[Any], list[int]]  # of such a prompt
    tokenizer: Any
    tools: Tools | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)  # of the strategy's own term; not to be changed here
    entropy: float | None = None  # nats, the policy's mean of the scoring pass before, if a term made one
    progress: float = 0.0  # share of the training done
    step: int = 0  # optimiser step
    notes: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, values: Sequence[float]) -> None:
        """Logs their mean over all processes as `<rollout>/<name>`; call it on every process, with no value if none."""
        self.notes.setdefault(name, []).extend(values)


@dataclass(frozen=True, kw_only=True)
class RolloutStrategy:
    """A way to make responses. Subclass it as a frozen dataclass: the fields are its hyper-parameters and its YAML.

    It draws by the streams of `Asked` alone and leaves the global generators as they are.
    """

    needs_tools: ClassVar[bool] = False  # does nothing without tools or an environment
    takes_tools: ClassVar[bool] = True  # works in a run with tools: it lets `Sampler.complete` finish its branches

    def check(self, responses: int) -> None:
        """Raises ValueError where it cannot make so many responses to a prompt."""

    def term(self) -> Term | None:
        """What it asks of rewards and advantages: a term that runs before the run's own, under the rollout's name."""
        return None

    def __call__(self, asked: Asked) -> Sequence[Response]:
        """All responses to the first prompt, then those to the next."""
        raise NotImplementedError
