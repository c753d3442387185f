"""The dry steps' gradients, with more or less of a term in them, and what the recipe's optimiser makes of them"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..equations.expectations import Vector
from .dry_run import DryRun, narrowed, optimizer_of, restored


@dataclass(frozen=True)
class Gradients:
    """Of each dry step, clipped, with what `max_grad_norm` left of each."""

    each: list[Vector]
    shares: list[float]

    @property
    def kept(self) -> float:
        """Mean share that the clipping leaves."""
        return sum(self.shares) / len(self.shares)


def with_more(run: DryRun, forces: Sequence[Vector], more: float) -> Gradients:
    """With `more` of the coefficient of a surrogate, as `max_grad_norm` would leave it.

    `forces`: F_theta of the generation batches that the steps come from.
    """
    most, found, shares = run.trainer.args.max_grad_norm, [], []
    for number, (gradient, share) in enumerate(zip(run.gradients, run.kept_shares, strict=True)):
        force = forces[number // run.updates]
        raw = [g.float() / share - more * f.float() for g, f in zip(gradient, force, strict=True)]
        norm = torch.stack([each.norm() for each in raw]).norm().item()
        shares.append(min(1.0, most / (norm + 1e-6)) if most else 1.0)
        found.append(narrowed([each * shares[-1] for each in raw]))
    return Gradients(found, shares)


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
