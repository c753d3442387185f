"""EAST, entropic activation steering: Rahn et al., 2024, arXiv:2406.00244"""

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .rows import Drawn, draw, in_evaluation, left_padded, within_context

Action = Callable[[Sequence[int]], Hashable | None]  # a response's ids -> what it does, None where it cannot be read


def action_entropy(actions: Sequence[Hashable | None]) -> float:
    """Nats, of the actions that could be read; 0 where none could."""
    counts = Counter(each for each in actions if each is not None)
    total = counts.total()
    return -sum(n / total * math.log(n / total) for n in counts.values()) if total else 0.0


def steering_vector(states: Float[Tensor, "K T D"], entropies: Float[Tensor, "K T"]) -> Float[Tensor, "D"]:
    """u = sum_kt h_kt (z_kt - mean_t z_kt) / sum_kt h_kt: towards the states in which the next action is uncertain.

    z_kt is the state at the last prompt token of step t of run k, h_kt the entropy of the actions there. Centred within
    each run, which the authors found essential: a common mean would mix the runs' histories into u. So one step a run
    says nothing, and neither do entropies that are all 0: both are refused.
    """
    if states.shape[1] < 2:
        raise ValueError(f"a steering vector needs at least 2 steps a run, got {states.shape[1]}")
    total = entropies.sum()
    if not total > 0:
        raise ValueError("a steering vector needs actions that differ, got entropies that are all 0")
    centred = states - states.mean(dim=1, keepdim=True)
    return (entropies.unsqueeze(-1) * centred).sum(dim=(0, 1)) / total


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a decoder. Refuses a model in which no list of as many modules is found."""
    found = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each)]
    wanted = model.config.get_text_config().num_hidden_layers
    blocks = next((each for each in found if len(each) == wanted), None)
    if blocks is None:
        raise ValueError(f"activation steering found no list of {wanted} layers in {type(model).__name__}")
    return blocks


def layer_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The block of that number, from 0; a ValueError where there is none."""
    blocks = layers_of(model)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer must be in 0 to {len(blocks) - 1}, got {layer}")
    return blocks[layer]


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def last_states(model: PreTrainedModel, prompts: Sequence[Sequence[int]], layer: int, pad: int) -> Float[Tensor, "N D"]:
    """The output of a layer (counted from 0) at the last token of each prompt."""
    ids, mask = left_padded(prompts, pad, model.device)
    seen: list[Tensor] = []
    handle = layer_of(model, layer).register_forward_hook(lambda _, __, output: seen.append(_stream(output)[:, -1]))
    try:
        with in_evaluation(model):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        handle.remove()
    return seen[0].float()


@dataclass(frozen=True, kw_only=True)
class ActivationSteering:
    """Adds strength times a vector to one layer's output, at the last prompt token and at every token after it.

    Token temperature does not make an agent's choice of action less certain; this does. A strength below 0 makes it
    more so, 0 is plain generation. The vector is not normalised, so a strength belongs to its model: report
    `relative` too. Tokens stay steered in the cache, and without a cache all of them are steered again. Trained with,
    the steered model is the behaviour policy: log-probs taken without the hook would be another policy's.

    Args:
        strength: the paper: 2 if nothing is said, useful from 0 to 9 for Mixtral
        layer: counted from 0; middle layers work; the paper: the 16th of 32
    """

    strength: float = 2.0
    layer: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be finite, got {self.strength}")

    @contextmanager
    def steering(self, model: PreTrainedModel, vector: Float[Tensor, "D"], prompt_length: int) -> Iterator[None]:
        """`prompt_length`: tokens that `generate` is given, padding on the left included. Refuses fewer than 1."""
        if prompt_length < 1:
            raise ValueError(f"prompt_length must be at least 1, got {prompt_length}")

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            stream = _stream(output)
            # with a cache a pass holds the prompt, or new tokens alone; without one all so far
            first = prompt_length - 1 if stream.shape[1] >= prompt_length else 0
            moved = stream.clone()
            moved[:, first:] += (self.strength * vector).to(stream)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        if not self.strength:
            yield
            return
        handle = layer_of(model, self.layer).register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def relative(self, vector: Float[Tensor, "D"], states: Float[Tensor, "N D"]) -> float:
        """strength |vector| over the root mean square length of the states that it is added to."""
        return abs(self.strength) * vector.norm().item() / states.square().sum(dim=-1).mean().sqrt().item()


def responses_under(
    steering: ActivationSteering,
    model: PreTrainedModel,
    vector: Float[Tensor, "D"],
    prompts: Sequence[Sequence[int]],
    streams: Sequence[random.Random],
    limits: Sequence[int],
    *,
    ends: Sequence[int],
    pad: int,
    use_cache: bool = True,
) -> list[Drawn]:
    """The responses to `prompts` with the steering vector added at its layer, a stream and a limit each."""
    found = [Drawn() for _ in prompts]
    for rows in within_context(model, prompts, limits):
        mine = [prompts[i] for i in rows]
        with steering.steering(model, vector, max(map(len, mine))):
            drawn = draw(
                model, mine, [streams[i] for i in rows], [limits[i] for i in rows], ends=ends, pad=pad,
                use_cache=use_cache,
            )  # fmt: skip
        for i, each in zip(rows, drawn, strict=True):
            found[i] = each
    return found


# long: a third of it is signature, a third the two calls
def sweep(
    strengths: Sequence[float],
    layer: int,
    model: PreTrainedModel,
    vector: Float[Tensor, "D"],
    prompts: Sequence[Sequence[int]],
    action: Action,
    *,
    completions: int = 25,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    seed: int = 0,
) -> list[dict[str, float]]:
    """At each strength, means over the prompts: `action_entropy` and `token_entropy` (nats), `read` (share of the
    completions whose action can be read) and `relative`. All strengths draw by the same streams."""
    states = last_states(model, prompts, layer, pad)
    found = []
    for strength in strengths:
        steering = ActivationSteering(strength=strength, layer=layer)
        repeated = [prompt for prompt in prompts for _ in range(completions)]
        drawn = responses_under(
            steering,
            model,
            vector,
            repeated,
            [random.Random(f"{seed}/{i}") for i in range(len(repeated))],
            [max_new_tokens] * len(repeated),
            ends=ends,
            pad=pad,
        )
        actions = [action(each.ids) for each in drawn]
        groups = [actions[i : i + completions] for i in range(0, len(actions), completions)]
        entropies = [entropy for each in drawn for entropy in each.entropies]
        found.append(
            {
                "strength": strength,
                "relative": steering.relative(vector, states),
                "action_entropy": sum(map(action_entropy, groups)) / len(groups),
                "token_entropy": sum(entropies) / len(entropies),
                "read": sum(each is not None for each in actions) / len(actions),
            }
        )
    return found
