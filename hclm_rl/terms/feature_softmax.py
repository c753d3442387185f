"""Softmax entropy over hidden features: the baseline of HCLM, Tran, 2026, arXiv:2605.22940"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..equations.functional import spread_out
from ..equations.rows import injected
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
        values: list[Tensor] = []

        def force(rows: Tensor, _: slice) -> Tensor:
            values.append(feature_softmax(rows))
            return feature_softmax_force(rows, 1)  # 1: the trainer divides by N

        gain = injected(batch.hidden(), batch.mask, force, is_worth_nothing=True)
        value = spread_out(torch.cat([*values, gain.new_zeros(0)]), batch.mask)
        return Effect(loss=-(value + gain), metrics={"value": value})
