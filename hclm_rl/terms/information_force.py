"""Information force of the log-det surrogate, as a gauge: HCLM, Tran, 2026, arXiv:2605.22940"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..equations.forces import StepForce, Surrogate, step_force
from ..equations.functional import ratio, spread_out
from ..equations.geometry import Moments, influence
from ..equations.rows import pieces
from ..equations.spectra import certified_force, relative_drift, spectrum
from ..types import Effect, Metric, Quantiles, Rollout, RolloutEffect, Term, TokenBatch, Total


@dataclass(frozen=True, kw_only=True)
class InformationForce(Term):
    """Changes nothing; says whether a surrogate's force is alive and which tokens' updates burn it.

    With F = dH/dZ for a surrogate H, by default 0.5 logdet(S + eps I), over the whole step, and g_i the gradient of the
    step's loss L at the hidden state of token i (through the output head, so without a surrogate's own injected force).
    What is logged stands below `Metrics:`. What is said "at the states" makes no claim about the step: the optimiser
    does not move the states (`hclm-rl doctor` speaks of the step). `critical_coef_at_states` = <F, g> / ||F||^2 over
    the step's tokens, times the step's share of the generation batch, over which F is a mean.

    Args:
        surrogate: which entropy of the hidden states (forces.py)
        eps_relative: eps = eps_relative * tr(S) / D, measured at the first step and frozen; > 0; ours
        spectrum_every: optimiser steps between two eigenvalue decompositions, >= 1; ours

    Metrics:
        value (nats): the surrogate H of the step
        force_norm (nats a state): ||F||, F = dH/dZ over the step
        rho (share): ||F|| of its bound, in [0, 1]: small both where the variances are far below and far above the one
            at which the force is greatest
        force/q* (nats a state): quantiles of ||F_i|| over the tokens
        dof (directions): of the log-det: sum of the leverages over the tokens, how many directions the states use
        leverage/q* (leverage): of the log-det: quantiles of l_i over their mean
        live (share): of the directions in which the force is alive, every `spectrum_every` steps
        dead (share): of the directions whose variance is far below where the force peaks
        weak (share): of the directions whose variance is over 100 times that where the force peaks: there it is under a
            fifth of its peak
        drift (share): of the log-det: how far the covariance has moved since the first step, in shares of its variances
            there; the batch's own noise is in it
        certified (share): of the first step's ||F||, what that drift leaves for certain
        alignment_at_states (cosine): -<F, g> / (||F|| ||g||), of the force and the loss at the hidden states
        critical_coef_at_states (coefficient): at which F and g - c F are at right angles there
        gradient_norm (loss a state): ||g||, of the step's loss at the hidden states
        influence/q* (nats): quantiles of N <F_i, -g_i> over the tokens
        burning (share): of the tokens with a negative influence: for ranking tokens
    """

    needs_scores: ClassVar[bool] = True
    needs_hidden: ClassVar[bool] = True
    is_diagnostic: ClassVar[bool] = True

    surrogate: Surrogate = "log_det"
    eps_relative: float = 1e-4
    spectrum_every: int = 50

    def __post_init__(self) -> None:
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")
        if self.spectrum_every < 1:
            raise ValueError(f"spectrum_every must be at least 1, got {self.spectrum_every}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        rows = rollout.states()
        whole = step_force(self.surrogate, rows, rollout.total, memory, self.eps_relative)
        if whole is None:
            return RolloutEffect()
        m, mask, strengths = whole.moments, rollout.mask, whole.over(rows)
        power, bounded = rollout.total(torch.stack([strengths.power, strengths.bounded]))
        bound = whole.bound()
        metrics: dict[str, Metric] = {
            "value": whole.value(),
            "force_norm": power.sqrt(),
            "rho": bounded.sqrt() / bound if bound > 0 else torch.zeros_like(power),
            "force": Quantiles(values=spread_out(strengths.norms, mask)),
        }
        shared = {"count": m.count, "mean": m.mean, "scatter": m.scatter}
        made = {"cholesky": whole.lower, "push": whole.push}  # once, for all micro-batches
        shared |= {name: matrix for name, matrix in made.items() if matrix is not None}
        if strengths.leverages is not None:
            mean_leverage = rollout.total(strengths.leverages.sum()) / m.count
            metrics["dof"] = mean_leverage
            metrics["leverage"] = Quantiles(values=spread_out(strengths.leverages / mean_leverage, mask))
        # one that is further off was planned by a run with another step, or by another spectrum_every
        if not rollout.step < memory.get("next_spectrum", 0) <= rollout.step + self.spectrum_every:
            memory["next_spectrum"] = rollout.step + self.spectrum_every
            metrics |= self.of_spectrum(whole, power, memory)
        return RolloutEffect(shared=shared, metrics=metrics)

    def of_spectrum(self, whole: StepForce, power: Tensor, memory: dict) -> dict[str, Metric]:
        """What needs eigenvalues. `power` is a scalar, ()."""
        if self.surrogate == "feature_softmax":  # row by row: no direction is dead to it, or alive
            return {}
        eigenvalues, peak = directions = whole.directions()
        metrics: dict[str, Metric] = {
            "live": power.new_tensor(whole.live(directions)),
            "dead": (eigenvalues < peak).to(power).mean(),
        }
        if self.surrogate in ("log_det", "diagonal", "coding_rate"):
            metrics["weak"] = (eigenvalues > 100 * peak).to(power).mean()
        if whole.lower is not None:
            metrics |= drift_metrics(whole, memory)
        return metrics

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "mean" not in batch.shared:
            return Effect()
        whole = self.kept(batch.shared, memory["eps"])
        count, mask, states = whole.moments.count, batch.mask, batch.hidden().detach()  # it keeps no graph alive

        def on_hidden_gradient(gradient: Tensor) -> Mapping[str, Metric]:
            dot, f2, g2 = sums = gradient.new_zeros(3, dtype=count.dtype)
            row, token = mask.nonzero(as_tuple=True)
            gains = count.new_zeros(len(row))
            for piece in pieces(len(row), states.size(2)):
                place = row[piece], token[piece]
                force = whole.force(states[place])
                own = gradient[place].to(force)
                gains[piece] = influence(force, -own)
                sums += torch.stack([gains[piece].sum(), force.square().sum(), own.square().sum()])
            per_token = spread_out(gains * count, mask)
            return {
                "alignment_at_states": Total(sums=(dot, f2, g2), form=cosine),
                "critical_coef_at_states": Total(sums=(-batch.share * dot, f2), form=ratio),
                "gradient_norm": Total(sums=(g2,), form=math.sqrt),
                "influence": Quantiles(values=per_token),
                "burning": (per_token < 0).float(),
            }

        return Effect(on_hidden_gradient=on_hidden_gradient)

    def kept(self, shared: Mapping[str, Tensor], eps: float) -> StepForce:
        """The surrogate of the step, from what stage 1 attached: (), (D,) and (D, D)."""
        moments = Moments(shared["count"], shared["mean"], shared["scatter"])
        return StepForce(self.surrogate, moments, eps, lower=shared.get("cholesky"), push=shared.get("push"))


def drift_metrics(whole: StepForce, memory: dict) -> dict[str, Metric]:
    """Against the first step, whose factor (D x D) and spectrum stay in the memory."""
    assert whole.lower is not None
    if "first_factor" not in memory:
        memory["first_factor"], memory["first_spectrum"] = whole.lower, spectrum(whole.moments)
    drift = relative_drift(whole.moments, memory["first_factor"], whole.eps)
    share = certified_force(memory["first_spectrum"], whole.eps, drift)
    of = whole.moments.mean
    return {"drift": of.new_tensor(drift.delta), "certified": of.new_tensor(share)}


def cosine(dot: float, left: float, right: float) -> float:
    """<F, -g> / (||F|| ||g||) from the sums; 0 where either vanishes."""
    return dot / math.sqrt(left * right) if left * right > 0 else 0.0
