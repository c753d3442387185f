"""Entropy-aware sampling by the stable entropy hypothesis: Arora et al., 2023, arXiv:2302.06784"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TypicalLogitsWarper

from ..equations.temperature import entropy_of

Entropies = Float[Tensor, "N T"]
Mask = Bool[Tensor, "N T"]


@dataclass(frozen=True, kw_only=True)
class StableEntropy(LogitsProcessor):
    """Takes the likeliest word, and samples only where the entropy leaves the zone of human text.

    Token number t of the response, counted from 1, is sampled if t > guard and H_t > mean + width deviation, from the
    top words or the typical ones; all others are the greedy choice. It needs `do_sample=True`: the processor does both.
    The bounds are those of a model and a domain: `fit_zone` finds them, values of GPT-2 say nothing of a model that
    reasons at 0.3 nats.

    As in the authors' later manuscript: nothing is done where the entropy is low. Their first text had a lower bound
    too, and their public code has no decoding loop to compare with.

    Args:
        mean: nats, of the token entropy on human text; `fit_zone` gives it
        deviation: nats, at least 0; likewise
        prompt_length: tokens that `generate` is given, padding included: `input_ids.shape[1]`
        width: deviations above the mean; the paper's value
        guard: first tokens of the response that are always greedy; the paper's value
        draw: what is sampled from; the paper has both
        top_k: words, at least 1; the paper's value
        typical_p: in (0, 1); the paper's value
        strength: in [0, 1]: the sample is drawn from strength (the above) + (1 - strength) (plain sampling); ours
    """

    mean: float
    deviation: float
    prompt_length: int
    width: float = 0.5
    guard: int = 5
    draw: Literal["typical", "top_k"] = "typical"
    top_k: int = 30
    typical_p: float = 0.2
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "width"):
            if not math.isfinite(vars(self)[name]):
                raise ValueError(f"{name} must be finite, got {vars(self)[name]}")
        if not (0 <= self.deviation < math.inf):
            raise ValueError(f"deviation must be at least 0 and finite, got {self.deviation}")
        if self.prompt_length < 1 or self.guard < 0 or self.top_k < 1:
            raise ValueError(
                "prompt_length and top_k must be at least 1 and guard at least 0, got "
                f"{self.prompt_length}, {self.top_k} and {self.guard}"
            )
        if self.draw not in ("typical", "top_k"):
            raise ValueError(f"draw must be 'typical' or 'top_k', got {self.draw!r}")
        if not 0 < self.typical_p < 1:
            raise ValueError(f"typical_p must be in (0, 1), got {self.typical_p}")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        if self.strength == 0:
            return scores
        top = scores.argmax(dim=-1, keepdim=True)
        greedy = torch.full_like(scores, -torch.inf).scatter(1, top, scores.gather(1, top))
        chosen = greedy
        if input_ids.shape[1] - self.prompt_length + 1 > self.guard:
            is_open = entropy_of(scores) > self.mean + self.width * self.deviation
            chosen = torch.where(is_open.unsqueeze(1), self.drawn_from(input_ids, scores), greedy)
        if self.strength == 1:
            return chosen
        both = torch.stack(
            [
                chosen.float().log_softmax(dim=-1) + math.log(self.strength),
                scores.float().log_softmax(dim=-1) + math.log1p(-self.strength),
            ]
        )
        return both.logsumexp(dim=0).to(scores.dtype)

    def drawn_from(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores (n, V), after the tokens (n, T), with all words but the top or the typical ones at -inf."""
        if self.draw == "top_k":
            return TopKLogitsWarper(self.top_k)(input_ids, scores)  # pyright: ignore[reportArgumentType]
        return TypicalLogitsWarper(self.typical_p)(input_ids, scores)  # pyright: ignore[reportArgumentType]


def smoothed(entropies: Entropies, mask: Mask, window: int) -> Entropies:
    """Of each token the mean over the last `window` tokens that count, itself included; fewer at the start.

    Refuses a window below 1 token.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    sums = torch.where(mask, entropies, 0).double().cumsum(dim=1)
    counts = mask.long().cumsum(dim=1)
    pad = torch.nn.functional.pad
    sums = sums - pad(sums, (window, 0))[:, : sums.shape[1]]
    counts = counts - pad(counts, (window, 0))[:, : counts.shape[1]]
    return (sums / counts.clamp(min=1)).to(entropies.dtype)


def fit_zone(entropies: Entropies, mask: Mask, window: int = 5) -> tuple[float, float]:
    """(mean, deviation) in nats of the smoothed token entropy on text that people wrote, scored by the model.

    Refuses texts without a token that counts.
    """
    if not mask.any():
        raise ValueError("fit_zone needs at least one token that counts, got none")
    values = smoothed(entropies, mask, window)[mask].double()
    return values.mean().item(), values.std(unbiased=False).item()


def violations(
    entropies: Entropies, mask: Mask, mean: float, deviation: float, width: float = 1.5, window: int = 5
) -> dict[str, float]:
    """Shares of the smoothed token entropies outside mean +- width deviations: `below`, `above` and `outside`.

    The paper's ELVR (it goes with repetition), EUVR (with incoherence) and EVR; its zone is 1.5 deviations. Refuses
    rows without a token that counts.
    """
    if not mask.any():
        raise ValueError("violations needs at least one token that counts, got none")
    values = smoothed(entropies, mask, window)[mask]
    below = (values < mean - width * deviation).float().mean().item()
    above = (values > mean + width * deviation).float().mean().item()
    return {"below": below, "above": above, "outside": below + above}
