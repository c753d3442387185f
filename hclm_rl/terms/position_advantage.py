"""Position-based advantage shaping: Deng et al., 2025, arXiv:2508.02260"""

from dataclasses import dataclass

import torch

from ..types import Effect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class PositionAdvantage(Term):
    """Trains late tokens harder: A_t <- A_t + sign(A_t) b_t,  b_t = min(gamma sigmoid(k (rel_t - 1/2)), cap |A_t|).

    rel_t = (t - 1) / |o| for the t-th of the |o| response tokens, tokens that a tool wrote not among them. It is not
    zero-mean in the group: where failures prevail, or are cut off at the length limit, their late tokens push down more
    than before. Under a token-mean loss it grows with the length of the response. Beside `perplexity_advantage` it
    comes second.

    Args:
        gamma: in units of the advantage, >= 0; the authors' script
        k: steepness, > 0; the paper's value
        cap: the largest change, as a share of |A_t|, >= 0; the authors' code
        start_step: first step that it acts on, >= 0; the authors' code acts while 200 < step < 300, in its count
        end_step: first step that it no longer acts on; None: until the end
    """

    gamma: float = 0.1
    k: float = 15.0
    cap: float = 0.5
    start_step: int = 0
    end_step: int | None = None

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be >= 0, got {self.gamma}")
        if not self.k > 0:
            raise ValueError(f"k must be positive, got {self.k}")
        if not self.cap >= 0:
            raise ValueError(f"cap must be >= 0, got {self.cap}")
        if self.start_step < 0 or (self.end_step is not None and self.end_step <= self.start_step):
            raise ValueError(f"the steps must be 0 <= start_step < end_step, got {self.start_step} and {self.end_step}")

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if batch.step < self.start_step or (self.end_step is not None and batch.step >= self.end_step):
            return Effect()
        advantages = torch.where(batch.mask, batch.advantages, 0.0)
        length = batch.mask.sum(dim=1, keepdim=True).clamp(min=1)
        rel = (batch.mask.cumsum(dim=1) - 1).to(advantages.dtype) / length
        bonus = torch.minimum(self.gamma * torch.sigmoid(self.k * (rel - 0.5)), self.cap * advantages.abs())
        return Effect(advantages=advantages + advantages.sign() * bonus)
