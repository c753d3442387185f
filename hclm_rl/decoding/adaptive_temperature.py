"""Adaptive temperature, the baseline of EM-INF: Agarwal et al., 2025, arXiv:2505.15134"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from ..equations.temperature import HOTTEST, entropy_of, temperature_at_entropy

COLDEST = 0.01  # the authors' code


@dataclass(frozen=True, kw_only=True)
class AdaptiveTemperature(LogitsProcessor):
    """Cools each token until a share of its entropy is left, and no uncertain one below a floor.

    The largest tau in [0.01, 1] with H(z / tau) <= max(share H(z), floor), by bisection; the sample is drawn from
    softmax(z / tau). `share` 1 is plain sampling.

    Args:
        share: of the token's entropy that is kept, in (0, 1]; the paper: 0.4 to 0.6
        floor: nats, at least 0: tokens below it are left alone; the paper: 0.1 to 0.5
    """

    share: float = 0.5
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        entropy = entropy_of(scores)
        target = (self.share * entropy).clamp(min=min(self.floor, HOTTEST))
        tau = torch.where(entropy <= target, 1.0, temperature_at_entropy(scores, target, COLDEST, 1.0, steps=30))
        return (scores.float() / tau.unsqueeze(1)).to(scores.dtype)
