"""The model's output head, from which terms read the whole next-token distribution."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..equations.functional import spread_out
from ..equations.vocab import Head, entropy_by_head, over_rows, over_vocab, slope_by_head, slope_of_rows
from .states import States


def language_model(trainer: Any) -> PreTrainedModel:
    """The policy without wrappers and adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if is_peft_model(model) else model


def over_vocab_of(
    trainer: Any, functional: Callable[[Tensor], Tensor], states: Tensor | States, mask: Tensor
) -> Tensor:
    """`equations.vocab.over_vocab` of a batch with these hidden states, (N, T, D).

    `functional`: (m, V) log-probs -> (m,) or (m, K); `mask`: (N, T), which tokens. Gives (N, T) or (N, T, K), 0
    elsewhere.
    """
    with output_head(trainer) as head:
        if isinstance(states, Tensor):
            return over_vocab(functional, states, head, mask=mask)
        return spread_out(over_rows(functional, states.of(mask), head), mask)


def slope_of(
    trainer: Any, direction: Tensor | Callable[[Tensor], Tensor], states: States, ids: Tensor, mask: Tensor
) -> Tensor:
    """`equations.vocab.slope_of_rows` of a batch with these hidden states and tokens, in nats a unit of the direction.

    `direction`: (N, T, D), or what makes (m, D) of so many states; `ids`, `mask`: (N, T). Gives (N, T), 0 elsewhere.
    """
    along = direction if callable(direction) else direction[mask]
    with output_head(trainer) as head:
        return spread_out(slope_of_rows(along, states.of(mask), ids[mask], head), mask)


def entropy_by_head_of(trainer: Any, states: States, mask: Tensor) -> Tensor:
    """`equations.vocab.entropy_by_head` of a batch with these hidden states: (V, D), of the tokens of `mask` (N, T)."""
    with output_head(trainer) as head:
        return entropy_by_head(states.of(mask), head)


def slope_by_head_of(trainer: Any, direction: Tensor, mask: Tensor, states: States, ids: Tensor) -> Tensor:
    """`equations.vocab.slope_by_head` of a batch with these hidden states and tokens: (N, T), 0 outside `mask` (N, T).

    `direction`: (V, D), of the head's weight; `ids`: (N, T).
    """
    with output_head(trainer) as head:
        return spread_out(slope_by_head(direction, states.of(mask), ids[mask], head), mask)


@contextmanager
def output_head(trainer: Any) -> Iterator[Head]:
    """The output head with the factors that TRL's fused forward applies; whole inside, also where it is sharded.

    All processes must enter it alike: ZeRO-3 gathers the head here. FSDP2 leaves it whole after a forward pass;
    where it did not, it is gathered without gradient alone.
    """
    model: Any = language_model(trainer)
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    with maybe_gather_lm_head_ctx(weight, bias):
        if isinstance(weight, DTensor):
            if torch.is_grad_enabled():
                raise ValueError(
                    f"{', '.join(trainer._hclm.chain.needs_vocab_gradient)}: reads the whole next-token distribution "
                    "with gradient, and FSDP shards the output head again after the forward pass: leave it out of "
                    "the wrapped classes, or use DDP"
                )
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        if weight.dim() != 2:  # FSDP1 keeps slices of a flat parameter
            raise ValueError(
                f"{', '.join(trainer._hclm.chain.needs_vocab)}: reads the output head, which is not whole here (its "
                f"weight has the shape {tuple(weight.shape)}): use DDP, FSDP2 or ZeRO"
            )
        dtype = product_dtype(trainer, weight)
        yield Head(weight=weight, bias=bias, temperature=trainer.temperature, dtype=dtype, **factors(model.config))


def product_dtype(trainer: Any, weight: Tensor) -> torch.dtype | None:
    """What autocast makes of the head's product in the policy's own pass; None where that is the weight's own.

    `weight`: (V, D).
    """
    if getattr(trainer.args, "cast_lm_head_to_fp32", False):
        return None
    kind = weight.device.type
    with trainer.accelerator.autocast():
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def factors(model_config: PretrainedConfig) -> dict[str, Any]:
    """What stands between the head's projection and the logits, as TRL's fused forward reads it: `Head`'s fields."""
    config = model_config.get_text_config()
    multipliers = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # of Cohere, Muse, Falcon-H1
    given = [getattr(config, name, None) for name in multipliers]
    divisor = getattr(config, "logits_scaling", None)  # of Granite; HyperCLOVA X multiplies by it
    if divisor is not None:
        given.append(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    scale = next((float(value) for value in given if value is not None), 1.0)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}
