"""Log-det of the covariance of the hidden states: HCLM, Tran, 2026, arXiv:2605.22940"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..equations.geometry import (
    Factor,
    Moments,
    at_least_float32,
    covariance,
    factor,
    floor_from,
    has_spread,
    moments_of_step,
)
from ..equations.rows import injected
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class LogDet(Term):
    """Keeps the representation spread out: adds -coef * H, H = 0.5 logdet(S + eps I) in nats, to the loss.

    S is the covariance of the last hidden states (after the final norm, those that predicted the response tokens) over
    the whole generation batch and all processes. Its force F_i = A (z_i - mu) / N, A = (S + eps I)^-1, is injected as
    -coef * <F_i, z_i> with F_i detached, which has the gradient of -coef * H. The force rescues a direction only down
    to the variance eps; an exactly dead one gets none. Several updates per rollout reuse mu and A of the sampling
    policy. coef is in nats per nat: the sum over all D directions, not their mean.

    Args:
        eps_relative: eps = eps_relative * tr(S) / D, measured at the first step and frozen; > 0; ours
        removes_radial: take out the part of the force that only makes all states longer

    Attributes:
        default_coef: ours, none is published: 0.01 destroyed the testbed's policy (docs/log.md)

    Metrics:
        value (nats): H of the step. Healthy: does not fall for long. Else: the states compress; compare `critical_coef`
            of information_force with the coef
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    default_coef: ClassVar[float] = 1e-4

    eps_relative: float = 1e-4
    removes_radial: bool = False

    def __post_init__(self) -> None:
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")

    def sampled_moments(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (at_least_float32,)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        step = step_factor(moments_of_step(rollout), self.eps_relative, memory)
        if step is None:
            return RolloutEffect()
        spread, whole = step
        s = covariance(spread)
        trace = s.trace()
        dof = whole.dof(s) if self.removes_radial else torch.zeros_like(trace)
        return RolloutEffect(
            shared={
                "cholesky": whole.cholesky,
                "mean": whole.mean,
                "count": whole.count,
                "radial": dof / trace,
            },
            metrics={"value": whole.log_det()},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "cholesky" not in batch.shared:  # the step had no spread to speak of
            return Effect()
        whole = Factor(batch.shared["cholesky"], batch.shared["mean"], batch.shared["count"], memory["eps"])

        def force(rows: Tensor, _: slice) -> Tensor:  # the trainer's mean over the step is the 1 / N of F
            of_rows = whole.force(rows).mul_(whole.count)
            return of_rows - batch.shared["radial"] * (rows - whole.mean) if self.removes_radial else of_rows

        return Effect(loss=-injected(batch.hidden(), batch.mask, force))


def step_factor(spread: Moments, eps_relative: float, memory: dict) -> tuple[Moments, Factor] | None:
    """The factored covariance of the step, with eps frozen in `memory` at the first step that has any spread."""
    if not has_spread(spread):
        return None
    if "eps" not in memory:
        memory["eps"] = float(floor_from(spread, eps_relative))
    return spread, factor(spread, memory["eps"])
