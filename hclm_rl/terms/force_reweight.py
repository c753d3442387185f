"""Force reweighting, entropy change as a constraint; derived here from: HCLM, Tran, 2026, arXiv:2605.22940"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..equations.authority import When, cannot_hold, cannot_say_yet, does_not_hold
from ..equations.flow import (
    INFLUENCES,
    Sides,
    Through,
    finite_part,
    least_weights,
    loss_weights,
    mean_discriminator,
    sides,
    standard_error,
    uniform_weights,
    without_gradient,
)
from ..equations.functional import in_double, per_token
from ..equations.geometry import moments_everywhere
from ..equations.ledger import Ledger, Line
from ..types import Direction, Effect, Metric, Rollout, RolloutEffect, Term, TokenBatch
from .log_det import step_factor

logger = logging.getLogger(__name__)

LOG_DET_SCALE = 10.0  # nats; a log-det's change from the start may be 0, and a tenth of it bounds nothing


@dataclass(frozen=True, kw_only=True)
class ForceReweight(Term):
    """Holds the entropy inside a band: weights in [0, 1] on the tokens whose updates would carry it out.

    e_i is the change of entropy by token i's own update, to first order (flow.py), times the token's part in the
    loss's own mean. With gain, the nats per optimiser step of a mean influence of 1, and drift, what the entropy does
    whatever the influences, both learnt from the run (ledger.py), and H the entropy, the step's weights solve

        low' <= gain * mean_i w_i e_i + drift <= high',   low' = (floor - H) / horizon,  high' = (ceiling - H) / horizon

    narrowed by `low` and `high`. Inside the band all weights are 1; below it burning tokens (e < 0) lose weight, above
    it raising ones (e > 0), by as little as meets the edge; where weights of 0 do not reach it, 0. Until the gain lies
    above 0 by two of its errors only the sign is held: net >= 0 below the floor, net <= 0 above the ceiling. Beside it
    acts a feedback on the level that needs no gain: of the burning side's sum at least the share

        s = clip(f x + f integral of x dt / horizon, 0, 1),   x = (floor - H) / |floor|,  f = `feedback`

    is removed, of the raising side's above the ceiling. What falls beyond all that can be removed (`authority` less
    than the fall) is said in a warning, and by the end of the first tenth of the run that this is not known yet. A
    token that the loss clips has influence 0; with several updates per rollout the weights are those of the sampling
    policy. The advantages are those that reward and advantage shapers before it leave, so put it last. Logs
    `predicted_change` and `realised_change`, in nats per optimiser step, of the steps before, `net` and the unweighted
    `own`, `gain`, `gain_error`, `drift`, `authority` (gain times what can be taken away), `removed` (s), `weight`, the
    mean over burning tokens, and `ignored`, the number of tokens left out because their entropy or influence is not
    finite.

    Args:
        by: whose entropy: of the next token, or log-det of hidden states
        through: what of a token's update moves the policy's entropy: "logits", its own; "head", the output head, on
            the tokens of other prompts, a (V, D) matrix more in memory; ours
        share: of the tokens of the other prompts, drawn, from which `through` "head" takes their entropy's gradient; in
            (0, 1], 1 reads them all. The gradient's error is 1 / sqrt(share) times that of all; ours
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
        feedback: share of a side removed for a level that is off the band by as much as the edge; >= 0, 0 is none; ours
        eps_relative: of the log-det, as in log_det; > 0

    Metrics:
        ignored (tokens): number of tokens whose entropy or influence was not finite; they count nothing. Healthy: 0.
            Else: look for infinite logits, as from a mask over the vocabulary
        own (nats): mean influence of the step as it would be without weights
        net (nats): mean influence that the weights leave. Healthy: above `own` while the entropy is under the floor
        gain (nats a step): what a net influence of 1 has meant for the entropy so far, from a line fitted through the
            run; 0 until it is known. Healthy: above 0 after some tens of steps. Else: at 0 nothing is predicted and
            only signs are used
        authority (nats a step): what the entropy loses to the tokens that burn it, by the gain: the most that the
            weights can save
        removed (share): of the side that leads off the band which the feedback removes at least; below 0: of the
            raising side. Healthy: inside (-1, 1). Else: at 1 the floor may not be held; an entropy_bonus, a smaller
            learning rate or more prompts may slow the fall
        weight (weight): mean weight of the burning tokens, 1: none is touched. Healthy: above 0. Else: at 0 nothing
            that lowers the entropy is learnt, right answers included; lower `floor`
        burning (share): of the tokens whose own update lowers the entropy
        predicted_change (nats a step): change of the mean entropy up to this measurement as the gain foresaw it, from
            when it is known. Healthy: would not use up the entropy within 120 steps. Else: a collapse is coming: hold
            the level (docs/choose.md) or stop
        realised_change (nats a step): the change that was measured, beside the predicted one
        drift (nats a step): what the entropy does whatever the influences say, from the same line. Healthy: near 0.
            Else: far below 0 the fall does not come from the tokens' own updates; a smaller learning rate may slow it
        gain_error (nats a step): standard error of the gain, from when there is a line
        clipped (nats): what of the step's mean influence lay on tokens that the loss clips, where it clips any; they
            have no gradient
    """

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "level"

    by: Literal["policy", "representation"] = "policy"
    through: Through = "logits"
    share: float = 0.125
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
    feedback: float = 1.0
    eps_relative: float = 1e-4

    def __post_init__(self) -> None:
        if self.by == "representation" and self.unit == "start":
            raise ValueError(
                'a log-det may be negative, so by="representation" needs unit="nats": floor and ceiling are then '
                "changes from the start, such as -1 and 5"
            )
        if self.by == "representation" and self.through != "logits":
            raise ValueError(f'through is of by="policy", got {self.through!r} with by="representation"')
        if not self.floor < self.ceiling:
            raise ValueError(f"floor must be below ceiling, got {self.floor} and {self.ceiling}")
        if not self.low <= self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 optimiser step, got {self.horizon}")
        if not 0 <= self.least_weight <= 1:
            raise ValueError(f"least_weight must be in [0, 1], got {self.least_weight}")
        for name in ("share", "decay", "trust"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.feedback < math.inf:
            raise ValueError(f"feedback must be at least 0, got {self.feedback}")
        if not self.eps_relative > 0:
            raise ValueError(f"eps_relative must be positive, got {self.eps_relative}")

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (mean_discriminator,) if self.by == "policy" and self.through == "logits" else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        advantages = per_token(rollout.advantages, rollout.mask)
        measured = self.policy(rollout, advantages) if self.by == "policy" else self.states(rollout, advantages, memory)
        if measured is None:
            return RolloutEffect()
        entropy, influence = measured
        influence, counted, ignored = finite_part(influence, rollout.mask)
        influence = influence * loss_weights(rollout)
        of = sides(influence, counted, rollout.total)
        ledger = Ledger(decay=self.decay, trust=self.trust, scale=LOG_DET_SCALE if self.by == "representation" else 0.0)
        steps = max(rollout.step - memory.get("step", rollout.step), 0)
        ledger.measure(memory, rollout.step, entropy)
        if "entropy" not in memory:  # nothing finite was measured yet
            return RolloutEffect(metrics={"ignored": ignored})
        start, line = memory.setdefault("start", memory["entropy"]), ledger.line(memory)
        weights, removed = self.weigh(influence, of, rollout, memory, line, start, steps)
        is_burning = rollout.mask & (influence < 0)
        weighted = weights * influence
        products = (weighted, torch.where(is_burning, weights, 0), is_burning.to(weights), in_double(weighted).square())
        reached, kept, burning, squares = rollout.total(torch.stack([in_double(x).sum() for x in products]))
        net = reached / of.count.clamp(min=1)
        ledger.plan(memory, net.item(), standard_error(net.item(), squares.item(), of.count.item()))
        self.warn(memory, line, of, rollout, removed, steps)
        gain = ledger.gain(memory)
        metrics: dict[str, Metric] = {
            "ignored": ignored,
            "own": of.net,
            "net": net,
            "gain": net.new_tensor(gain),
            "authority": -gain * of.burning / of.count.clamp(min=1),
            "removed": net.new_tensor(removed),
            "weight": torch.where(burning > 0, kept / burning.clamp(min=1), 1.0),
            "burning": is_burning.float(),
        }
        metrics |= ledger.changes(memory, net)
        columns = {"weights": torch.where(rollout.mask, weights, 0), "influence": weighted}
        return RolloutEffect(columns=columns, metrics=metrics)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "weights" not in batch.columns:  # the states had no spread to speak of
            return Effect()
        metrics = without_gradient(batch, batch.columns["influence"])
        return Effect(advantages=batch.columns["weights"] * batch.advantages, metrics=metrics)

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        Ledger.drop(memory, metrics.get("clipped", 0.0))

    def weigh(
        self,
        influence: Tensor,
        of: Sides,
        rollout: Rollout,
        memory: dict,
        line: Line | None,
        start: float,
        steps: int,
    ) -> tuple[Tensor, float]:
        """(weights, share of the side that leads off the band that the feedback removes at least, < 0: raising)."""
        known = line if line is not None and line.is_known else None
        low, high = self.band(memory["entropy"], start, known.gain if known else 0.0, known.drift if known else 0.0)
        below, above = self.removed(memory, start, steps)
        count = max(of.count.item(), 1.0)
        if below > 0:
            low = min(max(low, of.net.item() - below * of.burning.item() / count), high)
        if above > 0:
            high = max(min(high, of.net.item() - above * of.raising.item() / count), low)
        removed = below if below > 0 else -above
        if self.weights == "uniform":
            up, down = uniform_weights(of, low, high)
            return torch.where(influence < 0, down, torch.where(influence > 0, up, 1.0)), removed
        return least_weights(influence, of, low, high, rollout.total, self.least_weight), removed

    def removed(self, memory: dict, start: float, steps: int) -> tuple[float, float]:
        """The feedback's shares of the burning and of the raising side, `steps` after the last time."""
        shares = []
        for name, edge, sign in zip(("below", "above"), self.edges(start), (1.0, -1.0), strict=True):
            size = max(abs(edge), 1.0 if self.by == "representation" else 1e-6)  # nats
            off = sign * (edge - memory["entropy"]) / size if math.isfinite(edge) else -1.0
            summed = memory.get(name, 0.0) + self.feedback * off * steps / self.horizon
            memory[name] = min(max(summed, 0.0), 1.0)
            shares.append(min(max(self.feedback * off + memory[name], 0.0), 1.0))
        return shares[0], shares[1]

    def warn(self, memory: dict, line: Line | None, of: Sides, rollout: Rollout, removed: float, steps: int) -> None:
        """Says what authority.py finds of the floor, each once. An entropy is not below 0, a log-det may be."""
        floor = self.edges(memory["start"])[0]
        if math.isfinite(floor) and (floor > 0 or self.by == "representation"):
            raising = of.raising.item() / max(of.count.item(), 1.0)
            when = When(rollout.step, rollout.progress, steps)
            for found in (
                cannot_hold(memory, line, floor, raising, removed),
                does_not_hold(memory, floor, removed, when),
                cannot_say_yet(memory, line, floor, raising, when),
            ):
                if found:
                    logger.warning("force_reweight %s", found)

    def policy(self, rollout: Rollout, advantages: Tensor) -> tuple[float, Tensor]:
        """Mean entropy of the tokens, and each one's influence on it, (N, T)."""
        return INFLUENCES[self.through](rollout, advantages, self.share)

    def states(self, rollout: Rollout, advantages: Tensor, memory: dict) -> tuple[float, Tensor] | None:
        """Log-det of the states, and each token's influence N <F_i, A_i d log p_i / dz_i>, (N, T); or None."""
        step = step_factor(moments_everywhere(rollout.states(), rollout.total), self.eps_relative, memory)
        if step is None:
            return None
        whole = step[1]
        slope = rollout.slope(lambda rows: whole.force(rows).mul_(whole.count))
        entropy = whole.log_det().item()
        return entropy - memory.setdefault("log_det", entropy), torch.where(rollout.mask, advantages * slope, 0)

    def edges(self, start: float) -> tuple[float, float]:
        """(floor, ceiling) in nats, of the entropy or, by representation, of its change."""
        scale = start if self.unit == "start" else 1.0
        return self.floor * scale, self.ceiling * scale

    def band(self, entropy: float, start: float, gain: float, drift: float = 0.0) -> tuple[float, float]:
        """(low', high') as mean influences; without a gain only their signs."""
        lowest, highest = ((edge - entropy) / self.horizon for edge in self.edges(start))
        low, high = (min(max(edge, lowest), highest) for edge in (self.low, self.high))
        if gain > 0:
            return (low - drift) / gain, (high - drift) / gain
        return (0.0 if low > 0 else -math.inf), (0.0 if high < 0 else math.inf)
