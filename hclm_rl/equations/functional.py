"""Equations that several terms share, as pure functions of tensors.

Entropies and log-probs in nats. A mask is bool, True = counts. Every masked function selects with `torch.where`
and never multiplies by the mask, so that a NaN in the padding stays there (NaN * 0 is NaN).
"""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Scalar = Float[Tensor, ""]

NO_FLOAT64 = {"mps"}  # kinds of devices


def widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    return torch.float32 if device.type in NO_FLOAT64 else torch.float64


def in_double(x: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """In `widest`: for sums that decide, so that their order does not."""
    return x.to(widest(x.device))


def exactly(x: Shaped[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """In float64 whatever the device, on the CPU where it has none: for eigenvalues, and places in a sorted row."""
    return (x.cpu() if x.device.type in NO_FLOAT64 else x).double()


def ratio(top: float, bottom: float) -> float:
    """top / bottom; 0 of nothing. The form of a `Total` of two sums."""
    return top / bottom if bottom else 0.0


def beyond(gap: Float[Tensor, "*rows"], rounding: float | Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """The gap where it is more than rounding, else 0."""
    return torch.where(gap > rounding, gap, 0.0)


def masked_mean(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Scalar:
    """sum_{mask} x / |mask|; 0 where the mask is empty. Differentiable in x.

    >>> masked_mean(torch.tensor([1.0, 5.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def spread_out(rows: Shaped[Tensor, "n ..."], mask: Bool[Tensor, "*S"]) -> Shaped[Tensor, "..."]:
    """Values of the n positions that count, in the order of the mask -> (*S, ...), 0 elsewhere."""
    counts = mask.view(*mask.shape, *[1] * (rows.dim() - 1))
    return rows.new_zeros(*mask.shape, *rows.shape[1:]).masked_scatter(counts, rows)


def kth_largest(values: Float[Tensor, "M"], k: int) -> Scalar:
    """The k-th largest value, k in 1..M: `values >= kth_largest(values, k)` keeps k of them, and all ties.

    Any M (torch.quantile stops at 2**24). A NaN counts as the largest value, as in torch.topk.

    >>> kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
    tensor(2.)
    """
    return values.kthvalue(len(values) - k + 1).values


def quantile(values: Float[Tensor, "M"], level: float) -> Scalar:
    """x_(a) + (p - a) (x_(a+1) - x_(a)),  p = level (M - 1),  a = floor(p),  x_(.) sorted from 0; level in [0, 1].

    torch.quantile's "linear" for any M >= 1: the position is a Python float, exact where float32 has lost the index.

    >>> quantile(torch.tensor([3.0, 1.0, 2.0]), 0.25)  # p = 0.5: half way from 1 to 2
    tensor(1.5000)
    """
    position = level * (len(values) - 1)
    below = math.floor(position)
    lower = values.kthvalue(below + 1).values
    if position == below:
        return lower
    return torch.lerp(lower, values.kthvalue(below + 2).values, position - below)


def row_quantile(values: Float[Tensor, "R M"], mask: Bool[Tensor, "R M"], level: float) -> Float[Tensor, "R"]:
    """`quantile` of each row's values under the mask; NaN for a row without any, which nothing is above or below."""
    return row_values_at(values, mask, level * exactly(mask.sum(dim=1) - 1))


def row_values_at(
    values: Float[Tensor, "R M"], mask: Bool[Tensor, "R M"], place: Float[Tensor, "R"]
) -> Float[Tensor, "R"]:
    """Each row's values under the mask, sorted from 0, at `place`, no further than the last; NaN for a row without any.

    Linear between neighbours. `place` is in float64 (`exactly`).
    """
    ordered = torch.where(mask, values, torch.nan).sort(dim=1).values  # NaN sorts last
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    below = place.floor().clamp(min=0)
    part = (place - below).clamp(min=0).to(ordered)
    below = below.long().to(last.device).minimum(last)
    lower, upper = (ordered.gather(1, at.unsqueeze(1)).squeeze(1) for at in (below, (below + 1).minimum(last)))
    return torch.lerp(lower, upper, part)


def covariance_contributions(
    logps: Float[Tensor, "*S"],
    advantages: Float[Tensor, "*S"],
    mask: Bool[Tensor, "*S"],
    mean_logp: Float[Tensor, "..."] | float | None = None,
    mean_advantage: Float[Tensor, "..."] | float | None = None,
) -> Float[Tensor, "*S"]:
    """cov_t = (A_t - mean A) (logp_t - mean logp), 0 off the mask; detached, for it only selects tokens.

    One token's share of the covariance that drives the entropy down (Cui et al., 2025, arXiv:2505.22617), neither
    divided by the number of tokens nor by a deviation. Unit: nats times the unit of A.
    The means may be those of a larger batch, as a number or anything that broadcasts; None takes them from here.
    """
    logps, advantages = logps.detach(), advantages.detach()
    mean_logp = masked_mean(logps, mask) if mean_logp is None else mean_logp
    mean_advantage = masked_mean(advantages, mask) if mean_advantage is None else mean_advantage
    return torch.where(mask, (advantages - mean_advantage) * (logps - mean_logp), 0)


def quantile_baseline(
    group_rewards: Float[Tensor, "P G"], level: float, interpolate: bool = False
) -> Float[Tensor, "P"]:
    """b = inf{x : F(x) >= level},  F(x) = #{j : R_j <= x} / G, per group: the inverse CDF, level in (0, 1].

    Always one of the rewards, so that with 0/1 rewards one side of the group gets exactly zero advantage.
    `interpolate=True` is the linear quantile instead (the authors' released code), which gives that property up.
    A NaN reward (unscored) leaves its group; a group without a scored reward gets NaN.
    Source: quantile advantage estimation, arXiv:2509.22611; the 1e-9 guards ceil(0.28 * 25) = 8 (it is 7).
    """
    rewards = group_rewards.detach()
    if interpolate:
        return row_quantile(rewards, ~rewards.isnan(), level)
    ordered = rewards.sort(dim=-1).values  # NaN sorts last
    last = ((~ordered.isnan()).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    index = (level * exactly(last + 1) - 1e-9).ceil().long().to(last.device) - 1
    return ordered.gather(-1, index.clamp(min=0).minimum(last)).squeeze(-1)


def split_token_weights(
    advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B T"]]:
    """A_bt = A_b w_bt with w in [0, 1]: for surrogates with one ratio a response, where A may not depend on t.

    A_b is the response's largest advantage in absolute value. Both signs in one response have no such form: ValueError.
    """
    inside = torch.where(mask, advantages, 0.0)
    largest = inside.gather(1, inside.abs().argmax(dim=1, keepdim=True))
    weights = torch.where(mask & (largest != 0), advantages / torch.where(largest == 0, 1.0, largest), 1.0)
    if (weights < 0).any():
        raise ValueError(
            "a term gave tokens of one response advantages of both signs, which a sequence-level surrogate (RLOO, or "
            "importance_sampling_level='sequence') cannot express: use importance_sampling_level='token' with GRPO"
        )
    return largest.squeeze(1), weights


def per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    """(N,) or (N, T) -> (N, T)."""
    return advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand(mask.shape)
