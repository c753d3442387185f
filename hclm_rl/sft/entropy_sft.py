"""Entropy-SFT of Light-IF: Wang et al., 2025, arXiv:2508.03178"""

import math
from dataclasses import dataclass

import torch

from ..equations.selections import largest
from .method import Losses, SftBatch, SftMethod

ROUNDING = 1e-9  # 0.29 * 100 is 28.999... in floating point, and means 29


@dataclass(frozen=True, kw_only=True)
class EntropySft(SftMethod):
    """Trains only on labels that are badly predicted and not merely uncertain, which leaves entropy where it is.

    delta_t = -log p_t - coef H_t; the floor(ratio N) labels with the largest delta are kept, N those of the
    micro-batch; the loss is their sum of -log p over floor(ratio N), N those of the optimiser step. delta only selects,
    without gradient. Confidently wrong labels are kept; known ones, and those whose loss is explained by real
    uncertainty, are left out. The labels of a micro-batch are pooled, as in the authors' code, so one hard text can
    take most of them.

    Args:
        ratio: of the labels, in (0, 1]; as the authors ran it (their argument's default is 0.2)
        coef: at least 0; as the authors ran it (their argument's default is 1)
    """

    ratio: float = 0.8
    coef: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], got {self.ratio}")
        if not (0 <= self.coef < math.inf):
            raise ValueError(f"coef must be at least 0 and finite, got {self.coef}")

    def kept(self, labels: int | float) -> int:
        """How many of so many labels are trained: at least one."""
        return max(1, math.floor(self.ratio * labels + ROUNDING))

    def __call__(self, batch: SftBatch) -> Losses:
        delta = -batch.logps - self.coef * batch.entropy
        is_kept = largest(delta, batch.mask, self.kept(int(batch.mask.sum())))
        # the trainer divides by the labels of the step, the method by those it keeps of them
        scale = batch.tokens / self.kept(batch.tokens)
        kept = is_kept.sum().clamp(min=1)
        entropy = torch.where(is_kept, batch.entropy.detach(), 0.0).sum() / kept
        return Losses(
            losses=torch.where(is_kept, -batch.logps * scale, 0.0),
            metrics={"kept": is_kept.sum() / batch.mask.sum().clamp(min=1), "kept_entropy": entropy},
        )
