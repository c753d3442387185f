"""MixCE, mixed forward and reverse cross-entropy: Zhang et al., 2023, arXiv:2305.16958"""

from dataclasses import dataclass

import torch

from .method import Losses, SftBatch, SftMethod


@dataclass(frozen=True, kw_only=True)
class MixCe(SftMethod):
    """Trusts the model's own judgement of the data: surprising labels weigh less.

    loss_t = -w_t log p_t,  w_t = eta + (1 - eta) p_t, p_t without gradient. With its gradient the second part would
    push labels with -log p > 1 down. It sharpens: as the start of RL take eta of a half or more, or use it as the
    contrast to methods that keep entropy. The weights are not normalised, so the steps shrink with eta.

    Args:
        eta: in [0, 1]; 1 is plain SFT, 0 weighs each label by its probability; 0.5 in the authors' scripts
    """

    eta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def __call__(self, batch: SftBatch) -> Losses:
        weights = self.eta + (1 - self.eta) * batch.logps.detach().exp()
        weights = torch.where(batch.mask, weights, 0.0)
        return Losses(losses=-weights * batch.logps, metrics={"weight": weights.sum() / batch.mask.sum().clamp(min=1)})
