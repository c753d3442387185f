"""Variance of the hidden states: HCLM, Tran, 2026, arXiv:2605.22940"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..equations.geometry import Moments, at_least_float32, floor_from, has_spread, moments_of_step
from ..equations.rows import injected
from ..equations.surrogates import diagonal, diagonal_force, variance, variance_force
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Variance(Term):
    """Pushes the hidden states away from their mean: adds -coef * H, H = tr(S), to the loss.

    S is the covariance of the last hidden states (after the final norm, those that predicted the response tokens) over
    the whole generation batch and all processes. The force 2 (z_i - mu) / N is injected as in `log_det`. It shrinks
    with the direction, so a dying one is not helped: this is the surrogate to compare `log_det` with. It points along
    z - mu, so longer states win too. `form="diagonal"`: H = 0.5 sum_j log(S_jj + eps) in nats, the log-det without
    correlations, force (z_i - mu) / (diag S + eps) / N. Several updates per rollout reuse mu and S of the sampling
    policy.

    Args:
        form: the paper's name is all we have; both forms are our reading of it
        eps_relative: "diagonal": eps = eps_relative * tr(S) / D, measured at the first step, frozen; > 0

    Attributes:
        default_coef: None is published. Ours: at the testbed's start ||F|| is 0.65, so that coef * ||F|| is about that
            of log_det at 1e-4 (||F|| = 1.22); it falls with the square of the states' scale, and form="diagonal" needs
            about 1e-3 for it.

    Metrics:
        value (squared state): H of the step: tr(S); for form "diagonal" in nats. Healthy: does not fall for long
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    default_coef: ClassVar[float] = 2e-4

    form: Literal["trace", "diagonal"] = "trace"
    eps_relative: float = 1e-4

    def __post_init__(self) -> None:
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")

    def sampled_moments(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (at_least_float32,)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        m = moments_of_step(rollout)
        if not has_spread(m):
            return RolloutEffect()
        if self.form == "diagonal" and "eps" not in memory:
            memory["eps"] = float(floor_from(m, self.eps_relative))
        value = variance(m) if self.form == "trace" else diagonal(m, memory["eps"])
        return RolloutEffect(
            shared={"count": m.count, "mean": m.mean, "scatter": m.scatter},
            metrics={"value": value},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "scatter" not in batch.shared:  # the step had no spread to speak of
            return Effect()
        m = Moments(batch.shared["count"], batch.shared["mean"], batch.shared["scatter"])

        def force(rows: Tensor, _: slice) -> Tensor:  # the trainer's mean over the step is the 1 / N of F
            of_rows = variance_force(rows, m) if self.form == "trace" else diagonal_force(rows, m, memory["eps"])
            return m.count * of_rows

        return Effect(loss=-injected(batch.hidden(), batch.mask, force))
