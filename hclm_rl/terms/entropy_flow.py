"""Entropy flow, a gauge derived here from the discriminator of: Wang et al., 2026, arXiv:2602.03392"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..equations.flow import (
    INFLUENCES,
    Through,
    finite_part,
    loss_weights,
    mean_discriminator,
    sides,
    standard_error,
    without_gradient,
)
from ..equations.functional import in_double, per_token
from ..equations.ledger import Ledger
from ..types import Effect, Metric, Quantiles, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class EntropyFlow(Term):
    """Changes nothing; says which tokens' updates burn entropy, and how fast the entropy is about to change.

    Influence of token a with advantage A on the policy entropy H at its position (flow.py):
    e = -A (S_a - sum_v p_v S_v), S_v = p_v (log p_v + H), times the token's part in the loss's own mean. Over the whole
    generation batch, at the sampling policy: `influence`, quantiles of e; `burning`, the share of tokens with e < 0;
    `net`, its mean; `cancelled` = 1 - |sum e| / sum |e|, in [0, 1]: near 1 a small shift of the weights turns the flow;
    `predicted_change` = gain * net + drift and `realised_change`, both of the steps before this batch, in nats per
    optimiser step; `gain`, learnt from the run, 0 until it lies above 0 by two of its errors (`gain_error`), and
    `drift`, what the entropy does whatever the influences; `clipped`, the net on tokens that the loss clipped;
    `distinct`, the share of different responses in a group, which falls before pass@k does; `ignored`, the number
    of tokens left out because their entropy or influence is not finite.
    With `through` "head" e is the head kernel: what the token's gradient at the output head does to the mean entropy of
    the other half of the prompts, through the weights that they share; one more (V, D) matrix in memory.
    It sees the advantages that the links before it leave. Parameter sharing between tokens is ignored: a single step's
    prediction is poor, that of some tens of steps is not (docs/results.md).

    Args:
        through: "logits": what a token's update does to its own logits; "head": what it does through the output head to
            the tokens of other prompts; ours
        share: of the tokens of the other prompts, drawn, from which `through` "head" takes their entropy's gradient; in
            (0, 1], 1 reads them all. The gradient's error is 1 / sqrt(share) times that of all; ours

    Metrics:
        influence/q* (nats): quantiles of the tokens' influences e = -A (S - mean S), a unit of step along the token's
            logits
        burning (share): of the tokens whose own update lowers the entropy
        net (nats): mean influence of the step: below 0 it lowers the entropy
        cancelled (share): of the two sides that cancel, 0: all on one side, 1: they are equal
        gain (nats a step): what a net influence of 1 has meant for the entropy so far, from a line fitted through the
            run; 0 until it is known. Healthy: above 0 after some tens of steps. Else: at 0 nothing is predicted and
            only signs are used
        ignored (tokens): number of tokens whose entropy or influence was not finite; they count nothing. Healthy: 0.
            Else: look for infinite logits, as from a mask over the vocabulary
        distinct (share): of the responses to a prompt that differ from one another, token by token. Healthy: above half
            of its start. Else: the groups repeat themselves: see docs/troubleshooting.md, "the entropy falls"
        gain_error (nats a step): standard error of the gain, from when there is a line
        drift (nats a step): what the entropy does whatever the influences say, from the same line. Healthy: near 0.
            Else: far below 0 the fall does not come from the tokens' own updates; a smaller learning rate may slow it
        predicted_change (nats a step): change of the mean entropy up to this measurement as the gain foresaw it, from
            when it is known. Healthy: would not use up the entropy within 120 steps. Else: a collapse is coming: hold
            the level (docs/choose.md) or stop
        realised_change (nats a step): the change that was measured, beside the predicted one
        clipped (nats): what of the step's mean influence lay on tokens that the loss clips, where it clips any; they
            have no gradient
    """

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    is_diagnostic: ClassVar[bool] = True

    through: Through = "logits"
    share: float = 0.125

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (mean_discriminator,) if self.through == "logits" else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        entropy, influence = INFLUENCES[self.through](rollout, per_token(rollout.advantages, rollout.mask), self.share)
        influence, counted, ignored = finite_part(influence, rollout.mask)
        influence = influence * loss_weights(rollout)
        of = sides(influence, counted, rollout.total)
        ledger = Ledger()
        ledger.measure(memory, rollout.step, entropy)
        squares = rollout.total(in_double(influence).square().sum())
        net = of.net.item()
        ledger.plan(memory, net, standard_error(net, squares.item(), of.count.item()))
        metrics: dict[str, Metric] = {
            "influence": Quantiles(values=influence),
            "burning": (influence < 0).float(),
            "net": of.net,
            "cancelled": 1 - (of.raising + of.burning).abs() / (of.raising - of.burning).clamp(min=1e-30),
            "gain": of.net.new_tensor(ledger.gain(memory)),
            "ignored": ignored,
        }
        if (share := distinct(rollout)) is not None:
            metrics["distinct"] = share
        return RolloutEffect(columns={"influence": influence}, metrics=metrics | ledger.changes(memory, of.net))

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(metrics=without_gradient(batch, batch.columns["influence"]))

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        Ledger.drop(memory, metrics.get("clipped", 0.0))


def distinct(rollout: Rollout) -> torch.Tensor | None:
    """Mean over groups of the number of different responses (token by token) over the number of responses.

    Without those that have no tokens, as truncated ones that are masked; None where none has.
    """
    ids, group = rollout.everywhere(torch.where(rollout.mask, rollout.ids + 1, 0)), rollout.everywhere(rollout.group)
    responses = torch.cat([group.unsqueeze(1), ids], dim=1)[(ids > 0).any(dim=1)]
    if not len(responses):
        return None
    return rollout.scored()[0].new_tensor(len(responses.unique(dim=0)) / len(responses))
