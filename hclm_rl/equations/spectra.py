"""What a spectrum tells: the predictive test of the log-det force, and the ranks of a representation

All but the last takes `spectrum`, eigenvalues of a covariance in any order, and no states: one eigendecomposition
(about 20 times a Cholesky, so every 50 steps or so) serves all of it. The force of direction k is

    ||F||^2 = (1/N) sum_k g(lam_k),   g(x) = x / (x + eps)^2,   greatest at x = eps, where g = 1 / (4 eps)

so a direction well below eps is dead (force sqrt(lam) / (eps sqrt N)) and one well above is weak (1 / sqrt(N lam)).
HCLM, Tran, 2026, arXiv:2605.22940, names the failures; test, bound and certificate are derived here (docs/methods.md).
Ranks: RankMe, Garrido et al., 2023, arXiv:2210.02885; alpha-ReQ, Agrawal et al., 2022; their use on language models,
Li et al., 2025, arXiv:2509.23024. Never compare one rank with another's threshold.
Diffusion spectral entropy, of a kernel between rows: Liao et al., 2023, arXiv:2312.04823.
"""

import functools
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .functional import exactly, widest
from .geometry import Moments, Scalar, covariance, eigenvalues

Spectrum = Float[Tensor, "K"]


def spectrum(m: Moments) -> Spectrum:
    """Eigenvalues of S, ascending, in double; rounding below 0 is cut."""
    return eigenvalues(covariance(m))


def dof(lam: Spectrum, eps: float | Scalar) -> Scalar:
    """sum lam / (lam + eps) = <F, Zc>: the effective number of live directions.

    Where eps lies far above all variances it is small and the force is not: F tends to Zc / (N eps), the variance's.
    """
    return (lam / (lam + eps)).sum()


def force_power(lam: Spectrum, eps: float | Scalar) -> Spectrum:
    """g(lam) = lam / (lam + eps)^2 per direction."""
    return lam / (lam + eps).square()


def force_norm(lam: Spectrum, count: int | float, eps: float | Scalar) -> Scalar:
    """||F|| = sqrt((1/N) sum g(lam))."""
    return (force_power(lam, eps).sum() / count).sqrt()


def force_bound(count: int | float, width: int, eps: float) -> float:
    """B = sqrt(min(D, N - 1) / (4 eps N)) >= ||F||, reached when every non-trivial variance equals eps."""
    return math.sqrt(max(min(width, count - 1), 0) / (4 * eps * max(count, 1)))


def rho(lam: Spectrum, count: int | float, eps: float) -> float:
    """||F|| / B in [0, 1]: the share of the possible force that this spectrum yields. 0 for fewer than two rows."""
    bound = force_bound(count, len(lam), eps)
    return force_norm(lam, count, eps).item() / bound if bound > 0 else 0.0


def dead_fraction(lam: Spectrum, eps: float | Scalar) -> Scalar:
    """Share of directions with lam < eps: there the log-det acts as the variance does.

    Its force goes as the root of lam, so a direction that shrinks is helped less and less; an empty one gets none.
    """
    return (lam < eps).to(lam).mean()


def weak_fraction(lam: Spectrum, eps: float | Scalar) -> Scalar:
    """Share of directions with lam > 100 eps, under a fifth of the greatest force. The factor 100 is ours."""
    return (lam > 100 * eps).to(lam).mean()


class Drift(NamedTuple):
    """(least, most) eigenvalue of M_0^-1/2 (S + eps I) M_0^-1/2: 1 and 1 where nothing has moved."""

    low: float
    high: float

    @property
    def delta(self) -> float:
        """||M_0^-1/2 (S - S_0) M_0^-1/2||_2"""
        return max(1 - self.low, self.high - 1)


def relative_drift(m: Moments, lower: Float[Tensor, "D D"], eps: float | Scalar) -> Drift:
    """How far the covariance S has moved from S_0, relative to M_0 = S_0 + eps I = L L^T with L = `lower`.

    Every eigenvalue of S then lies within low (lam_0 + eps) <= lam + eps <= high (lam_0 + eps), so within 1 +- delta
    times it. Taken from L^-1 (S + eps I) L^-T, which has the same eigenvalues since L = M_0^1/2 Q with Q orthogonal.
    """
    whole = exactly(covariance(m))
    whole = whole + eps * torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
    of = exactly(lower)
    left = torch.linalg.solve_triangular(of, whole, upper=False)
    relative = torch.linalg.solve_triangular(of, left.T, upper=False)
    found = torch.linalg.eigvalsh((relative + relative.T) / 2)
    return Drift(found[0].item(), found[-1].item())


def certified_force(lam: Spectrum, eps: float, drift: Drift) -> float:
    """The share of ||F_0|| that such a drift leaves for certain (for the same number of rows).

    sqrt(sum_k least g / sum_k g(lam_k)), the least over [low, high] (lam_k + eps) - eps: g has one peak, so it is at an
    end of the interval. eps must be frozen.
    """
    floor = lam + eps
    low, high = (drift.low * floor - eps).clamp(min=0), (drift.high * floor - eps).clamp(min=0)
    least = torch.minimum(force_power(low, eps), force_power(high, eps)).sum()
    power = force_power(lam, eps).sum()
    return (least / power).sqrt().item() if power > 0 else 0.0


def drift_budget(lam: Spectrum, eps: float, share: float = 0.5) -> float:
    """The largest delta that leaves `share` of the force for certain, by bisection; below 1. Known before training.

    It does not depend on the scale of the states. 0 where there is no force. Refuses a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    low, high = 0.0, 1.0  # at 1 every variance may have vanished
    for _ in range(60):
        middle = (low + high) / 2
        holds = certified_force(lam, eps, Drift(1 - middle, 1 + middle)) >= share
        low, high = (middle, high) if holds else (low, middle)
    return low


def entropy_rank(weights: Spectrum) -> Scalar:
    """exp(-sum p log p), p = w / sum w + 1e-7 (the constant of RankMe). About 1 where all weights are 0."""
    p = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny) + 1e-7
    return torch.special.entr(p).sum().exp()


def effective_rank(lam: Spectrum, keep: int = 2048) -> Scalar:
    """`entropy_rank` of the `keep` largest EIGENVALUES of the centred covariance: arXiv:2509.23024's "RankMe"."""
    return entropy_rank(lam.topk(min(keep, len(lam))).values)


def rank_me(lam: Spectrum) -> Scalar:
    """`entropy_rank` of the SINGULAR values, the roots of `lam`.

    RankMe's are those of the uncentred states: give the eigenvalues of the second moment (`surrogates.py`), not of S.
    """
    return entropy_rank(lam.sqrt())


def participation_ratio(lam: Spectrum) -> Scalar:
    """(sum lam)^2 / sum lam^2; no larger than `effective_rank`. Without a spectrum: tr(S)^2 / ||S||_F^2."""
    return lam.sum().square() / lam.square().sum().clamp(min=torch.finfo(lam.dtype).tiny)


class PowerLaw(NamedTuple):
    """log lam_j = intercept - alpha log j over a window of ranks j = 1, 2, ..."""

    alpha: float
    intercept: float
    r2: float  # unweighted, on the log scale


def alpha_req(lam: Spectrum, first: int = 12, last: int = 100) -> PowerLaw:
    """lam_j ~ j^-alpha by least squares of log lam_j on -log j with weights 1/j, over ranks first..last inclusive.

    NaN unless `last` eigenvalues are positive: N must pass the window by far. The window is that of arXiv:2509.23024;
    alpha-ReQ's own is 4..100. Alpha rising while the rank falls is the state compressing.
    """
    values = exactly(lam).sort(descending=True).values[first - 1 : last]
    ranks = torch.arange(first, last + 1, dtype=values.dtype, device=values.device)
    if len(values) < len(ranks):
        return PowerLaw(math.nan, math.nan, math.nan)
    x, y, w = -ranks.log(), values.log(), 1 / ranks / (1 / ranks).sum()
    x_mean, y_mean = (w * x).sum(), (w * y).sum()
    alpha = (w * (x - x_mean) * (y - y_mean)).sum() / (w * (x - x_mean).square()).sum()
    intercept = y_mean - alpha * x_mean
    residual, total = (y - intercept - alpha * x).square().sum(), (y - y.mean()).square().sum()
    return PowerLaw(alpha.item(), intercept.item(), (1 - residual / total).item())


def diffusion_spectral_entropy(
    z: Float[Tensor, "N D"], bandwidth: float, time: float = 1.0, is_strict: bool = False
) -> Scalar:
    """H = -sum p log p, p = |mu|^time / sum |mu|^time, in nats; in [0, log N]. The paper's bits are H / log 2.

    mu: eigenvalues of K = deg^-1/2 G deg^-1/2, G_ij = exp(-||z_i - z_j||^2 / (2 bandwidth^2)), deg its row sums.
    `is_strict` normalises K once more by its own row sums: the anisotropic operator that the authors describe; K is
    what their code decomposes. 0: all rows within one bandwidth; log N: each row alone; with a large `time` about the
    log of the number of clusters. Freeze the bandwidth: one that follows z hides a contraction. Refuses a bandwidth
    that is not above 0 and finite.
    """
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
    device, z = z.device, exactly(z.detach())
    distance = torch.cdist(z, z)
    kernel = (-0.5 * (distance / bandwidth).square()).exp()
    for _ in range(2 if is_strict else 1):
        root = kernel.sum(dim=1).rsqrt()
        kernel = root.unsqueeze(1) * kernel * root
    weights = torch.linalg.eigvalsh(kernel).abs().pow(time)
    entropy = torch.special.entr(weights / weights.sum() + torch.finfo(weights.dtype).eps).sum()
    return entropy.to(device, widest(device))


def diffusion_spectral_information(
    z: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    bandwidth: float,
    generator: torch.Generator,
    time: float = 1.0,
    is_strict: bool = False,
    draws: int = 5,
) -> Scalar:
    """I(Z; Y) = sum_c (n_c / N) (mean DSE of `draws` random subsets of n_c rows - DSE of the rows of class c), in nats.

    DSE is `diffusion_spectral_entropy`. It grows with the number of rows, so the entropy of all is taken on as many as
    the class has; classes of one size share their subsets. 0: the classes lie alike. `generator`, on the CPU and in the
    same state on every process, draws the subsets. DSMI, Liao et al., 2023, arXiv:2312.04823; 5 draws are their code's.
    """
    entropy = functools.partial(diffusion_spectral_entropy, bandwidth=bandwidth, time=time, is_strict=is_strict)
    classes = [z[labels == label] for label in labels.unique()]
    of_any = {
        size: torch.stack(
            [entropy(z[torch.randperm(len(z), generator=generator)[:size].to(z.device)]) for _ in range(draws)]
        ).mean()
        for size in sorted({len(rows) for rows in classes})
    }
    parts = [len(rows) / len(z) * (of_any[len(rows)] - entropy(rows)) for rows in classes]
    return torch.stack(parts).sum()
