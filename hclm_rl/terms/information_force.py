"""Information force of the log-det surrogate, as a gauge: HCLM, Tran, 2026, arXiv:2605.22940"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..geometry import Factor, force_norm_per_token, influence, moments_everywhere
from ..spectra import dead_fraction, force_bound, spectrum, weak_fraction
from ..types import Effect, Metric, Quantiles, Rollout, RolloutEffect, Term, TokenBatch, Total
from .log_det import step_factor


@dataclass(frozen=True, kw_only=True)
class InformationForce(Term):
    """Changes nothing; says whether the log-det force is alive and which tokens' updates burn it.

    With F = dH/dZ for H = 0.5 logdet(S + eps I), over the whole step, and g_i the gradient of the step's loss L at the
    hidden state of token i (through the output head, so without a surrogate's own injected force):
    `force_norm` ||F||; `rho` = ||F|| / B in [0, 1], B its bound; `dof`, the number of live directions; `dead` and
    `weak`, shares of directions, every `spectrum_every` steps; `leverage`, quantiles of l_i / dof; `force`, of ||F_i||;
    `alignment` = -<F, g> / (||F|| ||g||): below 0 the loss burns entropy; `critical_coef` = <F, g> / ||F||^2: the
    coefficient of `log_det` at which H would stand still; `influence`, quantiles of N <F_i, -g_i> over tokens, and
    `burning`, the share of tokens with a negative one. First order, parameter sharing between tokens ignored.
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    is_diagnostic: ClassVar[bool] = True

    eps_relative: float = 1e-4  # eps = eps_relative * tr(S) / D, measured at the first step and frozen; > 0; ours
    spectrum_every: int = 50  # optimiser steps between two eigenvalue decompositions, >= 1; ours

    def __post_init__(self) -> None:
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")
        if self.spectrum_every < 1:
            raise ValueError(f"spectrum_every must be at least 1, got {self.spectrum_every}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        rows = rollout.hidden()[rollout.mask]
        step = step_factor(moments_everywhere(rows, rollout.total), self.eps_relative, memory)
        if step is None:
            return RolloutEffect()
        spread, whole = step
        force = whole.force(rows)
        leverage = whole.count * (force * (rows.to(force) - whole.mean)).sum(dim=-1)
        power, leverage_sum = rollout.total(torch.stack([force.square().sum(), leverage.sum()]))
        dof = leverage_sum / whole.count
        bound = force_bound(whole.count.item(), rows.size(1), memory["eps"])
        per_token = force.new_zeros(rollout.mask.shape).masked_scatter(rollout.mask, leverage / dof)
        norms = force.new_zeros(rollout.mask.shape).masked_scatter(rollout.mask, force_norm_per_token(force))
        metrics: dict[str, Metric] = {
            "value": whole.log_det(),
            "force_norm": power.sqrt(),
            "rho": power.sqrt() / bound,
            "dof": dof,
            "leverage": Quantiles(values=per_token),
            "force": Quantiles(values=norms),
        }
        if rollout.step >= memory.get("next_spectrum", 0):
            memory["next_spectrum"] = rollout.step + self.spectrum_every
            eigenvalues = spectrum(spread)
            metrics["dead"] = dead_fraction(eigenvalues, memory["eps"])
            metrics["weak"] = weak_fraction(eigenvalues, memory["eps"])
        shared = {"cholesky": whole.cholesky, "mean": whole.mean, "count": whole.count}
        return RolloutEffect(shared=shared, metrics=metrics)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "cholesky" not in batch.shared:
            return Effect()
        whole = Factor(batch.shared["cholesky"], batch.shared["mean"], batch.shared["count"], memory["eps"])
        mask, force = batch.mask, whole.force(batch.hidden()[batch.mask])  # the callback keeps no graph alive

        def on_hidden_gradient(gradient: Tensor) -> Mapping[str, Metric]:
            own = gradient[mask].to(force)
            gains = influence(force, -own)
            dot, f2, g2 = gains.sum(), force_norm_per_token(force).square().sum(), own.square().sum()
            per_token = gains.new_zeros(mask.shape).masked_scatter(mask, gains * whole.count)
            return {
                "alignment": Total(sums=(dot, f2, g2), form=cosine),
                "critical_coef": Total(sums=(-dot, f2), form=lambda top, bottom: top / bottom if bottom else 0.0),
                "influence": Quantiles(values=per_token),
                "burning": (per_token < 0).float(),
            }

        return Effect(on_hidden_gradient=on_hidden_gradient)


def cosine(dot: float, left: float, right: float) -> float:
    """<F, -g> / (||F|| ||g||) from the sums; 0 where either vanishes."""
    return dot / math.sqrt(left * right) if left * right > 0 else 0.0
