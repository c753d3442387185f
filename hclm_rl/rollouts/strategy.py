"""What a rollout is asked for, and what one is; response.py has what it gives back."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..types import Term
from .branch import Tools
from .response import Response
from .sampler import Sampler

__all__ = ["Asked", "Response", "RolloutStrategy", "Tools"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A generation batch of this process."""

    prompts: list[list[int]]  # token ids, one entry a prompt
    responses: int  # to each prompt: exactly so many
    longest: int  # tokens of a response
    sampler: Sampler
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
        """What it asks of rewards and advantages: a term under the rollout's name, which runs before the run's own, or
        behind them where it shapes advantages."""
        return None

    def __call__(self, asked: Asked) -> Sequence[Response]:
        """All responses to the first prompt, then those to the next."""
        raise NotImplementedError
