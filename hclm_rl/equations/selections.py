"""Which tokens a method acts on, as a bool tensor of the mask's shape; what is done to them is the method's own.

Every selection is made among what `mask` allows. What is off the mask is never chosen and never counts, a NaN there
neither; of an empty mask nothing is chosen. A choice is a constant: no gradient passes. A selection over the whole
step gets the tokens of all processes, in one order on all of them.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .functional import Scalar, exactly, kth_largest, quantile, row_quantile, row_values_at

ROUNDING = 1e-9  # 0.28 * 25 is 7.000000000000001, and 0.7 * 10 may be 6.999999999999999: both are whole


def quota(share: float, mask: Bool[Tensor, "*S"], rounding: Literal["down", "up"] = "down") -> int:
    """`share` N as a whole number, N = |mask|, at least 1: also where that is more than there is, of an empty mask.

    "down" is int(share N) to the last digit, as the authors' code that cuts a list there has it: 0.29 of 100 is 28.
    """
    wanted = share * int(mask.sum())
    return max(1, int(wanted) if rounding == "down" else math.ceil(wanted - ROUNDING))


def largest(
    score: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], count: int, ties: Literal["cut", "kept"] = "cut"
) -> Bool[Tensor, "*S"]:
    """The `count` largest scores, or all where there are fewer.

    Of scores equal to the last one chosen "cut" takes the first in the order of the tokens, whatever the padding;
    "kept" takes all of them.
    """
    places = places_of(mask)
    values = score.detach().flatten()[places]
    if ties == "kept" and 0 < count < len(values):
        return mask & (score.detach() >= kth_largest(values, count))
    return at(places[values.argsort(descending=True, stable=True)[:count]], mask)


def smallest(score: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], count: int) -> Bool[Tensor, "*S"]:
    """The `count` smallest scores, of equal ones the first; or all where there are fewer."""
    return largest(-score, mask, count)


def between(score: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], lower: float, upper: float) -> Bool[Tensor, "*S"]:
    """lower < score < upper, both strictly."""
    return mask & (lower < score) & (score < upper)


def drawn(mask: Bool[Tensor, "*S"], count: int, generator: torch.Generator) -> Bool[Tensor, "*S"]:
    """`count` at random, without replacement, or all where there are fewer."""
    return at(drawn_places(mask, count, generator), mask)


def drawn_places(mask: Bool[Tensor, "*S"], count: int, generator: torch.Generator) -> Int[Tensor, "chosen"]:
    """The flat places of `drawn`, in the order of the draw."""
    places = places_of(mask)
    return places[torch.randperm(len(places), generator=generator)[:count].to(places.device)]


def quantile_threshold(score: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], level: float) -> Scalar:
    """`quantile` of the scores under the mask, detached: a threshold is a constant. +inf where the mask is empty."""
    values = score.detach()[mask]
    return quantile(values, level) if len(values) else score.new_tensor(math.inf)


def below_quantile(score: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], level: float) -> Bool[Tensor, "*S"]:
    """Strictly below the linear `level`-quantile of all: none of equal scores."""
    return mask & (score.detach() < quantile_threshold(score, mask, level))


def above_own_quantile(
    score: Float[Tensor, "rows T"],
    mask: Bool[Tensor, "rows T"],
    level: float,
    form: Literal["linear", "order"] = "linear",
) -> Bool[Tensor, "rows T"]:
    """Strictly above the `level`-quantile of the response: none of equal scores, and none of a single token.

    "linear" is the value at place level (n - 1) of the response's n scores, sorted from 0, between its neighbours;
    "order" the score at place floor(level n), or the last.
    """
    score = score.detach()
    if form == "linear":
        threshold = row_quantile(score, mask, level)
    else:
        threshold = row_values_at(score, mask, (level * exactly(mask.sum(dim=1)) + ROUNDING).floor())
    return mask & (score > threshold.unsqueeze(1))


def places_of(mask: Bool[Tensor, "*S"]) -> Int[Tensor, "allowed"]:
    """Where the mask is True, as places in the flat tensor."""
    return mask.flatten().nonzero().squeeze(1)


def at(places: Int[Tensor, "chosen"], mask: Bool[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
    """True at these flat places alone."""
    return torch.zeros_like(mask).flatten().index_fill(0, places, True).view(mask.shape)


def outside_clip(
    ratio: Float[Tensor, "B _"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip_range: tuple[float, float],
) -> Bool[Tensor, "B T"]:
    """The tokens whose gradient PPO's clip drops: the ratio, of tokens or of responses (B, 1), has left 1 - low to 1 +
    high on the side to which the advantage drives it."""
    low, high = 1 - clip_range[0], 1 + clip_range[1]
    return mask & torch.where(advantages > 0, ratio > high, ratio < low) & (advantages != 0)
