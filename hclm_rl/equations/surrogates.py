"""Other entropies of representations, each as a value in nats (or a variance) and its analytic force dH/dZ

    variance         tr(S)                                           2 Zc / N
    diagonal         0.5 sum_j log(S_jj + eps)                       Zc / (diag S + eps) / N
    feature softmax  mean_i H_i,  p_i = softmax over FEATURES of z_i  -p_i (log p_i + H_i) / N
    coding rate      0.5 logdet(I + D/e2 C)                          U (C + e2/D I)^-1 / N
    von Neumann      -tr(C log C)                                    -2 U log(C) / N

N rows z_i with mean mu, Zc = Z - mu, S = Zc^T Zc / N; the last two see directions only: u_i = h_i / ||h_i||, UNCENTRED
second moment C = U^T U / N, so a large common mean hides a collapse (centre h first for a detector, and say so).
Their force on h is `through_unit_rows(force, h)`; there the radial part is gone.

Statistics come from `geometry.Moments`; values and forces are detached, as there. Apart from
`geometry.py` for length.
Sources: the first three HCLM, arXiv:2605.22940 (softmax is its baseline, blind to collapse: it acts row by row);
coding rate, Yu et al., 2020, arXiv:2006.08558; von Neumann entropy, Kim et al., 2023, arXiv:2304.01434.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .functional import exactly, widest
from .geometry import (
    Moments,
    Scalar,
    at_least_float32,
    cholesky,
    covariance,
    eigenvalues,
    log_det,
    require_finite_states,
)
from .triangles import full_precision, gram_matrix, solve_


def variance(m: Moments) -> Scalar:
    """H = tr(S): its force shrinks with a direction, so a dying one is not helped."""
    return covariance(m).trace()


def variance_force(z: Float[Tensor, "N D"], m: Moments) -> Float[Tensor, "N D"]:
    """F = 2 Zc / N;  ||F||^2 = 4 tr(S) / N."""
    return 2 / m.count.clamp(min=1) * (at_least_float32(z.detach()) - m.mean)


def diagonal(m: Moments, eps: float | Scalar) -> Scalar:
    """H = 0.5 sum_j log(S_jj + eps): the log-det without correlations, O(D)."""
    return 0.5 * (covariance(m).diagonal() + eps).log().sum()


def diagonal_force(z: Float[Tensor, "N D"], m: Moments, eps: float | Scalar) -> Float[Tensor, "N D"]:
    """F = Zc / (diag(S) + eps) / N."""
    zc = at_least_float32(z.detach()) - m.mean
    return zc / (covariance(m).diagonal() + eps) / m.count.clamp(min=1)


def feature_softmax(z: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """H_i = -sum_j p_ij log p_ij per row, p_i = softmax(z_i) over the D features; the surrogate is their mean."""
    logp = at_least_float32(z.detach()).log_softmax(dim=-1)
    return -(logp.exp() * logp).sum(dim=-1)


def feature_softmax_force(z: Float[Tensor, "N D"], count: int | float | Scalar) -> Float[Tensor, "N D"]:
    """F_i = -p_i (log p_i + H_i) / N, N = `count` rows of the whole step; 0 at both a uniform and a peaked p."""
    logp = at_least_float32(z.detach()).log_softmax(dim=-1)
    return -logp.exp() * (logp + feature_softmax(z).unsqueeze(-1)) / count


def unit_rows(h: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """u_i = h_i / ||h_i||; a zero row stays zero."""
    return torch.nn.functional.normalize(at_least_float32(h.detach()), dim=-1)


def through_unit_rows(force: Float[Tensor, "N D"], h: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """dH/dh_i = (I - u_i u_i^T) F_i / ||h_i||, F = dH/dU; 0 for a zero row."""
    u = unit_rows(h)
    norm = torch.linalg.vector_norm(at_least_float32(h.detach()), dim=-1, keepdim=True)
    tangential = force - u * (force * u).sum(dim=-1, keepdim=True)
    return torch.where(norm > 0, tangential / norm, 0)


def second_moment(m: Moments) -> Float[Tensor, "D D"]:
    """C = S + mu mu^T = Z^T Z / N."""
    return covariance(m) + torch.outer(m.mean, m.mean)


def coding_rate(m: Moments, distortion: float = 0.5) -> Scalar:
    """R = 0.5 logdet(I + D/e2 C), in nats, m = moments of UNIT rows; in (0, 0.5 k log(1 + D/(k e2))], k = min(N, D).

    `distortion` is e2, the square already: the public code's `eps`, 0.5. Unit rows bound R; others do not.
    """
    c = second_moment(m)
    return log_det(len(c) / distortion * c, 1.0)


def coding_rate_factor(m: Moments, distortion: float = 0.5) -> Float[Tensor, "D D"]:
    """Lower L with L L^T = C + e2/D I: R and its force come from it, so a step needs one."""
    return cholesky(second_moment(m), distortion / len(m.mean))


def coding_rate_of(lower: Float[Tensor, "D D"], distortion: float = 0.5) -> Scalar:
    """R = sum_j log(sqrt(D/e2) L_jj) in nats, L of `coding_rate_factor`."""
    return (lower.diagonal() * math.sqrt(len(lower) / distortion)).log().sum()


def coding_rate_force(
    u: Float[Tensor, "N D"], m: Moments, distortion: float = 0.5, lower: Float[Tensor, "D D"] | None = None
) -> Float[Tensor, "N D"]:
    """dR/dU = U (C + e2/D I)^-1 / N for unit rows u of a step with moments m; `lower` where it is at hand already."""
    lower = coding_rate_factor(m, distortion) if lower is None else lower
    return solve_(at_least_float32(u.detach()).clone(), lower).div_(m.count.clamp(min=1))


def coding_rate_within(u: Float[Tensor, "N D"], classes: Int[Tensor, "N"], distortion: float = 0.5) -> Scalar:
    """R_c = sum_j (n_j / N) R(U_j) over classes j (a prompt; correct and wrong); R - R_c >= 0 is the rate reduction.

    From the smaller side: 0.5 logdet(I + D/(n_j e2) U_j U_j^T). With few rows a class it is bound by their number:
    compare only at equal group sizes.
    """
    u = at_least_float32(u.detach())
    total = u.new_zeros(())
    for label in classes.unique():
        rows = u[classes == label]
        side = gram_matrix(rows.T if len(rows) < u.shape[-1] else rows)
        total = total + len(rows) / len(u) * log_det(u.shape[-1] / (len(rows) * distortion) * side, 1.0)
    return total


def von_neumann(m: Moments) -> Scalar:
    """H = -tr(C log C) = -sum l log l, in nats, m = moments of UNIT rows (tr C = 1); in [0, log min(N, D)].

    exp(H) is an effective rank. It sees the shape of the spectrum only, the log-det its scale as well.
    """
    lam = eigenvalues(second_moment(m))
    return torch.special.entr(lam).sum().to(m.mean)


def von_neumann_push(m: Moments, floor: float = 1e-12) -> tuple[Scalar, Float[Tensor, "D"], Float[Tensor, "D D"]]:
    """(H, the eigenvalues l of C, -2 log C) from one decomposition, the costliest of all here: once a step.

    log C = V diag(log max(l, floor)) V^T: finite where a direction is empty, where autograd through eigh gives NaN.
    """
    c = second_moment(m)
    require_finite_states(c.trace())
    lam, vectors = torch.linalg.eigh(exactly(c))
    with full_precision(c):
        push = -2 * (vectors * lam.clamp(min=floor).log()) @ vectors.T
    lam = lam.clamp(min=0).to(c.device, widest(c.device))
    return torch.special.entr(lam).sum().to(m.mean), lam, push.to(m.mean)


def von_neumann_force(
    u: Float[Tensor, "N D"], m: Moments, floor: float = 1e-12, push: Float[Tensor, "D D"] | None = None
) -> Float[Tensor, "N D"]:
    """dH/dU = -2 U log(C) / N, up to the radial part that `through_unit_rows` removes; `push` where it is at hand."""
    push = von_neumann_push(m, floor)[2] if push is None else push
    with full_precision(u):
        return (at_least_float32(u.detach()) @ push).div_(m.count.clamp(min=1))
