"""Entropy-adaptive decoding, a large model where a small one is uncertain: Simonds, 2025, arXiv:2502.06833"""

import inspect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..equations.temperature import entropy_of
from .rows import Drawn, RowSampler, in_evaluation


@dataclass(frozen=True, kw_only=True)
class ModelSwitching:
    """A small model writes; a large one takes over where the entropy is high, and gives back where it is low.

    H_t, in bits, is that of the model in use at temperature 1; the mean over the last `window` tokens is compared with
    `threshold`. At least `stay` tokens lie between two switches: the entropies of the two models have different
    levels, and one threshold for both directions would flip. Nothing is verified, so the text is not the large model's.
    The model that a step chooses draws that step's token. `threshold` infinity is the small model alone. Both
    need the same tokenizer.

    Args:
        threshold: bits; sweep it, the paper does
        window: tokens, at least 1; the paper's value
        stay: tokens, at least 0; the paper's value
    """

    threshold: float = 1.0
    window: int = 5
    stay: int = 10

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError(f"threshold must be a number of bits, got {self.threshold}")
        if self.window < 1 or self.stay < 0:
            raise ValueError(f"window must be at least 1 and stay at least 0, got {self.window} and {self.stay}")


@dataclass
class Switch:
    """Which model is in use; `next_is_large` is told the entropies in use one by one."""

    of: ModelSwitching
    is_large: bool = False
    since: int = 0  # tokens after the last switch
    entropies: list[float] = field(default_factory=list)  # bits

    def next_is_large(self, bits: float) -> bool:
        """Whether the large model says the next token, after one of this entropy in bits."""
        self.entropies.append(bits)
        last = self.entropies[-self.of.window :]
        wants_large = sum(last) / len(last) >= self.of.threshold
        if self.since >= self.of.stay and wants_large != self.is_large:
            self.is_large, self.since = wants_large, 0
        else:
            self.since += 1
        return self.is_large


@dataclass
class Switched:
    """A response, and what it cost."""

    response: Drawn
    is_large: list[bool]  # of each token, which model drew it
    small_reads: int  # tokens that went through each model, prompt and what it caught up on included
    large_reads: int

    def compute(self, small_parameters: int, large_parameters: int, prompt: int) -> float:
        """Against the large model alone: parameters times tokens read, a share; attention left out."""
        here = self.small_reads * small_parameters + self.large_reads * large_parameters
        return here / (large_parameters * (prompt + max(len(self.response.ids) - 1, 0)))


class _Reader:
    """A model with its cache, which catches up on what it has missed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache, self.seen = model, DynamicCache(config=model.config), 0
        # transformers renames the argument in the versions that we work with
        self.key = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"

    def scores(self, ids: Sequence[int]) -> Tensor:
        """(1, V) of the next token after `ids`."""
        missed = torch.tensor([list(ids[self.seen :])], device=self.model.device)
        outputs: Any = self.model(input_ids=missed, use_cache=True, **{self.key: self.cache})
        self.seen = len(ids)
        return outputs.logits[:, -1].float()


# long: a third of it is signature
def switched(
    settings: ModelSwitching,
    small: PreTrainedModel,
    large: PreTrainedModel,
    prompt: Sequence[int],
    stream: random.Random,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    temperature: float = 1.0,
) -> Switched:
    """A response to one prompt (ids). Refuses two models whose vocabularies differ."""
    if small.config.get_text_config().vocab_size != large.config.get_text_config().vocab_size:
        raise ValueError(
            "model_switching needs two models with one tokenizer, and their vocabularies have "
            f"{small.config.get_text_config().vocab_size} and {large.config.get_text_config().vocab_size} words"
        )
    if not prompt:
        raise ValueError("every prompt must have at least one token, got an empty one")
    sampler = RowSampler([stream], [max_new_tokens], ends, temperature)
    readers, switch, used = {False: _Reader(small), True: _Reader(large)}, Switch(settings), []
    reads = {False: 0, True: 0}

    def read(is_large: bool, ids: Sequence[int]) -> Tensor:
        reads[is_large] += len(ids) - readers[is_large].seen
        return readers[is_large].scores(ids)

    [row] = sampler.rows
    with in_evaluation(small), in_evaluation(large), torch.no_grad():
        while sampler.is_open(0):
            ids, before = [*prompt, *row.ids], switch.is_large
            scores = read(before, ids)
            nats = entropy_of(scores).item()
            after = switch.next_is_large(nats / math.log(2))
            if after != before:
                scores = read(after, ids)
                nats = entropy_of(scores).item()
            row.entropies.append(nats)
            used.append(after)
            sampler(torch.zeros(1, 1, dtype=torch.long), scores)
    return Switched(response=row, is_large=used, small_reads=reads[False], large_reads=reads[True])
