"""`--try`: the step is taken in a copy, the surrogates are measured before and after, and everything is put back

The step is the optimiser's own: a fresh state sees the gradients of the dry steps one by one, and the last of them moves
the parameters by the recipe's learning rate.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equations.expectations import Estimate, Vector
from ..equations.forces import Surrogate
from .dry_run import DryRun, restored
from .pulled_back import values


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The change of a surrogate by one step, predicted and realised."""

    what: str
    coef: float
    predicted: float
    predicted_error: float
    realised: float  # on other responses than those that the step was made from
    realised_error: float
    realised_own: float  # on those that it was made from


@contextmanager
def step_taken(run: DryRun, gradients: Sequence[Vector], rate: float) -> Iterator[None]:
    """Inside, the parameters are those after the step."""
    wrapped = run.trainer.optimizer
    optimizer: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
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
        yield
    finally:
        optimizer.state = state
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own
        restored(run.parameters, before)


def with_coefficient(
    run: DryRun, forces: Sequence[Vector], more: float, shares: Sequence[float], most: float
) -> list[Vector]:
    """The dry steps' gradients with `more` of the coefficient of a surrogate, as `max_grad_norm` would leave them.

    `forces`: F_theta of the generation batches that the steps come from.
    """
    found = []
    for number, (gradient, share) in enumerate(zip(run.gradients, shares, strict=True)):
        force = forces[number // run.updates]
        raw = [g.float() / share - more * f.float() for g, f in zip(gradient, force, strict=True)]
        norm = torch.stack([each.norm() for each in raw]).norm().item()
        keep = min(1.0, most / (norm + 1e-6)) if most else 1.0
        found.append([each * keep for each in raw])
    return found


def changes(
    run: DryRun, gradients: Sequence[Vector], rate: float, memories: dict[Surrogate, dict]
) -> dict[Surrogate, tuple[Estimate, float]]:
    """Of each surrogate by the step: on other responses, with the error of their mean, and on the step's own."""
    before = values(run, run.others, memories), values(run, run.own, memories)
    with step_taken(run, gradients, rate):
        after = values(run, run.others, memories), values(run, run.own, memories)
    return {name: (estimate(after[0][name] - before[0][name]), (after[1][name] - before[1][name]).mean().item())
            for name in memories}  # fmt: skip


def estimate(of: Tensor) -> Estimate:
    """Mean and standard error."""
    error = (of.var() / len(of)).sqrt().item() if len(of) > 1 else float("nan")
    return Estimate(of.mean().item(), error)
