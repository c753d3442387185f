"""Each surrogate's force pulled back to the parameters: F_theta = sum_i J_i^T F_i, J_i = dz_i / dtheta

One more backward pass a surrogate and generation batch, on responses that the dry steps did not see: a step moves the
surrogate by <F_theta, change of the parameters>, and on the responses that it was made from by another amount.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ..equations.expectations import Vector, of_expectations, products
from ..equations.forces import StepForce, Surrogate, step_force
from ..equations.spectra import drift_budget, relative_drift, spectrum
from ..trainer.keeping import Kept, states, whole_states
from .dry_run import DryRun
from .replay import Gradients, divisor_after, with_more

ROUNDS = 3  # in which the critical coefficient is put into its own equation


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Of one surrogate; G is what the recipe trains on, g the same without this surrogate's term, P and P_g theirs."""

    surrogate: Surrogate
    memory: dict  # eps, frozen at the first generation batch
    value: float  # mean over the other responses, as all that follows
    force_norm: float  # ||F|| at the hidden states
    rho: float  # over its bound, in [0, 1]
    live: float  # share of the directions
    above_eps: float | None  # share of the variances above the floor eps; None where there is none
    budget: float | None  # relative drift within which half of the force stays
    noise: float | None  # relative drift between two batches of the same policy
    with_all: Float64[Tensor, "J K"]  # <F_j, P G_k>
    with_rest: Float64[Tensor, "J K"]  # <F_j, P_g g_k>
    with_forces: Float64[Tensor, "J J"]  # <F_j, P_g F_j'>
    rest: Float64[Tensor, "K K"]  # <g_k, P_g g_l>
    with_own: Float64[Tensor, "J K"] | None  # <F_j, P_g F_k>, F_k of the generation batch of step k: what a term does
    # the products with g and F_k under the P of a step at the critical coefficient, whose moments hold the term too;
    # None where the sign of that coefficient is not told
    critical_rest: Float64[Tensor, "J K"] | None
    critical_own: Float64[Tensor, "J K"] | None
    kept: float  # what max_grad_norm leaves of g
    own: list[Vector]  # F_theta of the dry steps' own generation batches, where it was asked for


@dataclass(frozen=True)
class Side:
    """Gradients and the preconditioner that the optimiser makes of them."""

    gradients: Gradients
    weights: Vector | None
    own: Float64[Tensor, "K K"]


def side(run: DryRun, gradients: Gradients, weights: Vector | None) -> Side:
    """Where no step has any gradient, there is nothing to divide by."""
    own = products(gradients.each, gradients.each, weights)
    return Side(gradients, weights if own.any() else None, own)


def rows_of(run: DryRun, kept: list[Kept]) -> list[Tensor]:
    """The hidden states of each generation batch."""
    return [whole_states(run.trainer, each, run.rows_at_once) for each in kept]


def alone(x: Tensor) -> Tensor:
    """The sum over the one process there is."""
    return x


def pull_back(run: DryRun, kept: Kept, whole: StepForce) -> Vector:
    """F_theta of one generation batch."""
    for rows in states(run.trainer, kept, has_gradient=True, rows_at_once=run.rows_at_once):
        force = whole.force(rows)
        (force * rows.to(force)).sum().backward()
    return run.keep()


def pulled_all(run: DryRun, batches: list[Kept], wholes: list[StepForce]) -> list[Vector]:
    """F_theta of each generation batch."""
    return [pull_back(run, kept, whole) for kept, whole in zip(batches, wholes, strict=True)]


def with_term(run: DryRun, forces: list[Vector], more: float) -> tuple[Gradients, Vector | None]:
    """The dry steps with more of a term, and what the optimiser would then divide by.

    `forces`: of the generation batches of the dry steps.
    """
    made = with_more(run, forces, more)
    gradients = Gradients([run.stored(each, torch.bfloat16) for each in made.each], made.shares)
    return gradients, divisor_after(run, gradients.each)


def at_critical(
    run: DryRun, own: list[Vector], forces: list[Vector], rest: Side, coef: float
) -> list[tuple[Float64[Tensor, "J K"], Float64[Tensor, "J K"]]]:
    """Products with g and with the own forces: with the P of the rest, and in rounds with that of a step at c*."""
    weights, found = rest.weights, []
    for _ in range(ROUNDS + 1):
        with_own = products(forces, own, weights).repeat_interleave(run.updates, dim=1)
        found.append((products(forces, rest.gradients.each, weights), with_own))
        power = rest.gradients.kept * with_own.mean().item()
        if weights is None or power <= 0:
            break
        weights = with_term(run, own, found[-1][0].mean().item() / power - coef)[1]
    return found


def pulled(
    run: DryRun, whole_step: Side, surrogate: Surrogate, coef: float, eps_relative: float, rows: list[list[Tensor]]
) -> Pulled | None:
    """`rows`: states of the dry steps' own generation batches, and of the others. None where any has no spread.

    `coef`: the strength of the surrogate's term in the dry steps.
    """
    memory: dict = {}
    forces_at = [[step_force(surrogate, z, alone, memory, eps_relative) for z in of] for of in rows]
    own, wholes = ([each for each in of if each is not None] for of in forces_at)
    if len(own) + len(wholes) < len(rows[0]) + len(rows[1]):
        return None
    pushed = pulled_all(run, run.own, own) if coef else []
    rest = side(run, *with_term(run, pushed, -coef)) if coef else whole_step
    forces = pulled_all(run, run.others, wholes)
    at_states = [whole.force(each) for whole, each in zip(wholes, rows[1], strict=True)]
    bounded = [whole.at_unit_length(f, z).norm() for whole, f, z in zip(wholes, at_states, rows[1], strict=True)]
    with_rest = products(forces, rest.gradients.each, rest.weights)
    critical: list = [(with_rest, None)]
    if of_expectations(with_rest).is_told_from_0():
        pushed = pushed or pulled_all(run, run.own, own)
        critical = at_critical(run, pushed, forces, rest, coef)
    return Pulled(
        surrogate=surrogate,
        memory=memory,
        value=mean([whole.value().item() for whole in wholes]),
        force_norm=mean([each.norm().item() for each in at_states]),
        rho=mean([norm.item() / whole.bound() for norm, whole in zip(bounded, wholes, strict=True)]),
        live=mean([whole.live() for whole in wholes]),
        **certificate(wholes),
        with_all=products(forces, whole_step.gradients.each, whole_step.weights),
        with_rest=with_rest,
        with_own=critical[0][1],
        with_forces=products(forces, forces, rest.weights),
        rest=rest.own,
        critical_rest=None if critical[-1][1] is None else critical[-1][0],
        critical_own=critical[-1][1],
        kept=rest.gradients.kept,
        own=pushed,
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def certificate(wholes: list[StepForce]) -> dict[str, float | None]:
    """What a relative drift allows, and how much of it is the noise of a batch; of the log-det alone."""
    first = wholes[0]
    if first.surrogate not in ("log_det", "diagonal"):
        return {"above_eps": None, "budget": None, "noise": None}
    directions, eps = first.directions()
    above = (directions > eps).double().mean().item()
    if first.lower is None:
        return {"above_eps": above, "budget": None, "noise": None}
    noise = [relative_drift(each.moments, first.lower, eps).delta for each in wholes[1:]]
    return {
        "above_eps": above,
        "budget": drift_budget(spectrum(first.moments), eps),
        "noise": mean(noise) if noise else None,
    }


def values(run: DryRun, kept: list[Kept], memories: Mapping[Surrogate, dict]) -> dict[Surrogate, Tensor]:
    """H of each surrogate on each generation batch, by the policy as it is; NaN where its states have no spread."""
    return values_at(rows_of(run, kept), memories)


def values_at(batches: list[Tensor], memories: Mapping[Surrogate, dict]) -> dict[Surrogate, Tensor]:
    """The same of the hidden states of each."""
    found: dict[Surrogate, list[float]] = {name: [] for name in memories}
    for rows in batches:
        for name, memory in memories.items():
            whole = step_force(name, rows, alone, memory)
            found[name].append(float("nan") if whole is None else whole.value().item())
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in found.items()}
