"""The dry steps' gradients, with more or less of a term in them, and what the recipe's optimiser makes of them"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..equations.expectations import Vector
from .dry_run import DryRun, is_by_parameter, optimizer_of, preconditioner, restored
from .stored import parts

# of a gradient, by which it may be off when it is computed anew: a log-det's inverse makes 5e-4 of another order of the
# sums, and what is kept in bfloat16 is off by 2e-3
ROUNDING = 0.02


class Made(Sequence[Tensor]):
    """A vector whose tensors are made each time they are asked for: those of a large model are gigabytes together."""

    def __init__(self, count: int, make: Callable[[int], Tensor]) -> None:
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override] (no slices)
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

    `forces`: F_theta of the generation batches that the steps come from. Where no rewards differed, what is left of a
    step without its term is rounding, which Adam would make a step of, and counts as nothing.
    """
    most, kept, shares, scales = run.trainer.args.max_grad_norm, run.kept_shares, [], []

    def raw(step: int, number: int) -> Tensor:
        """One parameter's, before it is clipped."""
        force, share = forces[step // run.updates], kept[step]
        return run.gradients[step][number].float() / share - more * force[number].float()

    def clipped(step: int, share: float) -> Vector:
        def of(number: int) -> Tensor:
            return (raw(step, number) * share).to(run.gradients[step][number].dtype)

        return Made(len(run.parameters), of)

    for step in range(len(run.gradients)):
        norm = torch.stack([raw(step, number).norm() for number in range(len(run.parameters))]).norm().item()
        shares.append(min(1.0, most / (norm + 1e-6)) if most else 1.0)
        is_rounding = not run.has_rewards and norm <= ROUNDING * run.log[step].get("grad_norm", 0.0)
        scales.append(0.0 if is_rounding else shares[-1])
    return Gradients([clipped(step, scale) for step, scale in enumerate(scales)], shares)


def replayed(run: DryRun, gradients: Sequence[Vector], rate: float) -> Iterator[list[int]]:
    """A fresh optimiser sees the gradients one by one, the last at this learning rate.

    Gives the numbers of the parameters that it has just moved, while it has its moments of them: of a large model some
    at a time, where it takes each by itself, else all. The optimiser is put back at the end, the parameters are not.
    """
    optimizer = optimizer_of(run)
    state, rates = optimizer.state, [group["lr"] for group in optimizer.param_groups]
    sizes = [each.numel() for each in run.parameters]
    try:
        for numbers in parts(sizes) if is_by_parameter(optimizer) else [list(range(len(sizes)))]:
            optimizer.state = defaultdict(dict)
            for count, gradient in enumerate(gradients, start=1):
                for group in optimizer.param_groups:
                    group["lr"] = rate if count == len(gradients) else 0.0
                for number in numbers:
                    each = run.parameters[number]
                    each.grad = gradient[number].to(each.dtype, copy=True)
                optimizer.step()
            for number in numbers:
                run.parameters[number].grad = None
            yield numbers
    finally:
        optimizer.state = state
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = own


def divisor_after(run: DryRun, gradients: Sequence[Vector]) -> Vector | None:
    """The preconditioner of an optimiser that has seen these gradients; None stands for 1."""
    found = (preconditioner(run, numbers)[0] for numbers in replayed(run, gradients, 0.0))
    first = None if isinstance(optimizer_of(run), torch.optim.SGD) else next(found)
    if first is None:
        found.close()
        return None
    rest = itertools.chain.from_iterable(each or () for each in found)
    return run.stored(itertools.chain(first, rest), torch.float32)


def divisor(run: DryRun) -> tuple[Vector | None, str]:
    """The preconditioner after the dry steps, with a sentence where it cannot be read."""
    return (divisor_after(run, run.gradients), "") if run.is_withheld else preconditioner(run)


@contextmanager
def step_taken(run: DryRun, gradients: Sequence[Vector], rate: float) -> Iterator[Vector]:
    """Inside, the parameters are those after the step of a fresh optimiser that sees the gradients one by one, the last
    at this learning rate, and what is given are those before it. Everything is put back at the end.
    """
    before = [each.detach().clone() for each in run.parameters]
    try:
        for _ in replayed(run, gradients, rate):
            pass
        yield before
    finally:
        restored(run.parameters, before)


@torch.no_grad()
def turned(parameters: Sequence[torch.nn.Parameter], before: Vector) -> None:
    """Makes of a step the opposite one."""
    for each, old in zip(parameters, before, strict=True):
        each.copy_(2 * old - each)
