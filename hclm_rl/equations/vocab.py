"""Any functional of the next-token distribution, in chunks that are computed again in the backward pass.

The logits of a whole batch, (B, T, V), are never held: TRL's fused head gives only log-probs and entropy, and a
functional that needs the whole distribution gets it here, some rows at a time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .functional import spread_out
from .over_rows import OverRows, add_product_

# of one float32 copy of a chunk's log-probs; a functional makes a few. A row's product at V = 151,936 and D = 896 takes
# 5.1 ms of a CPU's core among 62 rows, 4.2 among 112, 3.8 among 224; a GPU needs some hundreds of rows
CHUNK_BYTES = {"gpu": 256 * 2**20, "cpu": 96 * 2**20}


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head as TRL's fused forward applies it: logits = softcap(scale * (z W^T + b)) / temperature.

    States go to the head's device and dtype, which `device_map` and `cast_lm_head_to_fp32` make others than theirs. The
    product is made in `dtype`, all that follows in float32.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    dtype: torch.dtype | None = None  # of the product, as autocast has it in the policy's own pass; None: the weight's

    @property
    def rows_at_once(self) -> int:
        """Rows whose log-probs take CHUNK_BYTES of the head's kind of device."""
        kind = "cpu" if self.weight.device.type == "cpu" else "gpu"
        return max(CHUNK_BYTES[kind] // (4 * len(self.weight)), 1)

    def rounded(self) -> "Head":
        """The head with its weights in the dtype of the product, cast once for many chunks; without gradient."""
        bias = None if self.bias is None else self._as(self.bias.detach())
        return replace(self, weight=self._as(self.weight.detach()), bias=bias)

    def product(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """z W^T + b, in the dtype of the product."""
        product = torch.nn.functional.linear(self._as(hidden), self._as(self.weight))
        # added to the rounded product, as there
        return product if self.bias is None else product + self._as(self.bias)

    def logps_of(self, product: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """log p of every token from `product`, in float32."""
        logits = self._scaled(product)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits.log_softmax(dim=-1)

    def logps(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """log p of every token, in float32."""
        return self.logps_of(self.product(hidden))

    def logps_and_product(self, hidden: Float[Tensor, "n D"]) -> tuple[Tensor, Float[Tensor, "n V"] | None]:
        """(log p of every token, the product where `_of_logits` reads it: it is as large)."""
        product = self.product(hidden)
        return self.logps_of(product), None if self.softcap is None else product

    def pulled(
        self, pull: Float[Tensor, "n V"], logps: Float[Tensor, "n V"], product: Float[Tensor, "n V"] | None
    ) -> Float[Tensor, "n V"]:
        """A gradient at the log-probs as it comes to the product, in its dtype; writes over both. No gradient.

        d logit_v = g_v - p_v sum_w g_w.
        """
        pull = pull.addcmul_(logps.exp_(), pull.sum(dim=-1, keepdim=True), value=-1)
        return self._of_logits(pull, product).to(self.dtype or self.weight.dtype)

    def slope(
        self, hidden: Float[Tensor, "n D"], ids: Int[Tensor, "n"], direction: Float[Tensor, "n D"]
    ) -> Float[Tensor, "n"]:
        """d log p of each row's token as `hidden` moves along `direction`; no gradient, on the head's device."""
        moved = torch.nn.functional.linear(self._as(direction), self._as(self.weight))
        return self._own_slope(moved.float(), hidden, ids)

    def slope_of_weight(
        self, hidden: Float[Tensor, "n D"], ids: Int[Tensor, "n"], direction: Float[Tensor, "V D"]
    ) -> Float[Tensor, "n"]:
        """d log p of each row's token as `weight` moves along `direction`, in the product's dtype; likewise."""
        return self._own_slope((self._as(hidden) @ direction.T).float(), hidden, ids)

    def along(self, direction: Float[Tensor, "V D"]) -> tuple[Float[Tensor, "V D"], float]:
        """(`direction` / its largest number, in the product's dtype; that number); 1 where that dtype is not half.

        The gradient of a mean entropy is smaller than what float16 holds.
        """
        dtype = self.dtype or self.weight.dtype
        largest = direction.abs().max().item() if dtype.itemsize == 2 else 1.0
        if not 0 < largest < math.inf:  # 0, or not finite in any way
            largest = 1.0
        return (direction if largest == 1 else direction / largest).to(self.weight.device, dtype), largest

    def add_entropy_by_weight_(self, found: Float[Tensor, "V D"], hidden: Float[Tensor, "n D"]) -> None:
        """Adds d sum of the rows' entropies / d weight to `found`; rows that are not finite are left out. No gradient.

        dH / d logit_v = -p_v (log p_v + H).
        """
        logps, product = self.logps_and_product(hidden)
        p = logps.exp_()
        pull = torch.special.entr(p)  # -p log p, 0 at p = 0
        pull = self._of_logits(pull.addcmul_(p, pull.sum(dim=-1, keepdim=True), value=-1), product)
        states = self._as(hidden)
        # a sum of numbers of which one is not finite is not
        ignored = ~(pull.sum(dim=1).isfinite() & states.isfinite().all(dim=1)).unsqueeze(1)
        add_product_(found, self._as(pull.masked_fill_(ignored, 0)).T, states.masked_fill(ignored, 0))

    def _own_slope(
        self, moved: Float[Tensor, "n V"], hidden: Float[Tensor, "n D"], ids: Int[Tensor, "n"]
    ) -> Float[Tensor, "n"]:
        """d log p of the row's token where z W^T moves by `moved`: d logit - sum_v p_v d logit_v."""
        logps, product = self.logps_and_product(hidden)
        moved = self._of_logits(moved, product)
        own = moved.gather(1, ids.unsqueeze(1).to(moved.device)).squeeze(1)
        return own - logps.exp_().mul_(moved).sum(dim=-1)

    def _of_logits(self, moved: Float[Tensor, "n V"], product: Float[Tensor, "n V"] | None) -> Float[Tensor, "n V"]:
        """d logit where z W^T, `product`, moves by `moved`; a diagonal map, so its own transpose."""
        if self.softcap is not None:
            assert product is not None
            moved = moved * (1 - torch.tanh(self._scaled(product) / self.softcap).square())
        factor = self.scale / self.temperature
        return moved if factor == 1 else moved * factor

    def _scaled(self, product: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return product.float() if self.scale == 1 else product.float() * self.scale

    def _as(self, x: Tensor) -> Tensor:
        return x.to(self.weight.device, self.dtype or self.weight.dtype)


def over_rows(
    functional: Callable[[Tensor], Tensor], rows: Float[Tensor, "n D"], head: Head, rows_at_once: int | None = None
) -> Float[Tensor, "n ..."]:
    """`functional`: (m, V) log-probs -> (m,) or (m, K), for every row; differentiable in rows and head.

    Memory: a few times `rows_at_once` x V floats forward and backward (by default CHUNK_BYTES a copy). The backward
    pass makes the chunks again, but where the head has no gradient: there a row's own comes with its value. K
    functionals of one pass share its logits. On the device of the rows. `functional` reads no other gradient.
    """
    given = rows, head.weight, head.bias
    if not torch.is_grad_enabled():
        given = [None if each is None else each.detach() for each in given]
    return OverRows.apply(functional, head, rows_at_once or head.rows_at_once, *given)  # pyright: ignore[reportReturnType]


def over_vocab(
    functional: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "B T D"],
    head: Head,
    rows_at_once: int | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T ..."]:
    """`over_rows` at every position of `hidden`.

    Positions off the mask cost nothing, give 0, and let nothing of their states into values or gradients. `functional`:
    (m, V) log-probs -> (m,) or (m, K).
    """
    counted = hidden.reshape(-1, hidden.size(-1)) if mask is None else hidden[mask]
    values = over_rows(functional, counted, head, rows_at_once)
    return values.view(*hidden.shape[:-1], *values.shape[1:]) if mask is None else spread_out(values, mask)


class OnePass:
    """`over_vocab` of a first stage: the functionals that are known before are all made when the first is asked for."""

    def __init__(
        self, read: Callable[[Callable[[Tensor], Tensor]], Tensor], known: Sequence[Callable[[Tensor], Tensor]]
    ) -> None:
        self.read, self.known = read, list(known)
        self.values: dict[Callable[[Tensor], Tensor], Tensor] = {}

    def __call__(self, functional: Callable[[Tensor], Tensor]) -> Tensor:
        if functional not in self.known:
            return self.read(functional)
        if functional not in self.values:
            widths: list[int] = []

            def of_all(logps: Tensor) -> Tensor:
                made = [each(logps) for each in self.known]
                columns = [each.unsqueeze(1) if each.dim() == 1 else each for each in made]
                widths[:] = [0 if each.dim() == 1 else each.size(1) for each in made]  # 0: no axis of its own
                return torch.cat(columns, dim=1)

            parts = self.read(of_all)
            of_each = parts.split([max(width, 1) for width in widths], dim=-1)
            for each, width, part in zip(self.known, widths, of_each, strict=True):
                self.values[each] = part if width else part.squeeze(-1)
        return self.values[functional]


def slope_of_rows(
    direction: Float[Tensor, "n D"] | Callable[[Tensor], Tensor],
    rows: Float[Tensor, "n D"],
    ids: Int[Tensor, "n"],
    head: Head,
    rows_at_once: int | None = None,
) -> Float[Tensor, "n"]:
    """d log p(token) / dh as each row moves along `direction`: the directional derivative through the head.

    For a plain head (W x)_y - sum_v p_v (W x)_v, x the direction; no gradient. A function makes the
    directions (m, D) of some rows (m, D) from them, so that those of all are never held.
    """
    size = rows_at_once or head.rows_at_once
    with torch.no_grad():
        head, slopes = head.rounded(), []
        chunks = rows.split(size)
        along = map(direction, chunks) if callable(direction) else direction.split(size)
        for chunk, own, tokens in zip(chunks, along, ids.split(size), strict=True):
            slopes.append(head.slope(chunk, tokens, own).to(chunk.device))
        return torch.cat(slopes)


def slope_along(
    direction: Float[Tensor, "B T D"] | Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "B T D"],
    ids: Int[Tensor, "B T"],
    head: Head,
    rows_at_once: int | None = None,
) -> Float[Tensor, "B T"]:
    """`slope_of_rows` at every position of `hidden`; a function makes (m, D) of (m, D)."""
    rows = hidden.reshape(-1, hidden.size(-1))
    along = direction if callable(direction) else direction.reshape(rows.shape)
    return slope_of_rows(along, rows, ids.reshape(-1), head, rows_at_once).view(ids.shape)


def entropy_by_head(
    hidden: Float[Tensor, "*N D"], head: Head, mask: Bool[Tensor, "*N"] | None = None, rows_at_once: int | None = None
) -> Float[Tensor, "V D"]:
    """d sum of the entropies of the tokens under the mask (all without one) / d weight of the head, in float32.

    On the head's device; no gradient.
    """
    rows = hidden if mask is None else hidden[mask]
    with torch.no_grad():
        head, found = head.rounded(), torch.zeros_like(head.weight, dtype=torch.float32)
        for chunk in rows.split(rows_at_once or head.rows_at_once):
            head.add_entropy_by_weight_(found, chunk)
    return found


def slope_by_head(
    direction: Float[Tensor, "V D"],
    hidden: Float[Tensor, "*N D"],
    ids: Int[Tensor, "*N"],
    head: Head,
    mask: Bool[Tensor, "*N"] | None = None,
    rows_at_once: int | None = None,
) -> Float[Tensor, "*N"]:
    """d log p(token) as the weight of the head moves along `direction`, 0 off the mask; no gradient.

    For a plain head (G z)_y - sum_v p_v (G z)_v, G the direction.
    """
    if mask is not None:
        return spread_out(slope_by_head(direction, hidden[mask], ids[mask], head, None, rows_at_once), mask)
    size = rows_at_once or head.rows_at_once
    with torch.no_grad():
        head, found = head.rounded(), []
        along, largest = head.along(direction)
        for z, y in zip(hidden.split(size), ids.split(size), strict=True):
            found.append(head.slope_of_weight(z, y, along).to(z.device))
        return torch.cat(found).float() * largest
