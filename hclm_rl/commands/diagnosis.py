"""What `hclm-rl doctor` found: the force of each surrogate read from the log of its dry run, and the page"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ..equations.forces import LEAST_RATIO, Regime, regime

CLEAR = 2.0  # standard errors from 0 at which the sign of the critical coefficient counts
MARGIN = 1.1  # over the critical coefficient, the card's


@dataclass(frozen=True, kw_only=True)
class Force:
    """What the dry run shows of one surrogate; means over its steps."""

    surrogate: str
    value: float
    force_norm: float
    rho: float  # ||F|| over its bound, in [0, 1]
    live: float  # share of the directions
    dead: float | None
    weak: float | None
    drift_budget: float | None  # how far S may move, in units of variance, while half of the force stays
    gradient_norm: float  # of the policy loss at the hidden states
    alignment: float
    critical_coef: float
    critical_coef_error: float  # standard error over the steps
    unsteadiness: float  # deviation of ||F|| over its mean, over the steps; NaN for a single one
    coef: float | None  # of the recipe, where it has this surrogate's term; else that which would be recommended
    is_in_recipe: bool
    regime: Regime
    reason: str
    recommended_coef: float | None
    recommendation: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The whole page."""

    recipe: str
    entropy: float | None = None  # nats, mean over the tokens of the dry run
    tokens_per_step: int | None = None  # of the recipe's optimiser step, at the responses' present length
    width: int | None = None  # D
    forces: list[Force] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)  # what will not work, or not as meant
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.forces and self.entropy is None:
            return "the recipe cannot run as it stands"
        own = [force for force in self.forces if force.is_in_recipe]
        sick = [f"{force.surrogate} is {force.regime}" for force in own if force.regime != "healthy"]
        sick += [] if self.forces else ["no force could be measured"]
        found = f"{len(self.mistakes)} mistake{'s' if len(self.mistakes) != 1 else ''} in the recipe"
        return "; ".join([*sick, found]) if sick or self.mistakes else "nothing to object to"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def unsteadiness(norms: Sequence[float]) -> float:
    """Deviation over mean, as MOST_UNSTEADY limits it; 0 where there is no force."""
    if len(norms) < 2:
        return math.nan
    mean = statistics.fmean(norms)
    return statistics.stdev(norms) / mean if mean > 0 else 0.0


def recommended(critical: float, error: float, force: float, gradient: float) -> tuple[float | None, str]:
    """A `coef` from the critical coefficient, with its reason."""
    if force == 0 or gradient == 0:
        return None, "no coefficient acts" if force == 0 else "no policy gradient in the dry run: more prompts or steps"
    least = MARGIN * LEAST_RATIO * gradient / force
    is_clear = math.isnan(error) or abs(critical) > CLEAR * error
    if critical > 0 and is_clear and MARGIN * critical >= least:
        return MARGIN * critical, f"{MARGIN:g} x the critical coefficient"
    if critical > 0 and is_clear:
        return least, "the critical coefficient would be weak: the least that is not"
    side = "the loss raises this surrogate by itself" if is_clear else "the critical coefficient is not told from 0"
    return least, f"{side}: the least that is not weak"


def gauged(surrogate: str, log: Sequence[dict]) -> list[dict[str, float]]:
    """The gauge's metrics of the dry steps in which it measured both force and gradient."""
    seen = [
        {key.partition("/")[2]: value for key, value in entry.items() if key.startswith(f"{surrogate}/")}
        for entry in log
    ]
    return [each for each in seen if "force_norm" in each and "gradient_norm" in each]


def force_of(surrogate: str, log: Sequence[dict], coef: float | None) -> Force | None:
    """From the gauge's metrics of the dry steps; None where the states had no spread."""
    seen = gauged(surrogate, log)
    if not seen:
        return None

    def mean(name: str) -> float:
        return statistics.fmean(each[name] for each in seen if name in each)

    def optional(name: str) -> float | None:
        return mean(name) if any(name in each for each in seen) else None

    critical, error = mean_and_error([each["critical_coef"] for each in seen])
    force, gradient = mean("force_norm"), mean("gradient_norm")
    wanted, why = recommended(critical, error, force, gradient)
    live = optional("live")
    used = coef if coef is not None else wanted or 0.0
    found, reason = regime(used, force, gradient, mean("alignment"), 1.0 if live is None else live)
    return Force(
        surrogate=surrogate,
        value=mean("value"),
        force_norm=force,
        rho=mean("rho"),
        live=1.0 if live is None else live,
        dead=optional("dead"),
        weak=optional("weak"),
        drift_budget=optional("drift_budget"),
        gradient_norm=gradient,
        alignment=mean("alignment"),
        critical_coef=critical,
        critical_coef_error=error,
        unsteadiness=unsteadiness([each["force_norm"] for each in seen]),
        coef=used,
        is_in_recipe=coef is not None,
        regime=found,
        reason=reason,
        recommended_coef=wanted,
        recommendation=why,
    )


def show(console: Console, of: Diagnosis) -> None:
    """One page."""
    console.print(f"[bold]{of.recipe}[/bold]: {of.verdict}", highlight=False)
    if of.entropy is not None:
        console.print(
            f"policy entropy {of.entropy:.3f} nats; about {of.tokens_per_step} tokens of width {of.width} a step; "
            f"{of.seconds:.0f} s\n",
            highlight=False,
        )
    if of.forces:
        table = Table(title="Forces before training", title_justify="left")
        for column in ("surrogate", "regime", "rho", "live", "critical coef", "coef", "advised"):
            table.add_column(column, no_wrap=column == "surrogate", overflow="fold")
        for each in of.forces:
            coef = f"{each.coef:.2g}" if each.is_in_recipe else "-"
            error = "" if math.isnan(each.critical_coef_error) else f" ± {each.critical_coef_error:.1g}"
            table.add_row(
                each.surrogate, each.regime, f"{each.rho:.2f}", f"{100 * each.live:.0f} %",
                f"{each.critical_coef:.2g}{error}", coef,
                "-" if each.recommended_coef is None else f"{each.recommended_coef:.2g}",
            )  # fmt: skip
        console.print(table)
        for each in of.forces:
            told = f"{each.surrogate}: {each.regime}; {each.reason}"
            if each.drift_budget is not None:
                told += f"; half of the force stays while S moves by less than {each.drift_budget:.2g}"
            console.print(f"{told}. Advised coef: {each.recommendation}.", highlight=False)
    for title, lines in (("Mistakes", of.mistakes), ("Notes", of.notes)):
        if lines:
            console.print(f"\n[bold]{title}[/bold]")
            for each in lines:
                console.print(f"- {each}", highlight=False)
