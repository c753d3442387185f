"""Any functional of the next-token distribution, in chunks that are computed again in the backward pass.

The logits of a whole batch, (B, T, V), are never held: TRL's fused head gives only log-probs and entropy, and a
functional that needs the whole distribution gets it here, some rows at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head as TRL's fused forward applies it: logits = softcap(scale * (z W^T + b)) / temperature."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def logps(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """log p of every token, in float32."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (logits / self.temperature).log_softmax(dim=-1)


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
