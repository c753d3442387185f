"""Log-det, force and leverage from K = Zc Zc^T / N, when the whole step has fewer rows than dimensions (Sylvester)

0.5 logdet(S + eps I_D) = 0.5 logdet(K + eps I_N) + 0.5 (D - N) log eps      (symbols as in `geometry.py`)
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .functional import Scalar
from .geometry import at_least_float32, cholesky, gram_matrix


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
