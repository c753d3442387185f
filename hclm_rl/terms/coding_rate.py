"""Coding rate of the responses: MCR2, Yu et al., 2020, arXiv:2006.08558"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..equations.geometry import Factor, at_least_float32, means_of_step, moments_everywhere, moments_of_step
from ..equations.rows import injected, mean_of_responses
from ..equations.surrogates import (
    coding_rate_factor,
    coding_rate_of,
    coding_rate_within,
    through_unit_rows,
    unit_rows,
)
from ..types import Effect, Metric, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class CodingRate(Term):
    """Spreads the responses over directions: adds -coef * R, R = 0.5 logdet(I + D/e2 C) in nats, to the loss.

    C = U^T U / n, u_i = h_i / ||h_i||, over the whole generation batch and all processes. h_i is the mean over a
    response's tokens of the last hidden states (after the final norm, those that predicted the tokens), or each of
    these states. The force u_i (C + e2/D I)^-1 / n, without its part along u_i and divided by ||h_i||, is injected
    detached. Directions only: longer states win nothing. UNCENTRED: a common mean hides a collapse. Of the paper's
    R - R_c only R is raised; R_c with prompts as classes is logged as `within`: falling while R stays, it says that
    the responses to a prompt grow alike. It is bound by the number of responses per prompt. Several updates per
    rollout reuse C of the sampling policy.

    Args:
        rows: what is spread; ours, the paper has one vector per image
        distortion: e2, the SQUARE of the paper's epsilon, > 0; the `eps` of the authors' code is e2 too

    Attributes:
        default_coef: None is published for RL. Ours: at the testbed's start ||F|| at the token states is 0.064 (0.033
            with rows="tokens"), so that coef * ||F|| is about that of log_det at 1e-4 (||F|| = 1.22).

    Metrics:
        value (nats): the coding rate R of the step
        within (nats): R_c, the mean rate within the prompts. Healthy: falls no faster than `value`. Else: the responses
            to a prompt grow alike; look at pass@k
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    default_coef: ClassVar[float] = 2e-3

    rows: Literal["responses", "tokens"] = "responses"
    distortion: float = 0.5

    def __post_init__(self) -> None:
        if not self.distortion > 0:
            raise ValueError(f"distortion must be positive, got {self.distortion}")

    def sampled_moments(self) -> tuple[Callable[..., Tensor], ...]:
        return (unit_rows,) if self.rows == "tokens" else (mean_of_responses,)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        counts = rollout.mask.any(dim=1)
        h = means_of_step(rollout).to(at_least_float32(rollout.scored()[0])) if self.rows == "responses" else None
        if h is None:
            m = moments_of_step(rollout, unit_rows)
        else:
            m = moments_everywhere(h, rollout.total, counts, each=unit_rows)
        if m.count < 1:
            return RolloutEffect()
        lower = coding_rate_factor(m, self.distortion)
        metrics: dict[str, Metric] = {"value": coding_rate_of(lower, self.distortion)}
        if h is not None:
            kept = rollout.everywhere(counts)
            classes = rollout.everywhere(rollout.group)[kept]
            metrics["within"] = coding_rate_within(rollout.everywhere(unit_rows(h))[kept], classes, self.distortion)
        shared = {
            "cholesky": lower,
            "count": m.count,
            "tokens": rollout.total(rollout.mask.sum()),
            "value": metrics["value"],
        }
        return RolloutEffect(shared=shared, metrics=metrics)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "cholesky" not in batch.shared:  # the step had no token
            return Effect()
        lower, mask = batch.shared["cholesky"], batch.mask
        whole = Factor(lower, torch.zeros_like(lower[0]), batch.shared["count"], self.distortion / len(lower))

        def through(h: Tensor) -> Tensor:
            return through_unit_rows(whole.force(unit_rows(h)), h)

        states, force = batch.hidden(), lambda rows, _: through(rows)
        if self.rows == "responses":  # h_i is a mean: each of its T_i tokens gets F_i / T_i
            row, lengths = mask.nonzero()[:, 0], mask.sum(dim=1)
            of_response = through(mean_of_responses(states.detach()[mask], mask)) / lengths.clamp(min=1).unsqueeze(1)
            force = lambda _, piece: of_response[row[piece]]  # noqa: E731 (one of two ways to make it)
        gain = injected(states, mask, force, is_worth_nothing=True)
        # the trainer divides by the tokens of the step, the value and the sum of the gains do not
        return Effect(loss=torch.where(mask, -(batch.shared["value"] + batch.shared["tokens"] * gain), 0.0))
