"""`--try`: a step is taken in a copy, the surrogates are measured before and after, and everything is put back"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..equations.expectations import Estimate, Vector
from ..equations.forces import Surrogate
from .dry_run import DryRun
from .pulled_back import values
from .replay import step_taken


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


def changes(
    run: DryRun, gradients: Sequence[Vector], memories: Mapping[Surrogate, dict]
) -> dict[Surrogate, tuple[Estimate, float]]:
    """Of each surrogate by the step: on other responses, with the error of their mean, and on the step's own."""
    before = values(run, run.others, memories), values(run, run.own, memories)
    with step_taken(run, gradients, run.recipe_rate):
        after = values(run, run.others, memories), values(run, run.own, memories)
    return {
        name: (estimate(after[0][name] - before[0][name]), (after[1][name] - before[1][name]).mean().item())
        for name in memories
    }


def estimate(of: Tensor) -> Estimate:
    """Mean and standard error."""
    error = (of.var() / len(of)).sqrt().item() if len(of) > 1 else float("nan")
    return Estimate(of.mean().item(), error)


def tried(what: str, coef: float, predicted: Estimate, realised: tuple[Estimate, float]) -> Tried:
    """A row of the table."""
    others, own = realised
    return Tried(
        what=what,
        coef=coef,
        predicted=predicted.value,
        predicted_error=predicted.error,
        realised=others.value,
        realised_error=others.error,
        realised_own=own,
    )
