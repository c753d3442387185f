"""Rows of hidden states, some at a time: what is computed of a whole batch of them holds a few pieces, not copies.

A batch of states is the largest thing beside the model (512 responses of 16,384 tokens at D = 3,584 are 112 GiB in
float32): each masked, centred or converted copy of it would cost as much again.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .functional import exactly

PIECE_BYTES = 64 * 2**20  # of one float32 copy of a piece; a product of matrices is at its full speed there


def pieces(count: int, width: int) -> Iterator[slice]:
    """Cuts `count` rows of this width into pieces of at most PIECE_BYTES in float32."""
    size = max(PIECE_BYTES // (4 * max(width, 1)), 1)
    for start in range(0, count, size):
        yield slice(start, start + size)


def sums_of_responses(rows: Float[Tensor, "M *D"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N *D"]:
    """The sum of each response's rows, those of its tokens in the order of the mask, all responses at once.

    In float64 and without the padding, so that it does not depend on the width of the batch; on the CPU where the
    device has no float64.
    """
    lengths = mask.sum(dim=1).cpu()
    ends, sums = lengths.cumsum(dim=0), exactly(rows.new_zeros(len(mask), *rows.shape[1:]))
    for piece in pieces(len(rows), math.prod(rows.shape[1:])):
        part = exactly(rows[piece].detach())
        first, last = piece.start, piece.start + len(part)
        held = (ends.clamp(max=last) - (ends - lengths).clamp(min=first)).clamp(min=0)  # of each response, in the piece
        for i, own in enumerate(part.split(held.tolist())):
            if len(own):
                sums[i] += own.sum(dim=0)
    return sums


def mean_of_responses(
    rows: Float[Tensor, "M D"], mask: Bool[Tensor, "N T"], dtype: torch.dtype | None = None
) -> Float[Tensor, "N D"]:
    """The mean of each response's rows (`sums_of_responses`); 0 where it has none.

    In `dtype`; by default that of the rows, at least float32.
    """
    sums = sums_of_responses(rows, mask)
    kind = dtype or (rows.dtype if rows.dtype == torch.float64 else torch.float32)
    return (sums / exactly(mask.sum(dim=1, keepdim=True).clamp(min=1))).to(rows.device, kind)


class Injected(torch.autograd.Function):
    """g_i = <F_i, z_i> of the tokens that count, whose gradient by z_i is F_i: a force is no function of the state.

    Of all that it takes, the forces alone are held until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        states: Tensor,
        mask: Tensor,
        force: Callable[[Tensor, slice], Tensor],
        is_worth_nothing: bool,
    ) -> Tensor:
        row, token = mask.nonzero(as_tuple=True)
        gains = forces = None
        for piece in pieces(len(row), states.size(2)):
            z = states[row[piece], token[piece]]
            z = z if z.dtype == torch.float64 else z.float()
            part = force(z, piece)
            if forces is None:
                forces, gains = part.new_empty(len(row), part.size(1)), part.new_zeros(len(row))
            forces[piece] = part
            if not is_worth_nothing:
                gains[piece] = (part * z).sum(dim=1)  # pyright: ignore[reportOptionalSubscript] (made with the forces)
        kind = torch.float64 if states.dtype == torch.float64 else torch.float32
        forces = states.new_zeros(0, states.size(2)) if forces is None else forces
        ctx.save_for_backward(row, token, forces)
        ctx.of = states.shape, states.dtype  # pyright: ignore[reportAttributeAccessIssue] (a place for what is no tensor)
        out = torch.zeros(mask.shape, dtype=kind, device=states.device)
        return out if gains is None else out.masked_scatter_(mask, gains.to(kind))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        row, token, forces = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        shape, dtype = ctx.of  # pyright: ignore[reportAttributeAccessIssue]
        out = torch.zeros(shape, dtype=dtype, device=gradient.device)
        for piece in pieces(len(forces), shape[2]):
            own = row[piece], token[piece]
            out[own] = (forces[piece] * gradient[own].unsqueeze(1)).to(dtype)
        return out, None, None, None


def injected(
    states: Float[Tensor, "B T D"],
    mask: Bool[Tensor, "B T"],
    force: Callable[[Tensor, slice], Tensor],
    is_worth_nothing: bool = False,
) -> Float[Tensor, "B T"]:
    """<F_i, z_i> per token, 0 off the mask, with the gradient F_i at z_i: F is what `force` makes of the states.

    `force`: (some rows of states[mask], at least in float32; which of them) -> their forces. `is_worth_nothing`: the
    values are 0, as of a force that is orthogonal to its states; the gradient is the same. Forces are (n, D).
    """
    return Injected.apply(states, mask, force, is_worth_nothing)  # pyright: ignore[reportReturnType]
