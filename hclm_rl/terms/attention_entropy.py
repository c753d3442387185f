"""Attention entropy, logged and regularised: Zhai et al., 2023, arXiv:2303.06296

The regulariser is that of Jha and Reagen, 2025, arXiv:2501.03489.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.functional import ratio
from ..types import Effect, Term, TokenBatch, Total


@dataclass(frozen=True, kw_only=True)
class AttentionEntropy(Term):
    """Says how spread out the attention is; with a coefficient, keeps every head near a share of the largest entropy.

    E_ht = -sum_j a_j log a_j of head h over the keys of the query that predicted token t, L = log of their number.
    Adds coef times the mean over heads of d^2 where |d| > margin L and 0 elsewhere, d = E_ht - target L: the whole
    square, so it jumps at the margin. A token whose query saw one key counts nothing. At coef 0, the default, it only
    logs: `spread`, the mean of E / L, and `lowest`, the 1st percentile over heads of each head's mean. Healthy models
    have sinks, so heads near 0: look at the change of `lowest`, half within 50 steps being an alarm, not at its level.
    It is not the entropy of the policy, and has no fixed relation to it. Needs attn_implementation: eager, which keeps
    B x heads x width x width numbers a layer.

    Args:
        target: share of L, in [0, 1]; the authors learn one a head
        margin: share of L, >= 0; the authors' value
        relative_to: L: "context", the authors', takes the batch's padded width

    Attributes:
        default_coef: the authors' 1e-5 is on a sum over batch and positions, and not for RL

    Metrics:
        spread (share): mean over heads and tokens of the attention's entropy over the largest that it can have
        lowest (share): 1st percentile over heads of each head's mean share; models have sinks, so look at its change.
            Healthy: above half of what it was 50 steps before. Else: attention collapses; lower the learning rate, or
            give a coef
    """

    needs_attention: ClassVar[bool] = True
    default_coef: ClassVar[float] = 0.0

    target: float = 0.5
    margin: float = 0.2
    relative_to: Literal["visible", "context"] = "visible"

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must be in [0, 1], got {self.target}")
        if not self.margin >= 0:
            raise ValueError(f"margin must be >= 0, got {self.margin}")

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        attention = batch.attention()
        visible = attention.visible
        keys = visible if self.relative_to == "visible" else torch.full_like(visible, attention.width)
        counts = (batch.mask & (keys > 1).all(dim=1)).unsqueeze(1)
        largest = torch.where(counts, keys.to(attention.entropy.dtype).log(), 1.0)
        entropy = torch.where(counts, attention.entropy, 0.0)
        deviation = torch.where(counts, entropy - self.target * largest, 0.0)
        penalty = torch.where(deviation.abs() > self.margin * largest, deviation.square(), 0.0)
        share = (entropy / largest).detach()
        heads = tuple(share.sum(dim=(0, 2)).unbind())
        count = counts.sum().float()
        return Effect(
            loss=penalty.mean(dim=1),
            metrics={
                "spread": Total(sums=(share.mean(dim=1).sum(), count), form=ratio),
                "lowest": Total(sums=(*heads, count), form=first_percentile),
            },
        )


def first_percentile(*sums: float) -> float:
    """The 1st percentile over heads of their means; `sums` are those of the heads and, last, the number of tokens."""
    *heads, count = sums
    return torch.tensor(heads).quantile(0.01).item() / count if count else 0.0
