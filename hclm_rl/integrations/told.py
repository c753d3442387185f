"""What stage 1, in the one process that sees the whole batch, says to stage 2 in the workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# keys of what travels with a row
REWARDS, GROUP_REWARDS, AFFECTED, COLUMN = "rewards", "group_rewards", "affected/", "column/"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What stage 1 and the step say to stage 2: the same for all rows."""

    step: int
    progress: float
    coefs: dict[str, float]
    shared: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, dict] = field(default_factory=dict)
    share: float = 1.0  # of the generation batch in one optimiser step
    seed: int = 0
    masks: tuple[str, ...] = ()  # which of the rows' values are bool: not every trainer carries these


def carried(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows' values as any trainer can carry them. Each is (B, ...)."""
    return {name: value.to(torch.uint8) if value.dtype == torch.bool else value for name, value in rows.items()}


def arrived(rows: Mapping[str, Tensor], told: Told) -> dict[str, Tensor]:
    """The inverse of `carried`. Each is (B, ...)."""
    return {name: value.bool() if name in told.masks else value for name, value in rows.items()}
