"""Force reweighting, entropy change as a constraint; derived here from: HCLM, Tran, 2026, arXiv:2605.22940"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..equations.flow import Ledger, least_weights, policy_influence, sides, uniform_weights
from ..equations.functional import in_double, per_token
from ..equations.geometry import moments_everywhere
from ..types import Direction, Effect, Metric, Rollout, RolloutEffect, Term, TokenBatch
from .log_det import step_factor


@dataclass(frozen=True, kw_only=True)
class ForceReweight(Term):
    """Holds the entropy inside a band: weights in [0, 1] on the tokens whose updates would carry it out.

    e_i is the change of entropy by token i's own update, to first order (flow.py). With gain, the nats per optimiser
    step of a mean influence of 1, learnt from the run, and H the entropy, the step's weights solve

        low' <= gain * mean_i w_i e_i <= high',   low' = (floor - H) / horizon,  high' = (ceiling - H) / horizon

    narrowed by `low` and `high`. Inside the band all weights are 1; below it burning tokens (e < 0) lose weight, above
    it raising ones (e > 0), by as little as meets the edge; where weights of 0 do not reach it, 0. Until the gain is
    known (5 generation batches) only the sign is held: net >= 0 below the floor, net <= 0 above the ceiling. The
    advantages are those that reward and advantage shapers before it leave, so put it last. Logs `predicted_change` and
    `realised_change`, in nats per optimiser step, of the steps before, `net` and the unweighted `own`, `gain`, and
    `weight`, the mean over burning tokens.

    Args:
        by: whose entropy: of the next token, or log-det of hidden states
        floor: in `unit`; ours
        ceiling: in `unit`, above floor; ours
        unit: "start": shares of the entropy at the first step; "nats": the entropy itself, for "representation" its
            change
        low: least expected change, nats per optimiser step
        high: greatest expected change, nats per optimiser step, >= low
        horizon: optimiser steps in which a distance from the band is to be made good, >= 1; ours
        weights: "least": sum (w - 1)^2 least, the strongest influences lose most; "uniform": one weight for the whole
            side
        least_weight: in [0, 1]; only for "least"
        decay: of what the gain is learnt from, per generation batch, in (0, 1]; ours
        trust: in one batch's mean entropy against the model's, in (0, 1]; ours
        eps_relative: of the log-det, as in log_det; > 0
    """

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "level"

    by: Literal["policy", "representation"] = "policy"
    floor: float = 0.5
    ceiling: float = 2.0
    unit: Literal["start", "nats"] = "start"
    low: float = -math.inf
    high: float = math.inf
    horizon: int = 20
    weights: Literal["least", "uniform"] = "least"
    least_weight: float = 0.0
    decay: float = 0.99
    trust: float = 0.3
    eps_relative: float = 1e-4

    def __post_init__(self) -> None:
        if self.by == "representation" and self.unit == "start":
            raise ValueError(
                'a log-det may be negative, so by="representation" needs unit="nats": floor and ceiling are then '
                "changes from the start, such as -1 and 5"
            )
        if not self.floor < self.ceiling:
            raise ValueError(f"floor must be below ceiling, got {self.floor} and {self.ceiling}")
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 optimiser step, got {self.horizon}")
        if not 0 <= self.least_weight <= 1:
            raise ValueError(f"least_weight must be in [0, 1], got {self.least_weight}")
        for name in ("decay", "trust"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        advantages = per_token(rollout.advantages, rollout.mask)
        measured = self.policy(rollout, advantages) if self.by == "policy" else self.states(rollout, advantages, memory)
        if measured is None:
            return RolloutEffect()
        entropy, influence = measured
        start = memory.setdefault("start", entropy)
        ledger = Ledger(decay=self.decay, trust=self.trust)
        ledger.measure(memory, rollout.step, entropy)
        of = sides(influence, rollout.mask, rollout.total)
        low, high = self.band(memory["entropy"], start, ledger.gain(memory) if memory["n"] > 4 else 0.0)
        if self.weights == "uniform":
            up, down = uniform_weights(of, low, high)
            weights = torch.where(influence < 0, down, torch.where(influence > 0, up, 1.0))
        else:
            weights = least_weights(influence, of, low, high, rollout.total, self.least_weight)
        is_burning = rollout.mask & (influence < 0)
        products = (weights * influence, torch.where(is_burning, weights, 0), is_burning.to(weights))
        reached, kept, burning = rollout.total(torch.stack([in_double(x).sum() for x in products]))
        net = reached / of.count.clamp(min=1)
        ledger.plan(memory, net.item())
        metrics: dict[str, Metric] = {
            "own": of.net,
            "net": net,
            "gain": net.new_tensor(ledger.gain(memory)),
            "weight": torch.where(burning > 0, kept / burning.clamp(min=1), 1.0),
            "burning": is_burning.float(),
        }
        metrics |= ledger.changes(memory, net)
        return RolloutEffect(columns={"weights": torch.where(rollout.mask, weights, 0)}, metrics=metrics)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "weights" not in batch.columns:  # the states had no spread to speak of
            return Effect()
        return Effect(advantages=batch.columns["weights"] * batch.advantages)

    def policy(self, rollout: Rollout, advantages: Tensor) -> tuple[float, Tensor]:
        """Mean entropy of the tokens, and each one's influence on it."""
        return policy_influence(rollout, advantages)

    def states(self, rollout: Rollout, advantages: Tensor, memory: dict) -> tuple[float, Tensor] | None:
        """Log-det of the states, and each token's influence N <F_i, A_i d log p_i / dz_i>; None without any spread."""
        hidden, mask = rollout.hidden(), rollout.mask
        step = step_factor(moments_everywhere(hidden[mask], rollout.total), self.eps_relative, memory)
        if step is None:
            return None
        whole = step[1]
        force = whole.force(hidden[mask]) * whole.count
        slope = rollout.slope(force.new_zeros(hidden.shape).masked_scatter(mask.unsqueeze(2), force))
        entropy = whole.log_det().item()
        return entropy - memory.setdefault("log_det", entropy), torch.where(mask, advantages * slope, 0)

    def band(self, entropy: float, start: float, gain: float) -> tuple[float, float]:
        """(low', high') as mean influences; without a gain only their signs."""
        scale = start if self.unit == "start" else 1.0
        lowest, highest = ((edge * scale - entropy) / self.horizon for edge in (self.floor, self.ceiling))
        low, high = (min(max(edge, lowest), highest) for edge in (self.low, self.high))
        if gain > 0:
            return low / gain, high / gain
        return (0.0 if low > 0 else -math.inf), (0.0 if high < 0 else math.inf)
