"""Functionals of rows of logits with their gradient, some rows at a time, so that the logits of all are never held."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OverRows(torch.autograd.Function):
    """`vocab.over_rows`: a row's value depends on that row and the head alone, and so does its gradient.

    Where the head has no gradient, the rows' own are made with the values, in one pass over the logits. Where it has
    one, the backward pass makes each chunk again, and the chunks' gradients by the head add up in one place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        functional: Callable[[Tensor], Tensor],
        head: Any,
        size: int,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        of_rows, *of_head = ctx.needs_input_grad[3:]
        fixed, values, pulls = head.rounded(), [], []
        # in float16 a gradient that the loss has not scaled up yet would vanish
        is_one_pass = of_rows and not any(of_head) and fixed.weight.dtype != torch.float16
        for chunk in rows.split(size):
            logps, product = fixed.logps_and_product(chunk.detach())
            logps.requires_grad_(is_one_pass)
            with torch.set_grad_enabled(is_one_pass):
                made = functional(logps)
            values.append(made.detach().to(chunk.device, copy=True))  # a view would hold the whole chunk
            is_one_pass = is_one_pass and made.dim() == 1  # of K functionals each would need a gradient of its own
            if is_one_pass:
                pull = fixed.pulled(gradient(made, logps, torch.ones_like(made)), logps.detach(), product)
                pulls.append((pull @ fixed.weight).to(rows))
        ctx.of = functional, head, size, is_one_pass, autocast_of(weight)
        ctx.save_for_backward(rows, weight, bias, torch.cat(pulls) if is_one_pass else None)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # with create_graph=True
            raise ValueError("over_vocab has no second derivative, which create_graph=True asks for")
        rows, weight, bias, pulls = ctx.saved_tensors
        functional, head, size, is_one_pass, autocast = ctx.of
        if is_one_pass:
            return None, None, None, pulls * upstream[0].unsqueeze(1).to(pulls), None, None
        found = [
            torch.zeros_like(each) if is_asked else None
            for each, is_asked in zip((rows, weight, bias), ctx.needs_input_grad[3:], strict=True)
        ]
        with torch.autocast(**autocast):
            add_gradients(functional, head.rounded(), size, rows, upstream[0], found)
        return None, None, None, *found


def add_gradients(
    functional: Callable[[Tensor], Tensor],
    head: Any,
    size: int,
    rows: Tensor,
    upstream: Tensor,
    found: list[Tensor | None],
) -> None:
    """Adds what `upstream` pulls at (rows, weight, bias) to `found`; None: not asked for."""
    of_rows, of_weight, of_bias = found
    for start in range(0, len(rows), size):
        piece = slice(start, start + size)
        logps, product = head.logps_and_product(rows[piece].detach())
        with torch.enable_grad():
            made = functional(logps.requires_grad_())
        pull = head.pulled(gradient(made, logps, upstream[piece].to(made)), logps.detach(), product)
        if of_rows is not None:
            of_rows[piece] = (pull @ head.weight).to(of_rows)
        if of_weight is not None:
            add_product_(of_weight, pull.T, rows[piece].detach().to(pull))
        if of_bias is not None:
            of_bias += pull.sum(dim=0)


def add_product_(found: Tensor, left: Tensor, right: Tensor) -> None:
    """`found` (n, m) += left (n, k) @ right (k, m), added up in the dtype of `found` where theirs is half precision.

    A chunk's product that is rounded before it is added would bias the sum.
    """
    if found.dtype == left.dtype:
        found.addmm_(left, right)
    elif found.is_cuda and found.dtype == torch.float32:
        torch.addmm(found, left, right, out_dtype=found.dtype, out=found)
    else:  # no such product there
        found.addmm_(left.to(found), right.to(found))


def gradient(made: Tensor, logps: Tensor, upstream: Tensor) -> Tensor:
    """What `upstream` (n, ...) pulls at the log-probs (n, V) through the values `made`, its shape.

    Refuses a gradient that leads elsewhere, not to lose it.
    """
    if not made.requires_grad:  # a functional of which nothing moves, as a count
        return torch.zeros_like(logps)
    waiting, seen = [made.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of the nodes that end a graph
        if leaf is not None and leaf is not logps:
            raise ValueError(
                "a function given to over_vocab reads, beside the log-probs, a tensor that needs a gradient, which is "
                "not followed there: detach it"
            )
        waiting += [each for each, _ in node.next_functions]
    return torch.autograd.grad(made, logps, upstream)[0].contiguous()  # of a sum it is one number, expanded


def autocast_of(weight: Tensor) -> dict[str, Any]:
    """The autocast of now, where `weight` (V, D) lies, so that the backward pass makes chunks as the forward pass."""
    kind = weight.device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }
