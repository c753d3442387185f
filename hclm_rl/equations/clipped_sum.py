"""sum_i a_i max(1 - x a_i, floor) = target, solved for x over the values of all processes

The sum falls with x and is linear between the kinks x = (1 - floor) / a_i, where a_i comes to the floor. Which a_i
are there is found by three histograms, each of the bin of the one before in which the kink lies: of the 11 bits of the
exponent and the first 5 of the mantissa, then of 16 bits and of 16 more. What is left is one value, or values that
differ by less than 2^-37 of their size, and the equation is then solved in closed form.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .functional import exactly

BITS = 16  # of a level: the histogram is two sums of 2^16 float64, 1 MiB
SHIFTS = (47, 31, 15)  # of the 64 bits of a float64, those below a level's


class Found(NamedTuple):
    """The bin of a level in which the kink lies, and what lies on either side of it."""

    bin: int
    linear: tuple[float, float]  # sums of a and of a^2 below the bin
    inside: tuple[float, float]  # in it
    at_floor: float  # sum of a above it


def solve_clipped_sum(
    a: Float[Tensor, "M"], target: float, floor: float, whole: float, total: Callable[[Tensor], Tensor]
) -> float:
    """x >= 0; infinity where even the floor is above `target`, 0 where nothing is to be clipped.

    `a` > 0 are this process's values, `whole` their sum over all processes, `total` adds a tensor over them: at most
    three times, and not at all where the answer is infinity or 0. `total` takes and gives tensors of one shape.
    """
    if target >= whole:
        return 0.0
    if target <= floor * whole:
        return math.inf
    values = exactly(a.detach()).sort().values
    prefix, linear, at_floor = 0, (0.0, 0.0), 0.0
    found = Found(0, (0.0, 0.0), (0.0, 0.0), 0.0)
    for shift in SHIFTS:
        keys = values.view(torch.int64) >> shift
        here = (keys >> BITS) == prefix if shift != SHIFTS[0] else torch.ones_like(keys, dtype=torch.bool)
        sums = histogram(values[here], keys[here] - (prefix << BITS))
        sums = exactly(total(sums.to(a.device, a.dtype))).cpu()
        found = kink(sums, edges(prefix, shift), target, floor, linear, at_floor)
        prefix, linear, at_floor = (prefix << BITS) | found.bin, found.linear, found.at_floor
        if found.inside[0] == 0:  # the kink lies between two values
            break
    first, second = (below + inside for below, inside in zip(linear, found.inside, strict=True))
    return max((first + floor * at_floor - target) / second, 0.0) if second else math.inf


def histogram(values: Float[Tensor, "m"], bins: Tensor) -> Float[Tensor, "2 bins"]:
    """Sums of `values` and of their squares in each bin; both come sorted. The same twice, unlike a scatter's.

    `bins` (m,) are whole numbers below 2^BITS.
    """
    counts = torch.bincount(bins, minlength=2**BITS)
    both = torch.stack([values, values.square()], dim=1)
    return torch.segment_reduce(both, "sum", lengths=counts, unsafe=True).T.contiguous()


def edges(prefix: int, shift: int) -> Float[Tensor, "edges"]:
    """The least value of each bin of a level, and that of the first bin after it."""
    keys = ((prefix << BITS) + torch.arange(2**BITS + 1)) << shift
    infinity = int(np.float64(math.inf).view(np.int64))
    return torch.from_numpy(keys.clamp(max=infinity).numpy().view(np.float64))


def kink(
    sums: Float[Tensor, "2 bins"],
    edge: Float[Tensor, "edges"],
    target: float,
    floor: float,
    linear: tuple[float, float],
    at_floor: float,
) -> Found:
    """The last bin at whose lower edge, were it the least value at the floor, the sum is not above `target`."""
    below = torch.nn.functional.pad(sums.cumsum(dim=1), (1, 0))  # at each edge
    first, second = below[0] + linear[0], below[1] + linear[1]
    above = below[0, -1] - below[0] + at_floor
    x = (1 - floor) / edge
    reached = first - torch.where(second > 0, x * second, 0) + floor * above
    place = max(int((reached[:-1] <= target).sum()) - 1, 0)  # it rises from edge to edge
    return Found(
        place,
        (first[place].item(), second[place].item()),
        (sums[0, place].item(), sums[1, place].item()),
        above[place + 1].item(),
    )
