"""Softmax entropy over hidden features: the baseline of HCLM, Tran, 2026, arXiv:2605.22940"""

from dataclasses import dataclass
from typing import ClassVar

from ..equations.geometry import at_least_float32
from ..equations.surrogates import feature_softmax, feature_softmax_force
from ..types import Effect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class FeatureSoftmax(Term):
    """Flattens each hidden state by itself: adds -coef * H_i, H_i = -sum_j p_ij log p_ij in nats, to token i's loss.

    p_i = softmax(z_i) over the D FEATURES of the last hidden state (after the final norm, the one that predicted token
    i), not over the vocabulary. It acts row by row, so it is blind to a collapse: with all states equal it reports the
    same H and force. The force p_i (log p_i + H_i) vanishes both for a flat and for a peaked p. The paper's baseline,
    here to be compared with. No statistic of the step: each update takes the current states.

    Attributes:
        default_coef: None is published. Ours: at the testbed's start ||F|| is 0.0105, so that coef * ||F|| is about
            that of log_det at 1e-4 (||F|| = 1.22).

    Metrics:
        value (nats): mean entropy of the softmax over the features of a state; blind to a collapse of the states
    """

    needs_hidden: ClassVar[bool] = True
    default_coef: ClassVar[float] = 1e-2

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        rows = at_least_float32(batch.hidden()[batch.mask])
        value, force = feature_softmax(rows), feature_softmax_force(rows, 1)  # 1: the trainer divides by N
        injected = -(value + (force * (rows - rows.detach())).sum(dim=-1))
        blank = injected.new_zeros(batch.mask.shape)
        return Effect(
            loss=blank.masked_scatter(batch.mask, injected),
            metrics={"value": blank.masked_scatter(batch.mask, value)},
        )
