"""What of noisy vectors is signal: products and norms of their expectations, from one vector a batch

Vectors v_1 ... v_K of independent batches, inner products <v, P w> with a diagonal P > 0:

    |E v|^2 = (K |mean v|^2 - mean |v_k|^2) / (K - 1) = mean of <v_k, v_l> over k != l
    <E v, E w> = mean of <v_k, w_j> over all k and j, where no batch is in both

The square of the mean itself is larger by the noise, a K-th of its power. All of it needs the products alone: a small
matrix, whatever the number of parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from .functional import exactly

Vector = Sequence[Tensor]  # one tensor a parameter
PIECE = 1 << 20  # numbers of each vector that are multiplied at once


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, NaN where there is one batch."""

    value: float
    error: float

    def is_told_from_0(self, errors: float = 2.0) -> bool:
        """Whether it lies so many errors from 0; without an error it does."""
        return self.value != 0 and not abs(self.value) <= errors * self.error


def inner(left: Vector, right: Vector, weights: Vector | None = None) -> float:
    """<left, P right>, added up in double; `weights` is the diagonal of P."""
    total = 0.0
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        product = a.float() * b.float()
        product = product if weights is None else product * weights[i]
        total += product.sum(dtype=torch.float64).item()
    return total


def products(left: Sequence[Vector], right: Sequence[Vector], weights: Vector | None = None) -> Float64[Tensor, "L R"]:
    """Of each with each, in double: parameter by parameter, a piece of all vectors at a time.

    (L, R), of L vectors and R vectors.
    """
    found = torch.zeros(len(left), len(right), dtype=torch.float64)
    if not (len(left) and len(right)):
        return found
    for number in range(len(left[0])):
        a = [each[number].reshape(-1) for each in left]
        b = a if left is right else [each[number].reshape(-1) for each in right]
        diagonal = None if weights is None else weights[number].reshape(-1)
        for start in range(0, len(a[0]), PIECE):
            piece = slice(start, start + PIECE)
            rows, columns = (exactly(torch.stack([each[piece] for each in of])) for of in (a, b))
            if diagonal is not None:
                columns = columns * exactly(diagonal[piece])
            found += (rows @ columns.T).cpu()
    return found


def of_expectations(between: Float64[Tensor, "L R"], of_left_alone: bool = False) -> Estimate:
    """<E v, E w> from all products; the error adds up that of the rows' means and that of the columns'.

    `of_left_alone`: <E v, mean w>, whose error is that of the rows' means.
    """
    means = [between.mean(dim=1)] + ([] if of_left_alone else [between.mean(dim=0)])
    parts = [each.var().item() / len(each) for each in means if len(each) > 1]
    return Estimate(between.mean().item(), math.sqrt(sum(parts)) if parts else math.nan)


def square_of_expectation(own: Float64[Tensor, "K K"]) -> Estimate:
    """|E v|^2 from the products of each with each, with the jackknife's error; of one vector its own square."""
    count = len(own)
    if count == 1:
        return Estimate(own.item(), math.nan)
    whole = own.sum() - own.diagonal().sum()
    value = (whole / (count * (count - 1))).item()
    if count == 2:
        return Estimate(value, math.nan)
    without = (whole - 2 * (own.sum(dim=1) - own.diagonal())) / ((count - 1) * (count - 2))
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt().item()
    return Estimate(value, error)
