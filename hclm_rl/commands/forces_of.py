"""The forces of a dry run: pulled back, judged and, where asked for, tried out"""

import statistics
from collections.abc import Mapping

from torch import Tensor

from ..chain.chain import Chain
from ..equations.forces import SURROGATES, Surrogate
from ..recipe.config import GRPOConfig, RLOOConfig
from .diagnosis import Force, balance, change_of_this, force_of
from .dry_run import DryRun, memory_of
from .mistakes import strengths_of, surrogate_of
from .pulled_back import Pulled, pulled, rows_of, side, values_at
from .replay import Gradients, divisor, with_more
from .trial import AS_IT_IS, Tried, changes, tried


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
    if not run.is_large:
        return SURROGATES
    return tuple(name for name in SURROGATES if name in strongest) or SURROGATES[:1]


def forces_of(run: DryRun, chain: Chain, config: GRPOConfig | RLOOConfig, tries: bool) -> tuple[list[Force], list[str]]:
    """One each surrogate, and notes on what could not be measured."""
    strongest, eps, _ = strengths_of(chain)
    present = present_coefs(chain, run.log)
    if not any(each.mask.any() for each in (*run.own, *run.others)):
        return [], ["no token of the dry run is trained on, so there are no states to measure"]
    weights, note = divisor(run)
    notes = [note] if note else []
    step = side(run, Gradients(run.gradients, run.kept_shares), weights)
    names = wanted_surrogates(run, strongest)
    if len(names) < len(SURROGATES):
        notes.append(f"a model of this size: of the surrogates {', '.join(names)} alone")
    rows = [rows_of(run, run.own), rows_of(run, run.others)]
    seen: list[Pulled] = []
    for name in names:
        found = pulled(run, step, name, present.get(name, 0.0), eps.get(name, 1e-4), rows)
        if found is None:
            notes.append(f"{name}: the states have no spread")
        else:
            seen.append(found)
    tried = try_out(run, seen, present, rows) if tries else {}
    return [
        force_of(
            of, run.recipe_rate, present.get(of.surrogate), strongest.get(of.surrogate), tried.get(of.surrogate, [])
        )
        for of in seen
    ], notes


def try_out(
    run: DryRun, seen: list[Pulled], present: Mapping[Surrogate, float], rows: list[list[Tensor]]
) -> dict[Surrogate, list[Tried]]:
    """The recipe's step; for each surrogate one at its critical coefficient and one without its term, if it has any.

    `rows`: as `pulled` has them.
    """
    memories: dict[Surrogate, dict] = {of.surrogate: of.memory for of in seen}
    before = values_at(rows[1], memories), values_at(rows[0], memories)
    as_it_is = changes(run, run.gradients, memories, before)
    memory, rate = memory_of(run), run.recipe_rate
    found: dict[Surrogate, list[Tried]] = {}
    for of in seen:
        name, coef, told = of.surrogate, present.get(of.surrogate, 0.0), balance(of)
        predicted = change_of_this(of.with_all, None, 0.0, rate, memory)
        found[name] = [tried(AS_IT_IS, coef, predicted, as_it_is[name])]
        critical = told.critical()
        others: dict[str, tuple[float, Tensor, Tensor | None]] = {}
        if coef:
            others["without its term"] = 0.0, of.with_rest, None
        if critical is not None and of.critical_rest is not None:
            others["at the critical coef"] = (critical.value, of.critical_rest, of.critical_own)
        for what, (at, with_g, with_own) in others.items():
            realised = changes(run, with_more(run, of.own, at - coef).each, {name: of.memory}, before)[name]
            predicted = change_of_this(with_g, with_own, of.kept * at, rate, memory)
            found[name].append(tried(what, at, predicted, realised))
    return found
