"""OPEFO, On-Policy Entropy Flow Optimization: OPEFO, 2026, arXiv:2605.11491"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..equations.flow import discriminator, finite_part, loss_weights, policy_influence, sides
from ..equations.functional import per_token
from ..responses.right_answers import tell_once
from ..types import Direction, Effect, Metric, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class EntropyFlowBalance(Term):
    """Holds the entropy where it is: tokens that lower it and tokens that raise it are scaled to a net flow of zero.

    f_t = -A_t p_t (log p_t + H_t), the change of the entropy at its own position by the token's update, at the sampling
    policy and times the token's part in the loss's mean. Over the whole step and all processes, P the sum of f > 0 and
    M of |f|, f < 0:

        lam = (M - P) / (M + P)    A_t <- (1 + lam) A_t where f > 0, (1 - lam) A_t where f < 0

    so that (1 + lam) P = (1 - lam) M; 0 where both are. Weights are in [0, 2]: one side is raised. Any level is held,
    a collapsed one too, and drift is not seen: `force_reweight` holds a band instead, by weights that only take away.
    P and M nearly cancel in a large batch (the authors report a lam of about 1e-3), so `lam` may be noise: look at its
    spread. The method is for one update a rollout; with several the weights of the sampling policy hold for all, and a
    warning says so. It sees the advantages that terms before it leave, so put it last. f is reconstructed: our sources
    name its four factors, not the equation; the steps from there on are theirs. Most of what is reported against GRPO
    is that of strictly on-policy updates. Logs `raising` and `burning`, P and -M over the tokens, and `ignored`, the
    number of tokens left out because a log-prob or an entropy is not finite.

    Args:
        influence: "own": f; "exact": less its mean under the policy, what the other logits of the same softmax do too
            (flow.py), whose sign can be another; ours

    Metrics:
        lam (factor): how much more the one side weighs, in [-1, 1]. Healthy: about 0. Else: far from 0 for long the two
            sides are very unequal; look at `raising` and `burning`
        raising (nats a token): what the tokens that raise the entropy would do, over all tokens
        burning (nats a token): what those that lower it would do, below 0
        ignored (tokens): number of tokens left out because a log-prob or an entropy is not finite. Healthy: 0. Else:
            look for infinite logits
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "level"

    influence: Literal["own", "exact"] = "own"

    @property
    def needs_vocab(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (one of the two reads it)
        return self.influence == "exact"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        advantages = per_token(rollout.advantages, rollout.mask)
        if self.influence == "exact":
            flow = policy_influence(rollout, advantages)[1]
        else:
            flow = torch.where(rollout.mask, -advantages * discriminator(*rollout.scored()), 0)
        flow, counted, ignored = finite_part(flow, rollout.mask)
        flow = flow * loss_weights(rollout)
        of = sides(flow, counted, rollout.total)
        size = of.raising - of.burning
        lam = torch.where(size > 0, -(of.raising + of.burning) / torch.where(size > 0, size, 1), 0)
        memory["updates"] = 0
        tokens = of.count.clamp(min=1)
        metrics: dict[str, Metric] = {"lam": lam, "raising": of.raising / tokens, "burning": of.burning / tokens}
        weights = torch.where(rollout.mask, (1 + lam * flow.sign().to(lam)).to(flow), 0)
        return RolloutEffect(columns={"weights": weights}, metrics={**metrics, "ignored": ignored})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        return Effect(advantages=batch.columns["weights"] * batch.advantages)

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        memory["updates"] = memory.get("updates", 0) + 1
        if memory["updates"] > 1:
            tell_once(
                memory,
                "several",
                "entropy_flow_balance: a rollout is used for more than one update, and the flow is balanced for the "
                "first alone: set num_iterations to 1 and steps_per_generation to gradient_accumulation_steps",
            )
