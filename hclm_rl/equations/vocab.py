"""Any functional of the next-token distribution, in chunks that are computed again in the backward pass.

The logits of a whole batch, (B, T, V), are never held: TRL's fused head gives only log-probs and entropy, and a
functional that needs the whole distribution gets it here, some rows at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head as TRL's fused forward applies it: logits = softcap(scale * (z W^T + b)) / temperature.

    States are taken in the head's dtype, which `cast_lm_head_to_fp32` makes another one than theirs.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def logps(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """log p of every token, in float32."""
        logits = self._scaled(hidden)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / self.temperature).log_softmax(dim=-1)

    def slopes(self, hidden: Float[Tensor, "n D"], direction: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """d log p of every token as `hidden` moves along `direction`: d logit - sum_v p_v d logit_v."""
        moved = torch.nn.functional.linear(direction.to(self.weight.dtype), self.weight).float() * self.scale
        if self.softcap is not None:
            moved = moved * (1 - torch.tanh(self._scaled(hidden) / self.softcap).square())
        moved = moved / self.temperature
        return moved - (self.logps(hidden).exp() * moved).sum(dim=-1, keepdim=True)

    def _scaled(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        return torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.scale


def over_vocab(
    functional: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "B T D"],
    head: Head,
    rows_at_once: int = 256,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """`functional`: (n, V) log-probs -> (n,), for every position of `hidden`; differentiable in hidden and head.

    Memory: `rows_at_once` x V floats forward and backward, at the price of one more projection in the backward pass.
    Positions off the mask cost nothing, give 0, and let nothing of their states into values or gradients.
    """

    def of_rows(rows: Tensor) -> Tensor:
        return functional(head.logps(rows))

    counted = hidden.reshape(-1, hidden.size(-1)) if mask is None else hidden[mask]
    rows = counted.split(rows_at_once)
    if torch.is_grad_enabled():
        values = torch.cat(
            [checkpoint(of_rows, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in rows]
        )
    else:
        values = torch.cat([of_rows(chunk) for chunk in rows])
    if mask is None:
        return values.view(hidden.shape[:-1])
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def slope_along(
    direction: Float[Tensor, "B T D"],
    hidden: Float[Tensor, "B T D"],
    ids: Int[Tensor, "B T"],
    head: Head,
    rows_at_once: int = 256,
) -> Float[Tensor, "B T"]:
    """d log p(token) / dh as its hidden state moves along `direction`: the directional derivative through the head.

    For a plain head (W x)_y - sum_v p_v (W x)_v, x the direction; no gradient.
    """

    def of_rows(rows: Tensor, along: Tensor, tokens: Tensor) -> Tensor:
        return head.slopes(rows, along).gather(1, tokens.unsqueeze(1)).squeeze(1)

    width = hidden.size(-1)
    pieces = (x.split(rows_at_once) for x in (hidden.reshape(-1, width), direction.reshape(-1, width), ids.reshape(-1)))
    with torch.no_grad():
        return torch.cat([of_rows(*piece) for piece in zip(*pieces, strict=True)]).view(ids.shape)
