"""`--try`: a step is taken in a copy, the surrogates are measured before and after, and everything is put back"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..equations.expectations import Estimate, Vector
from ..equations.forces import Surrogate
from .dry_run import DryRun
from .pulled_back import values
from .replay import step_taken, turned

AS_IT_IS = "the recipe's"  # step
BENT = 0.2  # of the change, from which its bend is said
Values = Mapping[Surrogate, Tensor]  # H on each generation batch


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The change of a surrogate by one step, predicted to first order and realised."""

    what: str
    coef: float
    predicted: float
    predicted_error: float
    realised: float  # on other responses than those that the step was made from
    realised_error: float
    bend: float  # the even part of it, (H(x + d) + H(x - d)) / 2 - H(x): of second order in the step d
    realised_own: float  # on those that it was made from
    bend_error: float = math.nan

    @property
    def straight(self) -> float:
        """(H(x + d) - H(x - d)) / 2, which the prediction is of; what is beyond it is of third order."""
        return self.realised - self.bend

    @property
    def is_bent(self) -> bool:
        """Whether the step is too large for its first order to say what it does: surely, not by rounding."""
        is_told = Estimate(self.bend, self.bend_error).is_told_from_0()
        return is_told and abs(self.bend) > BENT * abs(self.straight)


@dataclass(frozen=True)
class Change:
    """Of a surrogate by a step."""

    others: Estimate
    bend: Estimate
    own: float


def changes(
    run: DryRun, gradients: Sequence[Vector], memories: Mapping[Surrogate, dict], before: tuple[Values, Values]
) -> dict[Surrogate, Change]:
    """Of each surrogate by the step; `before`: its values on other responses, and on the step's own."""
    others, own = before
    with step_taken(run, gradients, run.recipe_rate) as start:
        after, after_own = values(run, run.others, memories), values(run, run.own, memories)
        turned(run.parameters, start)
        opposite = values(run, run.others, memories)
    return {
        name: Change(
            others=estimate(after[name] - others[name]),
            bend=estimate((after[name] + opposite[name]) / 2 - others[name]),
            own=(after_own[name] - own[name]).mean().item(),
        )
        for name in memories
    }


def estimate(of: Tensor) -> Estimate:
    """Mean and standard error."""
    error = (of.var() / len(of)).sqrt().item() if len(of) > 1 else float("nan")
    return Estimate(of.mean().item(), error)


def tried(what: str, coef: float, predicted: Estimate, realised: Change) -> Tried:
    """A row of the table."""
    return Tried(
        what=what,
        coef=coef,
        predicted=predicted.value,
        predicted_error=predicted.error,
        realised=realised.others.value,
        realised_error=realised.others.error,
        bend=realised.bend.value,
        bend_error=realised.bend.error,
        realised_own=realised.own,
    )
