"""Log-det entropy of representations and its information force: HCLM, Tran, 2026, arXiv:2605.22940

The equations, for N rows z_i in R^D (hidden states of the tokens that count), mean mu, Zc = Z - mu:

    S = Zc^T Zc / N = sum_k lam_k v_k v_k^T          M = S + eps I = L L^T          A = M^-1
    H = 0.5 logdet M = 0.5 sum_k log(lam_k + eps)    (nats; a Gaussian's entropy up to 0.5 D log(2 pi e))
    F = dH/dZ = Zc A / N                             the information force, pointing to MORE entropy
    l_i = zc_i^T A zc_i = N <F_i, zc_i>              the leverage of a row, mean dof = sum_k lam_k / (lam_k + eps)

Only H is the paper's; force, leverage, predictive test and certificate are derived from it (docs/methods.md).

S is a statistic of the whole optimiser step, so everything here starts from the sufficient statistics `Moments`,
which add up over micro-batches and processes; a trainer factors M once (`factor`) and solves once per micro-batch.
Rows come in any float type and are worked on in float32 (float64 stays). Statistics are detached: train by
injecting the detached force, the gradient of `(factor.force(z) * z).sum()`, never by differentiating the log-det.
Norm inflation: <F, Zc> = dof > 0, so H also grows by scaling Z; use states after the final norm, or `remove_radial`.
What follows from eigenvalues alone (predictive test, ranks) is in `spectra.py`, the other entropies with their forces
in `surrogates.py`, the same three from an N x N matrix in `gram.py`: four files for length, one subject.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..types import Rollout
from .functional import Scalar, exactly, widest
from .rows import mean_of_responses, pieces
from .triangles import add_gram_, mirrored_, solve_


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Half-precision states keep two or three digits: enough to store, not to subtract a mean of 30 from."""
    return x if x.dtype == torch.float64 else x.float()


def eigenvalues(s: Float[Tensor, "D D"]) -> Float[Tensor, "D"]:
    """Of a covariance: ascending, in double, rounding below 0 cut."""
    require_finite_states(s.diagonal().sum())
    return torch.linalg.eigvalsh(exactly(s)).clamp(min=0).to(s.device, widest(s.device))


@dataclass(frozen=True)
class Moments:
    """Count, mean and centred scatter of rows: all that any surrogate needs to know about the whole step."""

    count: Scalar  # rows; float, so that it travels in the same all-reduce
    mean: Float[Tensor, "D"]
    scatter: Float[Tensor, "D D"]  # sum_i (z_i - mean)(z_i - mean)^T


def moments(
    z: Float[Tensor, "N D"],
    mask: Bool[Tensor, "N"] | None = None,
    each: Callable[[Tensor], Tensor] = at_least_float32,
) -> Moments:
    """n, mu = sum z / n, sum (z - mu)(z - mu)^T over the rows under the mask; no row gives zeros.

    Centred first, never E[zz^T] - mu mu^T: states have large means and float32 loses the small eigenvalues. In two
    passes over pieces of the rows; `each` is what is done to a piece in either, at least in float32 (`unit_rows`).
    `each` makes (n, D) of (n, D).
    """
    z = z.detach() if mask is None else z.detach()[mask]
    width = z.shape[1]
    sums = each(z[:0]).sum(dim=0)
    for piece in pieces(len(z), width):
        sums += each(z[piece]).sum(dim=0)
    mean, scatter = sums / max(len(z), 1), sums.new_zeros(width, width)
    for piece in pieces(len(z), width):
        add_gram_(scatter, each(z[piece]) - mean)
    return Moments(sums.new_tensor(len(z)), mean, mirrored_(scatter))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both sets of rows (Chan, Golub and LeVeque, 1979):

    mu = mu_a + d n_b / n,   scatter = scatter_a + scatter_b + d d^T n_a n_b / n,   d = mu_b - mu_a,  n = n_a + n_b
    """
    count = a.count + b.count
    share, step = b.count / count.clamp(min=1), b.mean - a.mean
    return Moments(count, a.mean + step * share, a.scatter + b.scatter + torch.outer(step, step) * (a.count * share))


def merge_(a: Moments, b: Moments) -> Moments:
    """`merge` into the scatter of `a`, for many sets of rows one after the other: no further D x D is held."""
    count = a.count + b.count
    share, step = b.count / count.clamp(min=1), b.mean - a.mean
    return Moments(count, a.mean + step * share, a.scatter.add_(b.scatter).addr_(step * (a.count * share), step))


def reduce_moments(m: Moments, reduce_sum: Callable[[Tensor], Tensor]) -> Moments:
    """The moments of the rows of all processes, from those of this one, in two all-reduces:

    (n, sum z), which gives the GLOBAL mean mu; then sum (z - mu)(z - mu)^T = scatter + n (mean - mu)(mean - mu)^T
    A process without rows must call it too. `reduce_sum` takes and gives a tensor (1 + D,), then one (D, D).
    """
    totals = reduce_sum(torch.cat([m.count.view(1), m.count * m.mean]))
    count, mean = totals[0], totals[1:] / totals[0].clamp(min=1)
    offset = m.mean - mean
    return Moments(count, mean, reduce_sum(m.scatter + m.count * torch.outer(offset, offset)))


def moments_everywhere(
    z: Float[Tensor, "N D"],
    reduce_sum: Callable[[Tensor], Tensor],
    mask: Bool[Tensor, "N"] | None = None,
    each: Callable[[Tensor], Tensor] = at_least_float32,
) -> Moments:
    """`moments` over the rows of all processes; `reduce_sum` adds a tensor over them (two calls).

    It takes and gives a tensor (1 + D,), then one (D, D); `each` makes (n, D) of (n, D).
    """
    return reduce_moments(moments(z, mask, each), reduce_sum)


def moments_of_step(rollout: Rollout, each: Callable[[Tensor], Tensor] = at_least_float32) -> Moments:
    """Of `each(rollout.states())` of all processes; a term that reads no more of them says so (`sampled_moments`)."""
    if rollout.passed is None:
        return moments_everywhere(rollout.states(), rollout.total, each=each)
    return reduce_moments(rollout.passed[each], rollout.total)


def means_of_step(rollout: Rollout) -> Float[Tensor, "N D"]:
    """The mean state of each response of this process, 0 where it has no token, in the device's widest dtype.

    A term that reads no more of them says so: its `sampled_moments` names `mean_of_responses`.
    """
    if rollout.passed is None:
        states = rollout.states()
        return mean_of_responses(states, rollout.mask, widest(states.device))
    return rollout.passed[mean_of_responses]


def covariance(m: Moments) -> Float[Tensor, "D D"]:
    """S = scatter / N (not N - 1)."""
    return m.scatter / m.count.clamp(min=1)


def require_finite_states(trace: Scalar) -> None:
    """`trace` of a covariance of states, in which a single NaN or infinity shows.

    Refuses it (ValueError) where it is no finite number.
    """
    if not math.isfinite(trace.item()):
        raise ValueError(
            "the hidden states that it reads hold NaN or infinities, so they have no covariance to decompose; they are "
            "the policy's own: look at its weights, or at its precision"
        )


def has_spread(m: Moments) -> bool:
    """Whether the rows differ by more than the rounding of their own size."""
    trace = covariance(m).trace()
    rounding = 10 * torch.finfo(trace.dtype).eps
    if m.count >= 2 and trace > rounding**2 * (trace + m.mean.square().sum()):
        return True
    require_finite_states(trace)  # NaN > 0 is False
    return False


def floor_from(m: Moments, relative: float = 1e-4) -> Scalar:
    """eps = relative tr(S) / D, detached: an eps that follows Z would make the analytic force wrong.

    Measure it once and freeze it: eps is the variance below which a direction cannot be rescued. Rows that are all
    equal have no scale: they give the smallest positive number, which is not worth freezing.
    """
    s = covariance(m)
    return (relative * s.trace() / len(s)).clamp(min=torch.finfo(s.dtype).tiny)


def cholesky(s: Float[Tensor, "D D"], eps: float | Scalar) -> Float[Tensor, "D D"]:
    """Lower L with L L^T = S + eps I. Refuses, with eps and the largest variance, what is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(s.diagonal_scatter(s.diagonal() + eps))
    if info.item() != 0:
        raise ValueError(
            f"S + eps I is not positive definite in {s.dtype}: eps = {float(eps):.3g} for a largest variance of "
            f"{s.diagonal().max().item():.3g}; raise eps, use float64 states, or look for NaN in them"
        )
    return lower


def log_det(s: Float[Tensor, "D D"], eps: float | Scalar) -> Scalar:
    """H = 0.5 logdet(S + eps I) = sum_j log L_jj, in nats. Differentiable in S.

    Strongly biased by N / D: compare only values at equal N.
    """
    return cholesky(s, eps).diagonal().log().sum()


@dataclass(frozen=True)
class Factor:
    """S + eps I = L L^T of the whole step, factored once; every micro-batch then pays triangular solves only."""

    cholesky: Float[Tensor, "D D"]  # L, lower
    mean: Float[Tensor, "D"]
    count: Scalar  # N of the whole step, not of the micro-batch
    eps: float | Scalar

    def log_det(self) -> Scalar:
        """H = sum_j log L_jj, in nats."""
        return self.cholesky.diagonal().log().sum()

    def dof(self, s: Float[Tensor, "D D"]) -> Scalar:
        """tr(A S), the mean leverage of the rows whose covariance is S: how many directions they use."""
        return (torch.cholesky_inverse(self.cholesky) * s).sum()

    def force(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """F_i = A (z_i - mu) / N_global, detached. Over all rows of the step the F_i sum to 0.

        With F at hand the leverage is free: `count * (F * (z - mean)).sum(-1)`.
        """
        return solve_(at_least_float32(z.detach()) - self.mean, self.cholesky).div_(self.count.clamp(min=1))

    def leverage(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """l_i = ||L^-1 (z_i - mu)||^2 in [0, N - 1]: low = a redundant row, high = a rare direction."""
        out = self.mean.new_empty(len(z))
        for piece in pieces(*z.shape):
            zc = at_least_float32(z[piece].detach()) - self.mean
            solved = torch.linalg.solve_triangular(self.cholesky.T, zc, upper=True, left=False)
            out[piece] = solved.square().sum(dim=-1)
        return out


def factor(m: Moments, eps: float | Scalar) -> Factor:
    """Factors the covariance of the step."""
    return Factor(cholesky(covariance(m), eps), m.mean, m.count, eps)


def log_det_force(z: Float[Tensor, "N D"], m: Moments, eps: float | Scalar) -> Float[Tensor, "N D"]:
    """F = Zc A / N for rows z of a step with moments m. For more than one micro-batch keep the `Factor`."""
    return factor(m, eps).force(z)


def leverage(z: Float[Tensor, "N D"], m: Moments, eps: float | Scalar) -> Float[Tensor, "N"]:
    """l_i = zc_i^T A zc_i for rows z of a step with moments m. For more than one micro-batch keep the `Factor`."""
    return factor(m, eps).leverage(z)


def force_norm_per_token(force: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """f_i = ||F_i||;  sum_i f_i^2 = ||F||^2."""
    return torch.linalg.vector_norm(force, dim=-1)


def contribution(leverages: Float[Tensor, "N"], count: int | float | Scalar) -> Float[Tensor, "N"]:
    """H - H(without row i, mean kept) = -0.5 log(1 - l_i / N), in nats; exact.

    l_i <= N - 1 in exact arithmetic; rounding may pass it, the clamp may not.
    """
    return -0.5 * torch.log1p(-(leverages / count).clamp(max=1 - 1 / count))


def remove_radial(
    force: Float[Tensor, "N D"], zc: Float[Tensor, "N D"], share: float | Scalar | None = None
) -> Float[Tensor, "N D"]:
    """F - Zc <F, Zc> / ||Zc||^2: what remains cannot win by scaling Z.

    `share` is <F, Zc> / ||Zc||^2 of the whole step (for the log-det, dof / tr(scatter)); a micro-batch has another.
    """
    if share is None:
        share = (force * zc).sum() / zc.square().sum().clamp(min=torch.finfo(zc.dtype).tiny)
    return force - zc * share


def influence(force: Float[Tensor, "N D"], hidden_gradient: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """e_i = <F_i, dJ/dz_i>, J = the objective being MAXIMISED: a step eta along dJ/dZ changes H by eta sum_i e_i.

    e_i < 0: this token's own policy gradient burns entropy. First order, parameter sharing ignored: for ranking.
    """
    return (force * hidden_gradient.to(force)).sum(dim=-1)


def alignment(force: Float[Tensor, "*P"], gradient: Float[Tensor, "*P"]) -> Scalar:
    """a = -<F, grad L> / (||F|| ||grad L||) in [-1, 1]; a < 0: the loss burns entropy. 0 if either vanishes."""
    norms = torch.linalg.vector_norm(force) * torch.linalg.vector_norm(gradient)
    return -(force * gradient).sum() / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def critical_coefficient(force: Float[Tensor, "*P"], gradient: Float[Tensor, "*P"]) -> Scalar:
    """c* = <F, grad L> / ||F||^2: with the loss L - c H entropy is stationary at c = c*, rises above, falls below.

    A ratio of two noisy numbers: average them apart over steps. 0 if F vanishes (then no c holds the entropy).
    """
    power = force.square().sum()
    return (force * gradient).sum() / power.clamp(min=torch.finfo(power.dtype).tiny)
