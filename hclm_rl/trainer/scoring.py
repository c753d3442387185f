"""Passes of our own: the policy or the reference scores texts that TRL does not ask about."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, use_adapter

from ..types import Transcript
from .head import language_model


@contextmanager
def aside(trainer: Any, has_gradient: bool = False) -> Iterator[None]:
    """For a pass of our own: a model with dropout draws the same numbers afterwards as without it."""
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    quietly = nullcontext() if has_gradient else disable_gradient_checkpointing(trainer.model, checkpointing)
    with torch.random.fork_rng(devices), quietly, torch.set_grad_enabled(has_gradient):
        yield


def score(
    trainer: Any, model: Any, transcript: Transcript, scorer: Literal["policy", "reference"] = "policy"
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of any completions, both (N, T) in nats, by a pass of its own.

    In chunks where there is no gradient. Refuses the reference in a run that loads none.
    """
    adapter = nullcontext()
    if scorer == "reference" and not trainer.beta:
        raise ValueError("a term asks for the reference model, which this run does not load: set beta > 0")
    if scorer == "reference" and trainer.ref_model is not None:
        model = reference_with_entropy(trainer)
    elif scorer == "reference":
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
        adapter = use_adapter(peft_model, adapter_name="ref" if "ref" in peft_model.peft_config else None)
    ids = torch.cat([transcript.prompt_ids, transcript.ids], dim=1)
    attention = torch.cat([transcript.prompt_mask, transcript.present], dim=1).long()
    has_gradient = torch.is_grad_enabled() and scorer == "policy"
    size = None if has_gradient else trainer.args.per_device_train_batch_size
    with aside(trainer, has_gradient), adapter:
        logps, entropy, _ = trainer._hclm_trls_pass(
            model, ids, attention, transcript.ids.size(1), size, compute_entropy=True
        )
    return logps, entropy


def reference_hidden(trainer: Any, transcript: Transcript) -> Tensor:
    """The reference's last hidden states (after the final norm) at the completions' tokens, (N, T, D); no gradient."""
    states: list[Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[:, -transcript.ids.size(1) :])

    has_own = trainer.ref_model is not None  # else it is the policy without its adapter
    model = trainer.accelerator.unwrap_model(trainer.ref_model) if has_own else language_model(trainer)
    hook = model.base_model.register_forward_hook(keep)
    try:
        score(trainer, trainer.model, transcript, "reference")
    finally:
        hook.remove()
    return torch.cat(states)


def reference_with_entropy(trainer: Any) -> Any:
    """The reference model, whose fused forward gives entropies too: TRL asks it for log-probs alone."""
    if not trainer._hclm.reference_gives_entropy:
        add_fused_lm_head(
            trainer.accelerator.unwrap_model(trainer.ref_model),
            temperature=trainer.temperature,
            cast_lm_head_to_fp32=getattr(trainer.args, "cast_lm_head_to_fp32", False),
            outputs=("log_probs", "entropy"),
        )
        trainer._hclm.reference_gives_entropy = True
    return trainer.ref_model
