"""The dry steps' gradients, with more or less of a term in them, and what the recipe's optimiser makes of them"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equations.expectations import Vector
from .dry_run import DryRun, optimizer_of, restored


class Made(Sequence[Vector]):
    """Vectors that are made each time they are asked for: those of a large model are gigabytes together."""

    def __init__(self, count: int, make: Callable[[int], Vector]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Vector:  # type: ignore[override] (no slices)
        if not 0 <= number < self.size:
            raise IndexError(number)
        return self.make(number)


@dataclass(frozen=True)
class Gradients:
    """Of each dry step, clipped, with what `max_grad_norm` left of each."""

    each: Sequence[Vector]
    shares: list[float]

    @property
    def kept(self) -> float:
        """Mean share that the clipping leaves."""
        return sum(self.shares) / len(self.shares)


def with_more(run: DryRun, forces: Sequence[Vector], more: float) -> Gradients:
    """With `more` of the coefficient of a surrogate, as `max_grad_norm` would leave it.

    `forces`: F_theta of the generation batches that the steps come from.
    """
    most, kept, shares = run.trainer.args.max_grad_norm, run.kept_shares, []

    def raw(number: int) -> Iterator[Tensor]:
        """Of a step, before it is clipped."""
        force, share = forces[number // run.updates], kept[number]
        for g, f in zip(run.gradients[number], force, strict=True):
            yield g.float() / share - more * f.float()

    def clipped(number: int) -> Vector:
        return [(each * shares[number]).to(run.gradients[number][0].dtype) for each in raw(number)]

    for number in range(len(run.gradients)):
        norm = torch.stack([each.norm() for each in raw(number)]).norm().item()
        shares.append(min(1.0, most / (norm + 1e-6)) if most else 1.0)
    return Gradients(Made(len(shares), clipped), shares)


@contextmanager
def step_taken(run: DryRun, gradients: Sequence[Vector], rate: float) -> Iterator[Vector]:
    """A fresh optimiser sees the gradients one by one, the last at this learning rate; inside, the parameters are those
    after that step, and what is given are those before it. Everything is put back at the end.
    """
    optimizer = optimizer_of(run)
    before = [each.detach().clone() for each in run.parameters]
    state, rates = optimizer.state, [group["lr"] for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    try:
        for number, gradient in enumerate(gradients, start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate if number == len(gradients) else 0.0
            for each, value in zip(run.parameters, gradient, strict=True):
                each.grad = value.to(each.dtype, copy=True)
            optimizer.step()
        for each in run.parameters:
            each.grad = None
        yield before
    finally:
        optimizer.state = state
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own
        restored(run.parameters, before)


@torch.no_grad()
def turned(parameters: Sequence[torch.nn.Parameter], before: Vector) -> None:
    """Makes of a step the opposite one."""
    for each, old in zip(parameters, before, strict=True):
        each.copy_(2 * old - each)
