"""Log-det, force and leverage from K = Zc Zc^T / N, when the whole step has fewer rows than dimensions (Sylvester)

0.5 logdet(S + eps I_D) = 0.5 logdet(K + eps I_N) + 0.5 (D - N) log eps      (symbols as in `geometry.py`)
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .functional import Scalar
from .geometry import at_least_float32, cholesky
from .triangles import full_precision, gram_matrix


@dataclass(frozen=True)
class GramFactor:
    """K + eps I = L L^T, and what `geometry.Factor` gives, from K."""

    cholesky: Float[Tensor, "N N"]  # of K + eps I
    gram: Float[Tensor, "N N"]  # K
    centred: Float[Tensor, "N D"]  # Zc
    eps: float | Scalar

    def log_det(self) -> Scalar:
        """H = 0.5 logdet(K + eps I_N) + 0.5 (D - N) log eps, in nats."""
        count, width = self.centred.shape
        return self.cholesky.diagonal().log().sum() + 0.5 * (width - count) * math.log(self.eps)

    def force(self) -> Float[Tensor, "N D"]:
        """F = (K + eps I)^-1 Zc / N."""
        return torch.cholesky_solve(self.centred, self.cholesky) / len(self.centred)

    def leverage(self) -> Float[Tensor, "N"]:
        """l_i = N [(K + eps I)^-1 K]_ii."""
        return len(self.gram) * torch.cholesky_solve(self.gram, self.cholesky).diagonal()


def gram_factor(z: Float[Tensor, "N D"], eps: float | Scalar) -> GramFactor:
    """Factors the N x N side: N^2 D flops instead of N D^2. z must be the whole step, at least one row."""
    z = at_least_float32(z.detach())
    zc = z - z.mean(dim=0)
    gram = gram_matrix(zc.T) / len(zc)
    return GramFactor(cholesky(gram, eps), gram, zc, eps)


def unexplained(z: Float[Tensor, "P G D"], ridge: float) -> Float[Tensor, "P G"]:
    """u_i = ridge [(Z Z^T + ridge I)^-1]_ii in (0, 1], of each of P groups: what the others leave of row i.

    1 - u_i is the ridge leverage z_i^T (Z^T Z + ridge I)^-1 z_i, and log det(Z Z^T + ridge I) less that without row i
    is log ridge - log u_i. Rows are not centred; one of zeros has u = 1 and is as if it were not there. Refuses a
    matrix that is not positive definite in its precision.
    """
    with full_precision(z):
        gram = z @ z.mT
    eye = torch.eye(gram.size(1), dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(gram + ridge * eye)
    if info.any():
        raise ValueError(
            f"Z Z^T + {ridge:g} I is not positive definite in {gram.dtype} for rows as long as "
            f"{gram.diagonal(dim1=1, dim2=2).max().sqrt().item():.3g}: raise the ridge, or look for NaN in them"
        )
    half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)  # its columns: L^-1
    return ridge * half.square().sum(dim=1)
