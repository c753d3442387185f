"""The keys and values of texts under way, kept so that a text can go on from any earlier token of it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

FORKABLE = {"full_attention", "sliding_attention", "attention"}
Layers = tuple[tuple[Tensor, Tensor], ...]  # (rows, heads, columns, width) each: keys and values of every layer


@dataclass(frozen=True)
class Kept:
    """Where the keys and values of a text's first tokens lie: `length` columns from `start` on, of one row."""

    layers: Layers
    row: int
    start: int
    length: int

    def cut(self, length: int) -> "Kept":
        """The same cache with `length` tokens at most."""
        return replace(self, length=min(self.length, length))


def layers_of(cache: DynamicCache, rows: Sequence[int]) -> Layers:
    """A copy of these rows."""
    return tuple((layer.keys[list(rows)], layer.values[list(rows)]) for layer in cache.layers)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalSubscript]


def select(cache: DynamicCache, rows: Sequence[int]) -> None:
    """Leaves these rows alone."""
    cache.batch_select_indices(torch.tensor(rows, device=cache.layers[0].keys.device))  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def gathered(kept: Sequence[Kept | None], lengths: Sequence[int]) -> DynamicCache:
    """A cache of the first so many tokens of each text, which end together; what stands before them means nothing."""
    cache, width = DynamicCache(), max(lengths, default=0)
    if not width:
        return cache
    stores = {id(each.layers): each.layers for each in kept if each is not None}
    [first, *_] = stores.values()
    for number, (keys, _) in enumerate(first):
        shape = (len(kept), keys.shape[1], width)
        both = [of.new_zeros(*shape, of.shape[-1]) for of in first[number]]  # under autocast of two dtypes
        for name, layers in stores.items():
            rows = [i for i, each in enumerate(kept) if each is not None and id(each.layers) == name]
            places = [kept[i] for i in rows]
            starts = torch.tensor([p.start + lengths[i] - width for i, p in zip(rows, places, strict=True) if p])
            columns = (starts[:, None] + torch.arange(width)).clamp(min=0).to(keys.device)
            of = torch.tensor([p.row for p in places if p], device=keys.device)[:, None]
            for part, out in enumerate(both):
                out[rows] = layers[number][part][of, :, columns].transpose(1, 2)
        cache.update(both[0], both[1], number)
    return cache


def arguments_of(model: PreTrainedModel) -> tuple[str, frozenset[str]]:
    """What the model's forward pass calls its cache, and all that it takes."""
    # an adapter passes everything on
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    known = frozenset(inspect.signature(type(base).forward).parameters)
    return "cache" if "cache" in known else "past_key_values", known


def unforkable(model: PreTrainedModel) -> str | None:
    """Why the model's cache cannot go on from an earlier token; None if it can."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(model, "_is_stateful", False) or not kinds <= FORKABLE:
        return (
            f"its layers ({', '.join(sorted(kinds - FORKABLE)) or config.model_type}) keep a state, not keys and values"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share their keys and values"
    return None
