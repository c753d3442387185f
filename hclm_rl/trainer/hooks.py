"""What is watched in the model while TRL runs it: hidden states, attention, the gradient through the output head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..chain.chain import Outcome
from ..chain.door import TermRefused, measured
from ..recipe.refusals import NOTHING
from ..types import Attention
from .head import language_model
from .states import Packing, Passing
from .tracing import record


@dataclass
class Seen:
    """What the hooks kept of one pass, an element a forward call; at position i is what predicts token i + 1."""

    states: list[Tensor] = field(default_factory=list)  # (B, L, D), the backbone's last, of a pass with gradient
    packing: Packing | Passing | None = None  # of a scoring pass
    through_head: list[Tensor] = field(default_factory=list)  # (B, L, D), the alias that the head read
    # (B, heads, queries) of every layer, and the width of its sliding window
    attention: list[tuple[Tensor, int | None]] = field(default_factory=list)

    def hidden(self, width: int) -> Tensor | None:
        """The states that predicted the last `width` tokens, (B, width, D); of one forward call a view."""
        own = [states[:, -width - 1 : -1] for states in self.states]
        return torch.cat(own) if len(own) > 1 else next(iter(own), None)

    def sampled(self) -> dict[str, Any]:
        """What a scoring pass left of its states: fields of `Scores`."""
        if isinstance(self.packing, Passing):
            return {"passed": self.packing.passed()}
        return {"states": None if self.packing is None else self.packing.packed()}

    def spread(self, width: int, attention_mask: Tensor) -> Attention | None:
        """The attention that predicted the last `width` tokens; `attention_mask`: (B, L), of prompts and responses."""
        if not self.attention:
            return None
        visible = attention_mask.long().cumsum(dim=1)  # causal: the keys up to the query, but for the padding
        own = [heads[:, :, -width - 1 : -1] for heads, _ in self.attention]
        up_to = visible[:, None, -width - 1 : -1]
        in_window = [up_to.clamp(max=window or visible.size(1)) for _, window in self.attention]
        return Attention(
            entropy=torch.cat(own, dim=1),
            visible=torch.cat([n.expand_as(heads) for n, heads in zip(in_window, own, strict=True)], dim=1),
            width=visible.size(1),
        )


@contextmanager
def watching(trainer: Any, present: Tensor | None) -> Iterator[Seen]:
    """Keeps what the terms read of the passes inside, and no more.

    `present`: the response tokens of a scoring pass, (N, T); None in the loss's own pass.
    """
    chain, seen = trainer._hclm.chain, Seen()
    hooks = []
    try:
        if present is not None and (chain.needs_sampled_states or chain.sampled_moments):
            seen.packing = keeper(trainer, present)
            hooks.append(pack_hidden(trainer, seen.packing))
        elif present is None and reads_training_states(trainer):
            hooks.append(watch_hidden(trainer, seen))
        if chain.needs_attention and present is None:
            hooks += watch_attention(trainer, seen)
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def keeper(trainer: Any, present: Tensor) -> Packing | Passing:
    """What takes the states of a scoring pass: their moments, if the terms read no more and it is known of which.

    `present`: its response tokens, (N, T).
    """
    run = trainer._hclm
    mask = None if run.generation is None else run.generation.mask
    if mask is None and not may_leave_tokens_out(trainer):
        mask = present
    if run.chain.needs_sampled_states or mask is None:
        return Packing(present)
    return Passing(mask, run.chain.sampled_moments)


def may_leave_tokens_out(trainer: Any) -> bool:
    """Whether some of the tokens may not count, which TRL's own scoring pass comes too early to say."""
    own = ("tools", "environments", "environment_factory", "rollout_func")
    return trainer._hclm.rollout is not None or any(getattr(trainer, name, None) for name in own)


def reads_training_states(trainer: Any) -> bool:
    """Whether a term reads the states of the loss's own pass: in stage 2, or in a first stage that waited for it."""
    run = trainer._hclm
    is_first_stage = run.deferred is not None and (run.chain.needs_sampled_states or run.chain.sampled_moments)
    return bool(run.chain.needs_hidden or run.chain.needs_vocab_gradient or is_first_stage)


def pack_hidden(trainer: Any, packing: Packing | Passing) -> Any:
    """Keeps, or passes on, the backbone's last hidden states of the response tokens, without gradient."""

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        packing.take(output.last_hidden_state)

    return language_model(trainer).base_model.register_forward_hook(keep)


def watch_hidden(trainer: Any, seen: Seen) -> Any:
    """Keeps the backbone's last hidden states; the head reads an alias, whose gradient is the head's alone."""

    def keep(module: torch.nn.Module, args: Any, output: Any) -> Any:
        seen.states.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state.view_as(output.last_hidden_state)
        seen.through_head.append(output.last_hidden_state)
        return output

    return language_model(trainer).base_model.register_forward_hook(keep)


def watch_attention(trainer: Any, seen: Seen) -> list:
    """Keeps the attention entropies of every layer and the width of its sliding window.

    Without gradient where it checkpoints.
    """
    model = language_model(trainer)
    config = model.config.get_text_config()
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)

    def keep(module: Any, args: Any, output: Any) -> None:
        weights = (output[1].detach() if model.is_gradient_checkpointing else output[1]).float()
        weights = torch.where(weights > 0, weights, 1.0)  # 0 log 0 is 0, and so is its gradient
        is_sliding = not layers or layers[module.layer_idx] == "sliding_attention"  # all layers, as Mistral's
        seen.attention.append((-(weights * weights.log()).sum(dim=-1), window if is_sliding else None))

    modules = [each for each in model.modules() if type(each).__name__.endswith("Attention")]
    return [each.register_forward_hook(keep) for each in modules]


def watch_gradient(trainer: Any, outcome: Outcome, through_head: Tensor, mask: Tensor) -> None:
    """Hands the gradient through the output head to the terms that asked for it, in the backward pass.

    `through_head`: the states that the head read, (B, L, D); `mask`: (B, T). Refuses states that need no gradient.
    """
    width, step = mask.size(1), trainer.state.global_step
    if not through_head.requires_grad:
        raise TermRefused(
            f"{', '.join(outcome.on_hidden_gradient)}: reads the gradient at the hidden states, which need none in "
            "this run: nothing before the output head is trained"
        )

    def receive(gradient: Tensor) -> None:
        # processes are averaged afterwards, and what float16 scales the loss by is taken out again
        scaler = trainer.accelerator.scaler
        scale = trainer.accelerator.num_processes * (1.0 if scaler is None else scaler.get_scale())
        own = gradient[:, -width - 1 : -1].float() / scale
        for link, callback in outcome.on_hidden_gradient.items():
            for name, metric in measured(callback, own.detach(), link, step, mask).items():
                record(trainer, f"{link}/{name}", metric, mask)
        hook.remove()  # a callback may hold the batch, whose graph holds this hook: without this, a leak

    hook = through_head.register_hook(receive)


def refuse_other_attention(trainer: Any) -> None:
    """Terms that read attention, in a model that does not keep it or throws it away."""
    links = [link for link in trainer._hclm.chain.links if link.term.needs_attention]
    if not links:
        return
    config = language_model(trainer).config
    names, given = ", ".join(link.name for link in links), config._attn_implementation
    if given != "eager":
        raise ValueError(
            f"{names}: reads attention probabilities, which attn_implementation '{given}' does not keep: set "
            "attn_implementation: eager (in Python model_init_kwargs={'attn_implementation': 'eager'})"
        )
    if "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        raise ValueError(
            f"{names}: reads attention probabilities, and how many keys a query sees in this model's chunked "
            "attention is not known here; use a model with full or sliding attention"
        )
    if trainer.args.gradient_checkpointing and any(link.coef != NOTHING for link in links):
        raise ValueError(
            f"{names}: regularises attention probabilities, which gradient checkpointing throws away: set "
            "gradient_checkpointing: false, or coef: 0 to log them only"
        )
