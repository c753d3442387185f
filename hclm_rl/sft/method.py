"""What a method of supervised fine-tuning sees of a micro-batch, and what it gives back."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SftBatch:
    """Column t is about label number t; log-probs and entropies in nats, 0 off the mask."""

    mask: Bool[Tensor, "B T"]  # True where there is a label
    logps: Float[Tensor, "B T"]  # log p of the label, with gradient
    entropy: Float[Tensor, "B T"]  # of the whole next-token distribution, with gradient
    tokens: float  # labels of the optimiser step, all processes: what the trainer divides the sum of the losses by
    tokens_here: float  # the part of them that falls to a micro-batch of a process, on average
    columns: dict[str, Float[Tensor, "B T"]] = field(default_factory=dict)  # what the method read off a teacher


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The trainer's loss is sum(losses) / tokens, so a mean over labels is the plain values, `-logps` say."""

    losses: Float[Tensor, "B T"]
    metrics: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SftMethod:
    """A method: a frozen dataclass whose fields are its hyper-parameters and its YAML."""

    def __call__(self, batch: SftBatch) -> Losses:
        raise NotImplementedError
