"""Responses kept from earlier steps, as tensors that fit a term's memory."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PREFIX = "replay_"  # of the keys in a memory


@dataclass(frozen=True, kw_only=True)
class Replay:
    """K responses with the log-probs of the policy that sampled them; the same on all processes."""

    prompt_ids: Int[Tensor, "K P"]  # padded on the left
    prompt_mask: Bool[Tensor, "K P"]
    ids: Int[Tensor, "K T"]  # padded on the right
    present: Bool[Tensor, "K T"]  # False on padding
    mask: Bool[Tensor, "K T"]  # False on padding and on what tools wrote
    logps: Float[Tensor, "K T"]  # 0 off the mask
    reward: Float[Tensor, "K"]
    advantage: Float[Tensor, "K"]  # when it was sampled, mean over its tokens
    step: Int[Tensor, "K"]  # at which it was sampled

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, which: Tensor) -> "Replay":
        """Some of them, cut to the widths that these need. `which` (n,): numbers of rows."""
        some = {each.name: getattr(self, each.name)[which] for each in fields(self)}
        prompt, text = some["prompt_mask"].any(dim=0), some["present"].any(dim=0)
        for name, kept in {
            "prompt_ids": prompt,
            "prompt_mask": prompt,
            "ids": text,
            "present": text,
            "mask": text,
        }.items():
            some[name] = some[name][:, kept]
        some["logps"] = some["logps"][:, text]
        return Replay(**some)

    def joined(self, more: "Replay") -> "Replay":
        """Both, padded to the wider."""
        joined = {}
        for each in fields(self):
            pair = [getattr(self, each.name), getattr(more, each.name)]
            if pair[0].dim() == 2:
                width, is_prompt = max(x.size(1) for x in pair), each.name.startswith("prompt")
                pair = [padded(x, width, left=is_prompt) for x in pair]
            joined[each.name] = torch.cat(pair)
        return Replay(**joined)

    def save(self, memory: dict) -> None:
        """Into the term's memory, for the checkpoint."""
        memory |= {PREFIX + each.name: getattr(self, each.name) for each in fields(self)}


def padded(x: Tensor, width: int, *, left: bool) -> Tensor:
    """x (K, T) with zeros up to `width` columns."""
    return torch.nn.functional.pad(x, (width - x.size(1), 0) if left else (0, width - x.size(1)))


def kept_in(memory: dict) -> Replay | None:
    """What `save` left there."""
    if PREFIX + "ids" not in memory:
        return None
    return Replay(**{each.name: memory[PREFIX + each.name] for each in fields(Replay)})


def left_padded(ids: Int[Tensor, "N P"], mask: Bool[Tensor, "N P"]) -> tuple[Tensor, Tensor]:
    """The same tokens with all padding on the left, wherever it was. Both (N, P)."""
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def picked_from(
    stored: Int[Tensor, "R"], asked: Int[Tensor, "N"], at: Int[Tensor, "N"], of_any: bool
) -> Int[Tensor, "N"]:
    """For each asked prompt the place of one stored for it, or `of_any` prompt; -1 where there is none.

    `stored`: the prompt of each, at least one; `at`: large random numbers, at least 0.
    """
    ordered, by_prompt = stored.sort(stable=True)
    low, high = torch.searchsorted(ordered, asked), torch.searchsorted(ordered, asked, right=True)
    if of_any:
        low, high = torch.zeros_like(asked), torch.full_like(asked, len(stored))
    picked = (low + at % (high - low).clamp(min=1)).clamp(max=len(stored) - 1)
    return torch.where(high > low, by_prompt[picked], -1)
