"""Each surrogate's force pulled back to the parameters: F_theta = sum_i J_i^T F_i, J_i = dz_i / dtheta

One more backward pass a surrogate and generation batch, on responses that the dry steps did not see: a step moves the
surrogate by <F_theta, change of the parameters>, and on the responses that it was made from by another amount.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from ..equations.expectations import Vector, products
from ..equations.forces import StepForce, Surrogate, step_force
from ..equations.spectra import drift_budget, relative_drift, spectrum
from ..trainer.keeping import Kept, states, whole_states
from .dry_run import DryRun


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """Of one surrogate."""

    surrogate: Surrogate
    memory: dict  # eps, frozen at the first generation batch
    value: float  # mean over the other responses, as all that follows
    force_norm: float  # ||F|| at the hidden states
    rho: float  # over its bound, in [0, 1]
    live: float  # share of the directions
    above_eps: float | None  # share of the variances above the floor eps; None where there is none
    budget: float | None  # relative drift within which half of the force stays
    noise: float | None  # relative drift between two batches of the same policy
    with_gradients: Float64[Tensor, "J K"]  # <F_j, P G_k>
    with_forces: Float64[Tensor, "J J"]  # <F_j, P F_j'>


def rows_of(run: DryRun, kept: list[Kept]) -> list[Tensor]:
    """The hidden states of each generation batch."""
    return [whole_states(run.trainer, each) for each in kept]


def alone(x: Tensor) -> Tensor:
    """The sum over the one process there is."""
    return x


def pull_back(run: DryRun, kept: Kept, whole: StepForce) -> Vector:
    """F_theta of one generation batch."""
    for rows in states(run.trainer, kept, has_gradient=True):
        force = whole.force(rows)
        (force * rows.to(force)).sum().backward()
    return run.keep()


def pulled(
    run: DryRun,
    weights: Vector | None,
    surrogate: Surrogate,
    eps_relative: float,
    first: Tensor,
    rows: list[Tensor],
) -> Pulled | None:
    """`first`: states of the first generation batch, `rows`: of the others. None where states have no spread."""
    memory: dict = {}
    step_force(surrogate, first, alone, memory, eps_relative)
    found = [step_force(surrogate, each, alone, memory, eps_relative) for each in rows]
    wholes = [each for each in found if each is not None]
    if not wholes or len(wholes) < len(found):
        return None
    forces = [pull_back(run, kept, whole) for kept, whole in zip(run.others, wholes, strict=True)]
    at_states = [whole.force(each) for whole, each in zip(wholes, rows, strict=True)]
    bounded = [whole.at_unit_length(f, z) for whole, f, z in zip(wholes, at_states, rows, strict=True)]
    return Pulled(
        surrogate=surrogate,
        memory=memory,
        value=mean([whole.value().item() for whole in wholes]),
        force_norm=mean([each.norm().item() for each in at_states]),
        rho=mean([f.norm().item() / whole.bound() for f, whole in zip(bounded, wholes, strict=True)]),
        live=mean([whole.live() for whole in wholes]),
        **certificate(wholes),
        with_gradients=products(forces, run.gradients, weights),
        with_forces=products(forces, forces, weights),
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
    noise = [relative_drift(each.moments, first.lower, eps).item() for each in wholes[1:]]
    return {
        "above_eps": above,
        "budget": drift_budget(spectrum(first.moments), eps),
        "noise": mean(noise) if noise else None,
    }


def values(run: DryRun, kept: list[Kept], memories: dict[Surrogate, dict]) -> dict[Surrogate, Tensor]:
    """H of each surrogate on each generation batch, by the policy as it is; NaN where its states have no spread."""
    found: dict[Surrogate, list[float]] = {name: [] for name in memories}
    for rows in rows_of(run, kept):
        for name, memory in memories.items():
            whole = step_force(name, rows, alone, memory)
            found[name].append(float("nan") if whole is None else whole.value().item())
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in found.items()}
