"""Two products of large matrices of which half is computed: X^T X, and X (L L^T)^-1 with a triangular L"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64  # columns; of 64, 128 and 256 the fastest in `gram_matrix` at D = 512 (CPU)
LEAF = 32  # columns; of 32, 64 and 128 the fastest in `solve_` at D = 512 (CPU)


def full_precision(x: Tensor) -> torch.autocast:
    """Autocast would round every product below to bfloat16 under a trainer that uses it.

    `x` of any shape says on which device.
    """
    return torch.autocast(x.device.type, enabled=False)


def gram_matrix(x: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """x^T x, exactly symmetric: one triangle of products and its mirror image."""
    return mirrored_(add_gram_(x.new_zeros(x.shape[1], x.shape[1]), x))


def add_gram_(out: Float[Tensor, "D D"], x: Float[Tensor, "N D"]) -> Float[Tensor, "D D"]:
    """Adds x^T x to the upper triangle of `out`, and something to the lower one: see `mirrored_`."""
    with full_precision(x):
        for i in range(0, x.shape[1], BLOCK):
            out[i : i + BLOCK, i:].addmm_(x[:, i : i + BLOCK].T, x[:, i:])
    return out


def mirrored_(out: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """The symmetric matrix with the upper triangle of `out`, which it overwrites."""
    for i in range(0, len(out), BLOCK):
        out[i + BLOCK :, i : i + BLOCK] = out[i : i + BLOCK, i + BLOCK :].T
        own = out[i : i + BLOCK, i : i + BLOCK]
        own.copy_((own + own.T) / 2)
    return out


def solve_(x: Float[Tensor, "N D"], lower: Float[Tensor, "D D"]) -> Float[Tensor, "N D"]:
    """X A = (X L^-T) L^-1 by substitution, forwards then backwards, halving the columns; overwrites x.

    Halves because all but the leaves are products of large matrices: both passes take 1.1 to 1.2 products of N x D x D
    (their flops are 1.0), a row of blocks took 1.8 and cholesky_solve 2.7 (N = 2048, D = 512, CPU). Only the triangles
    on the diagonal, LEAF wide, are inverted.
    """
    eye = torch.eye(LEAF, dtype=x.dtype, device=x.device)
    leaves = []
    for i in range(0, len(lower), LEAF):
        own = lower[i : i + LEAF, i : i + LEAF]
        leaves.append(torch.linalg.solve_triangular(own, eye[: len(own), : len(own)], upper=False))
    with full_precision(x):
        substitute_(x, lower, leaves, is_forward=True)
        substitute_(x, lower, leaves, is_forward=False)
    return x


def substitute_(x: Float[Tensor, "N K"], lower: Float[Tensor, "K K"], leaves: list[Tensor], is_forward: bool) -> None:
    """x <- x L^-T, or x L^-1 backwards; `leaves` are the inverted triangles on the diagonal of `lower`.

    Each leaf is (LEAF, LEAF), the last one may be smaller.
    """
    if len(leaves) == 1:
        x.copy_(x @ (leaves[0].T if is_forward else leaves[0]))
        return
    count = len(leaves) // 2
    half = count * LEAF
    left, right, below = x[:, :half], x[:, half:], lower[half:, :half]
    first, second = (left, lower[:half, :half], leaves[:count]), (right, lower[half:, half:], leaves[count:])
    if is_forward:
        substitute_(*first, is_forward)
        right.addmm_(left, below.T, alpha=-1)
        substitute_(*second, is_forward)
    else:
        substitute_(*second, is_forward)
        left.addmm_(right, below, alpha=-1)
        substitute_(*first, is_forward)
