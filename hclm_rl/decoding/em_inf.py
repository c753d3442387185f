"""EM-INF, entropy minimisation at inference: Agarwal et al., 2025, arXiv:2505.15134"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's usual ones; the authors' code


@dataclass(frozen=True, kw_only=True)
class EmInf(LogitsProcessor):
    """Sharpens the logits of uncertain tokens by a few steps of Adam on their own entropy; the network is untouched.

    L = H(z) + kl_weight KL(softmax(z_0) || softmax(z)), z from z_0. A row stops as soon as H(z) < threshold, each for
    itself: the released code sums over the batch, so that there a response depends on its batch mates. The optimiser
    starts anew with every token. Words at -inf stay there. `steps` 0 is plain sampling.

    The top word stays the top, so this acts where tokens are sampled, not in greedy decoding. Adam's first steps move
    every logit by about the learning rate, so the order among the others may change. It fails where the model's prior
    is poor. The cost is `steps` softmaxes over the vocabulary a token, no pass of the network.

    Args:
        steps: at most, at least 0; the paper 5 to 15, the code 5, its evaluation script 3
        threshold: nats; tokens below it are left alone; the code's value, the paper: 0.1 to 0.5
        kl_weight: at least 0; the code's default, its evaluation script has 0.05
        learning_rate: of Adam, in logits, more than 0; the code's value
    """

    steps: int = 5
    threshold: float = 0.3
    kl_weight: float = 0.001
    learning_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        for name in ("threshold", "kl_weight"):
            if not (0 <= vars(self)[name] < math.inf):
                raise ValueError(f"{name} must be at least 0 and finite, got {vars(self)[name]}")
        if not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate must be more than 0 and finite, got {self.learning_rate}")

    def __call__(self, input_ids: Int[Tensor, "N L"], scores: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        z = scores.float()
        start = z.softmax(dim=-1)
        first, second = torch.zeros_like(z), torch.zeros_like(z)
        is_on = torch.ones_like(z[:, :1], dtype=torch.bool)
        for step in range(1, self.steps + 1):
            logps = z.log_softmax(dim=-1)
            p = logps.exp()
            terms = torch.where(p > 0, p * logps, 0)  # 0 log 0 = 0
            entropy = -terms.sum(dim=-1, keepdim=True)
            is_on = is_on & (entropy >= self.threshold)
            if not is_on.any():
                break
            # dH/dz = -p (log p + H),  dKL/dz = p - p_0
            slope = -(terms + p * entropy) + self.kl_weight * (p - start)
            first, second = BETA1 * first + (1 - BETA1) * slope, BETA2 * second + (1 - BETA2) * slope.square()
            size = (second / (1 - BETA2**step)).sqrt() + EPSILON
            z = torch.where(is_on, z - self.learning_rate * first / (1 - BETA1**step) / size, z)
        return z.to(scores.dtype)
