"""What `hclm-rl doctor` found: each surrogate's force in the step that the recipe's optimiser takes"""

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..equations.expectations import Estimate, of_expectations, square_of_expectation
from ..equations.forces import LEAST_RATIO, MOST_RATIO, Regime, regime
from .pulled_back import Pulled
from .trial import Tried

CLEAR = 2.0  # standard errors from 0 at which a sign counts
MARGIN = 1.1  # over the critical coefficient, the card's


@dataclass(frozen=True, kw_only=True)
class Force:
    """What the dry run shows of one surrogate. Norms and products are at the parameters, in the units of P."""

    surrogate: str
    value: float
    force_norm: float  # ||F|| at the hidden states, as rho and live
    rho: float  # over its bound, in [0, 1]
    live: float  # share of the directions
    above_eps: float | None  # share of the variances above the floor eps
    drift_budget: float | None  # relative drift of the covariance within which half of the force stays
    drift_noise: float | None  # relative drift between two batches of the same policy
    push: float  # |E F|, 0 where it is not told from 0
    gradient: float  # |E g| of the rest; where it is not told from 0, its error
    gradient_is_told: bool
    alignment: float  # with what the rest does
    critical_coef: float | None  # None where the force is not told from 0
    critical_coef_error: float
    change: float  # of the surrogate by a step of the recipe, at its learning rate, first order
    change_error: float
    change_without: float | None  # by a step without this surrogate's term; None where the recipe has none
    coef: float  # of the recipe, where it has this surrogate's term; else that which would be recommended
    is_in_recipe: bool
    regime: Regime
    reason: str
    recommended_coef: float | None
    recommendation: str
    tried: list[Tried] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The whole page."""

    recipe: str
    entropy: float | None = None  # nats, mean over the tokens of the dry run
    tokens_per_step: int | None = None  # of the recipe's optimiser step, at the responses' present length
    width: int | None = None  # D
    cut_off: float | None = None  # share of the responses that ran into the limit
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


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What a step does to one surrogate, with g the gradient of all but this surrogate's term."""

    force: Estimate  # |E F|^2
    gradient: Estimate  # |E g|^2
    product: Estimate  # <E F, E g>
    own: Estimate  # <E F, E F>, one of the two on the step's own responses: what a term's push does to others
    kept: float = 1.0  # what max_grad_norm leaves of the term's push, as of g
    # the force and the product in a step at the critical coefficient, whose second moments hold the term too
    critical_own: Estimate | None = None
    critical_product: Estimate | None = None

    def push(self) -> float:
        """What a coefficient of 1 pushes, kept |E F|; 0 where it is not told from 0."""
        is_told = self.force.value > 0 and self.force.is_told_from_0(CLEAR)
        return self.kept * math.sqrt(self.force.value) if is_told else 0.0

    def pull(self) -> tuple[float, bool]:
        """|E g|, and whether it is told from 0; where it is not, its error stands for it."""
        is_told = self.gradient.value > 0 and self.gradient.is_told_from_0(CLEAR)
        square = self.gradient.value if is_told else max(self.gradient.value, self.gradient.error, 0.0)
        return math.sqrt(square), is_told

    def alignment(self) -> float:
        """-<E F, E g> / (|E F| |E g|) in [-1, 1]: below 0 the rest lowers the surrogate."""
        norms = self.push() * self.pull()[0]
        return max(-1.0, min(1.0, -self.kept * self.product.value / norms)) if norms > 0 else 0.0

    def critical(self) -> Estimate | None:
        """c* = <E F, E g> / (kept <E F, E F>); None where the force is not told from 0.

        Its error is that of the product over the steps and responses, and that of the force.
        """
        force, product = self.critical_own or self.own, self.critical_product or self.product
        power = self.kept * force.value
        if self.push() == 0 or power <= 0:
            return None
        value = product.value / power
        of_force = 0.0 if math.isnan(force.error) else self.kept * value * force.error
        return Estimate(value, math.hypot(product.error, of_force) / power)

    def change(self, coef: float, rate: float) -> float:
        """Of the surrogate by a step at `coef`, to first order, with the second moments of the rest."""
        return rate * (self.kept * coef * self.own.value - self.product.value)


def balance(of: Pulled) -> Balance:
    """From the products of the dry run."""
    force = square_of_expectation(of.with_forces)
    return Balance(
        force=force,
        gradient=square_of_expectation(of.rest),
        product=of_expectations(of.with_rest),
        own=force if of.with_own is None else of_expectations(of.with_own),
        kept=of.kept,
        critical_own=None if of.critical_own is None else of_expectations(of.critical_own),
        critical_product=None if of.critical_rest is None else of_expectations(of.critical_rest),
    )


def whole_change(of: Pulled, rate: float) -> Estimate:
    """By a step of the recipe as it is."""
    found = of_expectations(of.with_all)
    return Estimate(-rate * found.value, rate * found.error)


def change_of_this(with_g: Tensor, with_own: Tensor | None, push: float, rate: float, memory: Tensor) -> Estimate:
    """By the one step that an optimiser makes of the very gradients of the dry run, `memory` its weights of them.

    `push`: kept x coefficient of what the term adds to them. The error is that of the other responses alone.
    """
    added = 0.0 if with_own is None else push * with_own
    of_each = rate * ((added - with_g) * memory).sum(dim=1)
    return of_expectations(of_each.unsqueeze(1), of_left_alone=True)


def recommended(critical: Estimate | None, push: float, pull: float) -> tuple[float | None, str]:
    """A `coef` from the critical coefficient, with its reason; `push` and `pull` per unit of coefficient."""
    if critical is None or push == 0:
        return None, "none acts"
    if pull == 0:
        return None, "no policy gradient in the dry run: more prompts or steps"
    least, most = MARGIN * LEAST_RATIO * pull / push, MOST_RATIO * pull / push
    if not critical.is_told_from_0(CLEAR):
        return least, "the critical coefficient is not told from 0: the least that is not weak"
    if critical.value < 0:
        return least, "the step raises this surrogate by itself: the least that is not weak"
    wanted = MARGIN * critical.value
    if wanted > most:
        return None, f"at {MARGIN:g} x the critical coefficient, {wanted:.2g}, the term would dominate the step"
    if wanted < least:
        return least, "the critical coefficient would be weak: the least that is not"
    return wanted, f"{MARGIN:g} x the critical coefficient"


def force_of(of: Pulled, rate: float, coef: float | None, strongest: float | None, tried: list[Tried]) -> Force:
    """`coef`: of the recipe's term in the dry steps; `strongest`: the strongest that it gets. None: no such term."""
    found, change = balance(of), whole_change(of, rate)
    critical, (pull, is_told), push = found.critical(), found.pull(), found.push()
    wanted, why = recommended(critical, push, pull)
    used = strongest if strongest is not None else wanted or 0.0
    state, reason = regime(used, push, pull, found.alignment())
    return Force(
        surrogate=of.surrogate,
        value=of.value,
        force_norm=of.force_norm,
        rho=of.rho,
        live=of.live,
        above_eps=of.above_eps,
        drift_budget=of.budget,
        drift_noise=of.noise,
        push=push,
        gradient=pull,
        gradient_is_told=is_told,
        alignment=found.alignment(),
        critical_coef=None if critical is None else critical.value,
        critical_coef_error=math.nan if critical is None else critical.error,
        change=change.value,
        change_error=change.error,
        change_without=found.change(0.0, rate) if coef else None,
        coef=used,
        is_in_recipe=strongest is not None,
        regime=state,
        reason=reason if is_told or state in ("dead", "not known") else f"{reason}; that gradient is not told from 0",
        recommended_coef=wanted,
        recommendation=why,
        tried=tried,
    )
