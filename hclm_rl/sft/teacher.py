"""A second set of the weights that are trained, read through the same network."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..equations.vocab import Head
from ..trainer.head import factors

ROWS_AT_ONCE = 256  # positions whose distributions are held together

Reads = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class Teacher:
    """Copies of the trainable parameters; with LoRA those of the adapter alone."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: each.detach().clone() for name, each in trained(model).items()}

    @torch.no_grad()
    def follow(self, model: nn.Module, new_weight: float) -> None:
        """teacher <- (1 - new_weight) teacher + new_weight student"""
        for name, student in trained(model).items():
            self.weights[name].lerp_(student.detach(), new_weight)

    @contextmanager
    def in_place(self, model: Any) -> Iterator[None]:
        """Its weights stand in the model's place inside, in evaluation mode; storage is exchanged, not copied."""
        was_training, mine = model.training, trained(model)
        self._exchange(mine)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            self._exchange(mine)

    def _exchange(self, mine: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in mine.items():
            parameter.data, self.weights[name] = self.weights[name], parameter.data

    @torch.no_grad()
    def columns(
        self, model: Any, inputs: Mapping[str, Any], labels: Int[Tensor, "B L"], reads: Reads
    ) -> dict[str, Float[Tensor, "B T"]]:
        """What `reads` makes of the next-token distributions where there are labels; 0 elsewhere."""
        mask: Bool[Tensor, "B T"] = labels[:, 1:] != -100
        with self.in_place(model):
            plain = model.get_base_model() if is_peft_model(model) else model
            body = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
            states = plain.base_model(**body, use_cache=False).last_hidden_state[:, :-1][mask]
            head = plain.get_output_embeddings()
            output = Head(weight=head.weight, bias=head.bias, **factors(plain.config))
            chunks = zip(states.split(ROWS_AT_ONCE), labels[:, 1:][mask].split(ROWS_AT_ONCE), strict=True)
            found = [reads(output.logps(rows), targets) for rows, targets in chunks]
        return {
            name: torch.zeros(mask.shape, device=mask.device).masked_scatter(
                mask, torch.cat([each[name].float() for each in found])
            )
            for name in found[0]
        }


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}
