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

NUMBERS_AT_ONCE = 2**22  # log-probs in memory


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
        """d log p of every token as `hidden` moves along `direction`."""
        return self._of_logps(torch.nn.functional.linear(direction.to(self.weight.dtype), self.weight).float(), hidden)

    def slopes_of_weight(self, hidden: Float[Tensor, "n D"], direction: Float[Tensor, "V D"]) -> Float[Tensor, "n V"]:
        """d log p of every token as `weight` moves along `direction`."""
        return self._of_logps(hidden.float() @ direction.T, hidden)

    def entropy_by_weight(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "V D"]:
        """d sum of the rows' entropies / d weight; rows that are not finite are left out.

        dH / d logit_v = -p_v (log p_v + H).
        """
        p = self.logps(hidden).exp()
        surprise = torch.special.entr(p)  # -p log p, 0 at p = 0
        pull = self._of_logits(surprise - p * surprise.sum(dim=-1, keepdim=True), hidden)
        counted = (pull.isfinite().all(dim=1) & hidden.isfinite().all(dim=1)).unsqueeze(1)
        return torch.where(counted, pull, 0).T @ torch.where(counted, hidden.float(), 0)

    def _of_logps(self, moved: Float[Tensor, "n V"], hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """d log p where z W^T moves by `moved`: d logit - sum_v p_v d logit_v."""
        moved = self._of_logits(moved, hidden)
        return moved - (self.logps(hidden).exp() * moved).sum(dim=-1, keepdim=True)

    def _of_logits(self, moved: Float[Tensor, "n V"], hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """d logit where z W^T moves by `moved`; a diagonal map, so its own transpose."""
        if self.softcap is not None:
            moved = moved * (1 - torch.tanh(self._scaled(hidden) / self.softcap).square())
        return moved * (self.scale / self.temperature)

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


def rows_of(head: Head) -> int:
    """Rows at once, so that a chunk's log-probs are few numbers and a small vocabulary is not cut fine."""
    return max(256, NUMBERS_AT_ONCE // head.weight.size(0))


def entropy_by_head(
    hidden: Float[Tensor, "B T D"], head: Head, mask: Bool[Tensor, "B T"], rows_at_once: int | None = None
) -> Float[Tensor, "V D"]:
    """d sum of the entropies of the tokens under the mask / d weight of the head, in float32; no gradient."""
    with torch.no_grad():
        found = torch.zeros_like(head.weight, dtype=torch.float32)
        for chunk in hidden[mask].split(rows_at_once or rows_of(head)):
            found += head.entropy_by_weight(chunk)
    return found


def slope_by_head(
    direction: Float[Tensor, "V D"],
    hidden: Float[Tensor, "B T D"],
    ids: Int[Tensor, "B T"],
    head: Head,
    mask: Bool[Tensor, "B T"],
    rows_at_once: int | None = None,
) -> Float[Tensor, "B T"]:
    """d log p(token) as the weight of the head moves along `direction`, 0 off the mask; no gradient.

    For a plain head (G z)_y - sum_v p_v (G z)_v, G the direction.
    """
    with torch.no_grad():
        rows = rows_at_once or rows_of(head)
        pieces = zip(hidden[mask].split(rows), ids[mask].split(rows), strict=True)
        found = [head.slopes_of_weight(z, direction).gather(1, y.unsqueeze(1)).squeeze(1) for z, y in pieces]
        return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(found).float())
