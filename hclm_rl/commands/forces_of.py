"""The forces of a dry run: pulled back, judged and, where asked for, tried out"""

import statistics
from collections.abc import Mapping

from ..chain.chain import Chain
from ..equations.expectations import Estimate, Vector, products
from ..equations.forces import SURROGATES, Surrogate, step_force
from ..recipe.config import GRPOConfig, RLOOConfig
from .diagnosis import Force, Step, balance, force_of
from .dry_run import HALVED_FROM, DryRun, preconditioner
from .mistakes import strengths_of, surrogate_of
from .pulled_back import Pulled, alone, pull_back, pulled, rows_of
from .trial import Tried, changes, with_coefficient


def present_coefs(chain: Chain, log: list[dict]) -> dict[Surrogate, float]:
    """The strength of each surrogate's terms in the dry steps, as they logged it."""
    found: dict[Surrogate, float] = {}
    for link in chain.links:
        of = surrogate_of(link.term)
        if of is not None:
            logged = [entry[f"{link.name}/coef"] for entry in log if f"{link.name}/coef" in entry]
            found[of] = found.get(of, 0.0) + (statistics.fmean(logged) if logged else 0.0)
    return found


def wanted_surrogates(run: DryRun, strongest: Mapping[str, float]) -> tuple[Surrogate, ...]:
    """All of them; of a large model those of the recipe, or the first, because each costs its own backward passes."""
    if sum(each.numel() for each in run.parameters) <= HALVED_FROM:
        return SURROGATES
    return tuple(name for name in SURROGATES if name in strongest) or SURROGATES[:1]


def forces_of(run: DryRun, chain: Chain, config: GRPOConfig | RLOOConfig, tries: bool) -> tuple[list[Force], list[str]]:
    """One each surrogate, and notes on what could not be measured."""
    strongest, eps, _ = strengths_of(chain)
    present = present_coefs(chain, run.log)
    if not any(each.mask.any() for each in (*run.own, *run.others)):
        return [], ["no token of the dry run is trained on, so there are no states to measure"]
    weights, note = preconditioner(run)
    notes = [note] if note else []
    own = products(run.gradients, run.gradients, weights)
    if not own.diagonal().any():
        weights = None  # nothing to divide by
    step = Step(gradients=own, rate=config.learning_rate, kept=statistics.fmean(run.kept_shares))
    names = wanted_surrogates(run, strongest)
    if len(names) < len(SURROGATES):
        notes.append(f"a model of this size: of the surrogates {', '.join(names)} alone")
    first, rows = rows_of(run, run.own[:1])[0], rows_of(run, run.others)
    seen: list[Pulled] = []
    for name in names:
        found = pulled(run, weights, name, eps.get(name, 1e-4), first, rows)
        if found is None:
            notes.append(f"{name}: the states have no spread")
        else:
            seen.append(found)
    tried = try_out(run, seen, step, present) if tries else {}
    return [
        force_of(of, step, present.get(of.surrogate), strongest.get(of.surrogate), tried.get(of.surrogate, []))
        for of in seen
    ], notes


def try_out(
    run: DryRun, seen: list[Pulled], step: Step, present: Mapping[Surrogate, float]
) -> dict[Surrogate, list[Tried]]:
    """The recipe's step; for each surrogate one at its critical coefficient and, in the recipe, one without its term."""
    memories = {of.surrogate: of.memory for of in seen}
    as_it_is = changes(run, run.gradients, step.rate, memories)
    found: dict[Surrogate, list[Tried]] = {}
    for of in seen:
        name, coef = of.surrogate, present.get(of.surrogate, 0.0)
        told = balance(step, of, coef)
        found[name] = [
            tried(
                "the recipe's",
                coef,
                Estimate(-step.rate * told.whole.value, step.rate * told.whole.error),
                as_it_is[name],
            )
        ]
        critical = told.critical()
        others = {"without its term": 0.0} if name in present and coef else {}
        if critical is not None:
            others["at the critical coef"] = critical.value / step.kept
        forces = own_forces(run, of) if others else []
        for what, at in others.items():
            gradients = with_coefficient(run, forces, at - coef, run.kept_shares, run.trainer.args.max_grad_norm)
            change = step.rate * (step.kept * at * told.force.value - told.product.value)
            error = step.rate * told.product.error
            seen_change = changes(run, gradients, step.rate, {name: of.memory})[name]
            found[name].append(tried(what, at, Estimate(change, error), seen_change))
    return found


def own_forces(run: DryRun, of: Pulled) -> list[Vector]:
    """F_theta of the generation batches that the dry steps come from."""
    found = []
    for kept, rows in zip(run.own, rows_of(run, run.own), strict=True):
        whole = step_force(of.surrogate, rows, alone, of.memory)
        assert whole is not None
        found.append(pull_back(run, kept, whole))
    return found


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
