"""EM-FT, fine-tuning by entropy minimisation: Agarwal et al., 2025, arXiv:2505.15134"""

from dataclasses import dataclass
from typing import Literal

import torch

from .method import Losses, SftBatch, SftMethod


@dataclass(frozen=True, kw_only=True)
class EmFt(SftMethod):
    """Lowers the entropy of the model's own responses to the prompts; the data's completions are not looked at.

    loss = mean over the responses of sum_t H_t, H_t in nats at temperature 1, with gradient through H and none through
    the sampling. "mean" divides each response's sum by its tokens. Collapse is the goal, so stopping early (the paper:
    about 40 optimiser steps) is part of the method, and it is the opposite of what keeps a start explorable. Its
    gradient vanishes both at certainty and at a uniform distribution. It fails where the model's prior is poor.

    Args:
        responses: to each prompt, at least 1; the paper's value
        longest: tokens of a response, at least 1; ours
        reduction: "sum" over the response's tokens as printed in the paper, "mean" of them
    """

    responses: int = 1
    longest: int = 512
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.responses < 1 or self.longest < 1:
            raise ValueError(f"responses and longest must be at least 1, got {self.responses} and {self.longest}")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")

    def __call__(self, batch: SftBatch) -> Losses:
        lengths = batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        weights = batch.entropy / lengths if self.reduction == "mean" else batch.entropy
        # the trainer divides by labels, the method by the responses of a micro-batch: all have as many
        return Losses(
            losses=torch.where(batch.mask, weights, 0.0) * (batch.tokens_here / len(batch.mask)),
            metrics={"length": lengths.float().mean()},
        )
