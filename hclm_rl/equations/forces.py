"""One interface to the forces of all surrogates, and the regime that a force is in

    log_det          0.5 logdet(S + eps I)        on states
    diagonal         0.5 sum_j log(S_jj + eps)    on states
    variance         tr(S)                        on states
    feature_softmax  mean entropy of softmax(z)   on each state alone
    coding_rate      0.5 logdet(I + D/e2 C)       on unit states
    von_neumann      -tr(C log C)                 on unit states

A `StepForce` holds what the whole optimiser step says of the states; `force` is dH/dz of any of its rows, tangential
for those on unit states. `bound` is the greatest norm that the force could have, so that rho = ||F|| / bound in [0, 1]
says before training how far from its best the surrogate works. Bounds and regimes are derived here; the card's are
those of the log-det and the names weak and misaligned (HCLM, Tran, 2026, arXiv:2605.22940).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from . import surrogates
from .functional import in_double
from .geometry import (
    Factor,
    Moments,
    Scalar,
    cholesky,
    covariance,
    eigenvalues,
    floor_from,
    force_norm_per_token,
    has_spread,
    moments_everywhere,
)
from .rows import pieces
from .spectra import force_bound, spectrum

Surrogate = Literal["log_det", "diagonal", "variance", "feature_softmax", "coding_rate", "von_neumann"]
SURROGATES: tuple[Surrogate, ...] = (
    "log_det",
    "diagonal",
    "variance",
    "feature_softmax",
    "coding_rate",
    "von_neumann",
)
ON_UNIT_STATES = ("coding_rate", "von_neumann")
DISTORTION = 0.5  # of the coding rate: e2, the public code's value
EMPTY = 1e-4  # of the mean variance: a direction below it is dead to surrogates without a floor of their own


@dataclass(frozen=True)
class Strengths:
    """The forces of all rows, in numbers."""

    norms: Float[Tensor, "N"]  # ||F_i||
    power: Scalar  # sum of their squares
    bounded: Scalar  # the same in the units of `bound`
    leverages: Float[Tensor, "N"] | None  # l_i, of the log-det


@dataclass(frozen=True)
class StepForce:
    """A surrogate and the statistics of the step: value, force and bound."""

    surrogate: Surrogate
    moments: Moments  # of the states, or of the unit states
    eps: float  # floor of log_det and diagonal
    values: Scalar | None = None  # mean feature-softmax entropy of the step, which moments do not hold
    lower: Float[Tensor, "D D"] | None = None  # Cholesky factor of S + eps I, for log_det; of C + e2/D I, coding_rate
    push: Float[Tensor, "D D"] | None = None  # -2 log C, for von_neumann
    eigenvalues: Float[Tensor, "D"] | None = None  # of C, for von_neumann

    def value(self) -> Scalar:
        """H in nats; for the variance in squared units of the states."""
        m = self.moments
        match self.surrogate:
            case "log_det":
                return self.factor().log_det()
            case "diagonal":
                return surrogates.diagonal(m, self.eps)
            case "variance":
                return surrogates.variance(m)
            case "coding_rate":
                return surrogates.coding_rate_of(self.factor().cholesky, DISTORTION)
            case "von_neumann":
                if self.eigenvalues is None:
                    return surrogates.von_neumann(m)
                return torch.special.entr(self.eigenvalues).sum().to(m.mean)
            case "feature_softmax":
                assert self.values is not None
                return self.values

    def factor(self) -> Factor:
        """The Cholesky factor of the covariance plus eps, made here where none was given."""
        lower = factored(self.surrogate, self.moments, self.eps) if self.lower is None else self.lower
        return Factor(lower, self.moments.mean, self.moments.count, self.eps)

    def force(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """F_i = dH/dz_i of rows of the step, detached."""
        m = self.moments
        match self.surrogate:
            case "log_det":
                return self.factor().force(z)
            case "diagonal":
                return surrogates.diagonal_force(z, m, self.eps)
            case "variance":
                return surrogates.variance_force(z, m)
            case "feature_softmax":
                return surrogates.feature_softmax_force(z, m.count.clamp(min=1))
            case "coding_rate":
                force = surrogates.coding_rate_force(surrogates.unit_rows(z), m, DISTORTION, self.lower)
                return surrogates.through_unit_rows(force, z)
            case "von_neumann":
                force = surrogates.von_neumann_force(surrogates.unit_rows(z), m, push=self.push)
                return surrogates.through_unit_rows(force, z)

    def over(self, z: Float[Tensor, "N D"]) -> "Strengths":
        """What the forces of all rows come to; some rows at a time, and none is kept."""
        norms, leverages = self.moments.mean.new_empty(len(z)), self.moments.mean.new_empty(len(z))
        power = bounded = self.moments.mean.new_zeros(())
        for piece in pieces(*z.shape):
            force = self.force(z[piece])
            norms[piece] = force_norm_per_token(force)
            power = power + force.square().sum()
            bounded = bounded + self.at_unit_length(force, z[piece]).square().sum()
            if self.surrogate == "log_det":
                centred = z[piece].to(force) - self.moments.mean
                leverages[piece] = self.moments.count * (force * centred).sum(dim=-1)
        return Strengths(norms, power, bounded, leverages if self.surrogate == "log_det" else None)

    def at_unit_length(self, force: Float[Tensor, "N D"], z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The force in the units of `bound`: that on a unit state is 1 / ||z|| times that on its direction."""
        if self.surrogate not in ON_UNIT_STATES:
            return force
        return force * torch.linalg.vector_norm(z.to(force), dim=-1, keepdim=True)

    def bound(self) -> float:
        """The greatest ||F|| that N rows of this width could give (for the variance: that of this mean square)."""
        count, width = self.moments.count.item(), len(self.moments.mean)
        live = max(min(width, count - 1), 0)
        match self.surrogate:
            case "log_det":
                return force_bound(count, width, self.eps)
            case "diagonal":  # each feature at S_jj = eps
                return math.sqrt(width / (4 * self.eps * max(count, 1)))
            case "variance":  # all of the mean square around the mean
                square = covariance(self.moments).trace() + self.moments.mean.square().sum()
                return 2 * math.sqrt(square.item() / max(count, 1))
            case "feature_softmax":
                return greatest_softmax_force(width) / math.sqrt(max(count, 1))
            case "coding_rate":  # each direction at l = e2 / D
                return math.sqrt(min(width, count) * width / (4 * DISTORTION * max(count, 1)))
            case "von_neumann":  # all directions alike; the tangential part is smaller
                return 2 * math.log(max(live, 2)) / math.sqrt(max(count, 1))

    def directions(self) -> tuple[Float[Tensor, "K"], float]:
        """Variances of the directions that the force acts on, ascending, and the one at which it is greatest."""
        if self.surrogate == "diagonal":
            return in_double(covariance(self.moments).diagonal()).sort().values, self.eps
        if self.surrogate in ON_UNIT_STATES:
            lam = self.eigenvalues
            lam = eigenvalues(surrogates.second_moment(self.moments)) if lam is None else lam
            return lam, DISTORTION / len(lam) if self.surrogate == "coding_rate" else EMPTY / len(lam)
        lam = spectrum(self.moments)
        return lam, self.eps if self.surrogate == "log_det" else EMPTY * lam.mean().item()

    def live(self, directions: tuple[Float[Tensor, "K"], float] | None = None) -> float:
        """Share of directions that count: sum l / (l + peak) over min(D, N - 1); 1 for the row-wise feature softmax.

        `directions()` where they are at hand already: they cost an eigendecomposition.
        """
        if self.surrogate == "feature_softmax":
            return 1.0
        lam, peak = directions or self.directions()
        most = max(min(len(lam), self.moments.count.item() - 1), 1)
        return (lam / (lam + peak)).sum().item() / most if peak > 0 else 0.0


def greatest_softmax_force(width: int) -> float:
    """max over p of ||p (log p + H)||, p on the simplex of `width` features: 0.3166 for 2, 0.6281 for 8.

    Reached with one feature a and the others equal, (1 - a) / (width - 1): a one-dimensional search.
    """
    if width < 2:
        return 0.0
    a = torch.linspace(1e-6, 1 - 1e-6, 100_001, dtype=torch.float64)
    b = (1 - a) / (width - 1)
    entropy = -(a * a.log() + (1 - a) * b.log())
    power = (a * (a.log() + entropy)).square() + (width - 1) * (b * (b.log() + entropy)).square()
    return power.max().sqrt().item()


def step_force(
    surrogate: Surrogate,
    rows: Float[Tensor, "N D"],
    total: Callable[[Tensor], Tensor],
    memory: dict,
    eps_relative: float = 1e-4,
) -> StepForce | None:
    """The surrogate over the rows of all processes; None where they have no spread. Freezes eps in `memory`.

    `total` adds a tensor of any shape over processes.
    """
    moments = moments_everywhere(rows, total)
    if not has_spread(moments):
        return None
    if "eps" not in memory:
        memory["eps"] = float(floor_from(moments, eps_relative))
    values = lower = push = lam = None
    if surrogate == "feature_softmax":
        entropies = [surrogates.feature_softmax(rows[piece]).sum() for piece in pieces(*rows.shape)]
        values = total(torch.stack([*entropies, moments.mean.new_zeros(())]).sum()) / moments.count
    if surrogate in ON_UNIT_STATES:
        moments = moments_everywhere(rows, total, each=surrogates.unit_rows)
    if surrogate in ("log_det", "coding_rate"):
        lower = factored(surrogate, moments, memory["eps"])
    if surrogate == "von_neumann":
        _, lam, push = surrogates.von_neumann_push(moments)
    return StepForce(surrogate, moments, memory["eps"], values, lower, push, lam)


def factored(surrogate: Surrogate, moments: Moments, eps: float) -> Float[Tensor, "D D"]:
    """The Cholesky factor that value and force of the surrogate come from."""
    if surrogate == "coding_rate":
        return surrogates.coding_rate_factor(moments, DISTORTION)
    return cholesky(covariance(moments), eps)


Regime = Literal["healthy", "weak", "dominant", "misaligned", "dead", "not known"]
LEAST_RATIO = 1e-2  # of the term's expected push to the expected gradient of the rest; below it the term is weak
MOST_RATIO = 0.3  # above it the step is the term's as much as the loss's
WORST_ALIGNMENT = -0.9  # below it the loss undoes what the term does


def regime(coef: float, force: float, gradient: float, alignment: float) -> tuple[Regime, str]:
    """The regime of the term `coef` * H in the step that is taken, with the reason.

    `force` and `gradient` are norms of the expected force and of the expected gradient of the rest, at the parameters
    and in the units of the optimiser's preconditioner; `force` is 0 where it is not told from 0. `alignment` is that of
    the force of +H; a negative `coef` pushes the other way.
    """
    if force == 0:
        return (
            "dead",
            "the expected force is not told from 0: one batch's push does not carry over to another's responses",
        )
    if gradient == 0:
        return "not known", "no gradient beside it in the dry run: more prompts or steps"
    ratio, along = abs(coef) * force / gradient, -alignment if coef < 0 else alignment
    told = f"its push is {ratio:.1e} of the expected gradient of the rest"
    if ratio < LEAST_RATIO:
        return "weak", f"{told} (least {LEAST_RATIO:g})"
    if ratio > MOST_RATIO:
        return "dominant", f"{told} (most {MOST_RATIO:g})"
    if along < WORST_ALIGNMENT:
        return "misaligned", f"alignment with what the rest does {along:.2f} (least {WORST_ALIGNMENT:g})"
    return "healthy", f"{told}, alignment with what the rest does {along:+.2f}"
