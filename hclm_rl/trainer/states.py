"""The last hidden states of the sampling policy, as the first stage reads them: kept once, of the tokens alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor

from ..equations.functional import spread_out, widest
from ..equations.geometry import Moments, merge_, moments
from ..equations.rows import mean_of_responses, pieces


@dataclass(frozen=True)
class Packed:
    """Of a scoring pass: the states of the tokens that are there, row after row, and nothing of the padding."""

    rows: Tensor  # (M, D)
    present: Tensor  # (N, T) bool

    def of(self, mask: Tensor) -> Tensor:
        """Those of the tokens that count, (n, D), in the order of `mask` (N, T); what is kept itself where all do."""
        counted = mask[self.present]
        return self.rows if bool(counted.all()) else self.rows[counted]

    def whole(self) -> Tensor:
        """(N, T, D), with zeros in the padding: a copy."""
        return spread_out(self.rows, self.present)


@dataclass(frozen=True)
class Shuffled:
    """Of the loss's own pass, which saw the whole generation batch in another order; its graph holds them anyway."""

    states: Tensor  # (N, T, D), detached
    order: Tensor  # (N,) of a response: its place in `states`

    def of(self, mask: Tensor) -> Tensor:
        """Those of the tokens that count, (n, D), in the order of `mask` (N, T): a copy."""
        row, token = mask.nonzero(as_tuple=True)
        return self.states[self.order[row], token]

    def whole(self) -> Tensor:
        """(N, T, D), in the order in which the batch was generated: a copy."""
        return self.states[self.order]


States = Packed | Shuffled


@dataclass
class Packing:
    """Takes the states of a scoring pass as its pieces come, into room that is made once."""

    present: Tensor  # (N, T) bool: the response tokens, tools' included
    rows: Tensor | None = None
    responses: int = 0  # seen so far
    filled: int = 0
    counts: Sequence[int] = field(default_factory=list)  # tokens of each response

    def take(self, states: Tensor) -> None:
        """The last states of the next responses, (n, L, D), prompts included: those that predicted their tokens."""
        width, last = self.present.size(1), self.responses + len(states)
        if self.rows is None:
            self.counts = self.present.sum(dim=1).tolist()
            self.rows = states.new_empty(sum(self.counts), states.size(2))
        end = self.filled + sum(self.counts[self.responses : last])
        own = self.present[self.responses : last].to(states.device)
        self.rows[self.filled : end] = states[:, -width - 1 : -1].detach()[own]
        self.responses, self.filled = last, end

    def packed(self) -> Packed | None:
        """What was taken."""
        return None if self.rows is None else Packed(self.rows, self.present.to(self.rows.device))


@dataclass
class Passing:
    """Takes moments of a scoring pass's states, or the means of its responses, as its pieces come.

    Nothing of the states is kept.
    """

    mask: Tensor  # (N, T) bool: the tokens that count
    kinds: Sequence[Callable[..., Tensor]]  # `Term.sampled_moments`: what is done to the states before
    found: dict[Callable[..., Tensor], Moments] = field(default_factory=dict)
    means: list[Tensor] = field(default_factory=list)  # (n, D) of the responses of each piece
    responses: int = 0  # seen so far

    def take(self, states: Tensor) -> None:
        """The last states of the next responses, (n, L, D), prompts included."""
        width = self.mask.size(1)
        self.add(states[:, -width - 1 : -1])

    def add(self, states: Tensor) -> None:
        """The states that predicted the tokens of the next responses, (n, T, D)."""
        for piece in pieces(len(states), states.size(1) * states.size(2)):
            part = states[piece].detach()
            own = self.mask[self.responses : self.responses + len(part)].to(part.device)
            self.responses += len(part)
            rows = part[own]
            for each in self.kinds:
                if each is mean_of_responses:
                    self.means.append(mean_of_responses(rows, own, widest(rows.device)))
                    continue
                new = moments(rows, each=each)
                self.found[each] = merge_(self.found[each], new) if each in self.found else new

    def passed(self, order: Tensor | None = None) -> dict[Callable[..., Tensor], Any]:
        """What `Rollout.passed` is, of means (N, D); `order` (N,): where each response is here, if elsewhere."""
        if not self.means:
            return dict(self.found)
        means = torch.cat(self.means)
        return self.found | {mean_of_responses: means if order is None else means[order]}


def is_reference(trainer: Any) -> bool:
    """Whether the policy's model is the reference at this moment: TRL switches its adapter off, or to a frozen one."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not is_peft_model(model):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer  # peft is an extra

    if model.active_adapter == "ref":
        return True
    return any(each.disable_adapters for each in model.modules() if isinstance(each, BaseTunerLayer))
