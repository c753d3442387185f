"""Nothing that is not finite may reach an optimiser step: what links put into it is noted, and judged once.

Noting does not wait for the device: it keeps the least and the largest value. `excess` says by one number whether all
of them are finite, so that it can travel in an all-reduce that a step makes anyway; `findings` tells what was not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 1e18  # optimisers square the gradient: beyond 1.8e19 the square is no float32


class NotFinite(RuntimeError):
    """A link would have put a NaN or an infinity into an optimiser step: the run stops before it."""


class Finding(NamedTuple):
    """Who made what is not finite, and where."""

    link: str
    quantity: str
    coef: float


@dataclass
class Watch:
    """What was noted since the last judgement, in the order in which it was made."""

    noted: list[tuple[Finding, Tensor, Tensor]] = field(default_factory=list)

    def note(self, link: str, quantity: str, value: Tensor, mask: Tensor | None = None, coef: float = 1.0) -> None:
        """Notes a value of any shape; what a mask of its shape leaves out is not looked at."""
        if not (value.is_floating_point() and value.numel()):
            return
        value = value.detach()
        if mask is not None and mask.shape == value.shape:
            value = torch.where(mask, value, 0)
        least, largest = torch.aminmax(value)
        self.noted.append((Finding(link, quantity, coef), least, largest))

    def alias(self, link: str, quantity: str, value: Tensor, coef: float = 1.0) -> Tensor:
        """The same values, of any shape, for one link, whose gradient is noted in the backward pass."""
        if not value.requires_grad:
            return value
        own = value.view_as(value)

        def receive(gradient: Tensor) -> None:
            # what float16 overflows in is the loss scaler's to see: it leaves out the step
            if gradient.dtype != torch.float16:
                self.note(link, f"gradient at the {quantity}", gradient, coef=coef)

        own.register_hook(receive)
        return own

    def excess(self, device: torch.device) -> Tensor:
        """How many of the noted ends are beyond LARGEST or NaN, (): 0 where all is well."""
        if not self.noted:
            return torch.zeros((), device=device)
        ends = torch.stack([end.to(device, torch.float32) for _, *both in self.noted for end in both])
        return (~(ends.abs() <= LARGEST)).sum().float()

    def findings(self) -> list[Finding]:
        """What was not finite, first things first."""
        return [found for found, *ends in self.noted if not all(abs(end.item()) <= LARGEST for end in ends)]

    def require_finite(self, step: int) -> None:
        """Judges what was noted on this process alone, and forgets it."""
        found = self.findings()
        self.noted.clear()
        if found:
            raise NotFinite(sentence(found, step))


def sentence(found: Sequence[Finding], step: int, policy: str = "") -> str:
    """The first finding is the one to blame: what follows may have come of it. `policy`: what is wrong with that."""
    first = found[0]
    strength = "" if first.coef == 1.0 else f" (its coefficient is {first.coef:g})"
    return (
        f"{policy}the entropy term '{first.link}' produced values that are not finite (or beyond {LARGEST:g}) in its "
        f"{first.quantity}{strength} at step {step}; training stopped before the optimiser step, and the weights are "
        "those of the step before"
    )


def policy_sentence(entropies: bool, logps: bool, step: int) -> str:
    """What a policy gave that is not finite: no term's doing."""
    what = " and ".join(name for name, is_bad in (("entropies", entropies), ("log-probs", logps)) if is_bad)
    return (
        f"the policy itself gave {what} that are not finite at step {step}: its weights hold NaN or infinities, or "
        "logits are -inf, as of a masked vocabulary"
    )
