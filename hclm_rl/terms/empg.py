"""EMPG, Entropy-Modulated Policy Gradients: Wang et al., 2025, arXiv:2509.09265"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..equations.functional import in_double, per_token
from ..responses.turns import at_tokens, ends_of_steps, number_turns, sum_by_turn, tokens_by_turn
from ..types import Direction, Rollout, RolloutEffect, Term

EPSILON = 1e-8  # the authors': keeps equal entropies at 0 and an empty sum from dividing


@dataclass(frozen=True, kw_only=True)
class Empg(Term):
    """Trains more on an agent's confident steps and less on uncertain ones, and pays a step for the next one's clarity.

    A_it = A_i g_it + zeta f_i,t+1 - mean of these over all steps;  g = exp(-k h) / mean exp(-k h),  f = exp(-k_next h),
    h_it = (H_it - min H) / (max H - min H), H_it = mean entropy of the tokens of step t, nats, at the sampling policy.
    Minima, maxima and means are over all steps of all responses, each step once whatever its length; the last step of
    a response gets no bonus. A step is a turn: an unbroken run of response tokens between what tools wrote.
    In text without tools a response is one step, f never acts, and g is a weight per response: set `delimiter`.
    One very uncertain step squeezes all others to g = 1. Groups of equal rewards do not stay at zero: they get the
    bonus less the mean, whatever the outcome; responses without a reward have no part in it. Confident errors are
    punished hardest, the opposite of what terms do that weigh uncertain tokens up: do not stack it with those.

    Args:
        k: sharpness of g, >= 0; the authors'
        k_next: sharpness of f (k' in the paper), >= 0; the authors'
        zeta: weight of the bonus, >= 0; of two listings that cite the paper, the later one (the other: 0.1)
        delimiter: text that ends a step within a turn, such as "\\n\\n"; None: steps are turns

    Metrics:
        steps (steps a response): mean number of steps of a response. Healthy: above 1. Else: at 1 the bonus never acts;
            set `delimiter`
        largest_factor (weight): greatest g of the step, 1 on average
        step_entropy (nats): mean over the steps of a response's mean entropy
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "less"  # trusts confident steps and pays for confident next ones
    centres: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    k: float = 1.0
    k_next: float = 1.0
    zeta: float = 0.05
    delimiter: str | None = None

    def __post_init__(self) -> None:
        for name in ("k", "k_next", "zeta"):
            if not 0 <= vars(self)[name] < torch.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {vars(self)[name]}")
        if self.delimiter == "":
            raise ValueError("delimiter must be text of at least one character, or None for turns, got ''")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        ends = None
        if self.delimiter is not None:
            delimiter = re.compile(re.escape(self.delimiter))
            ends = rollout.everywhere(ends_of_steps(rollout.tokenizer, rollout.ids, rollout.mask, delimiter))
        mask = rollout.everywhere(rollout.mask)
        advantages = in_double(rollout.everywhere(per_token(rollout.advantages, rollout.mask)))
        turn = number_turns(mask, ends)
        tokens = tokens_by_turn(turn)
        is_scored = ~rollout.everywhere(rollout.rewards).isnan().unsqueeze(1)
        is_step = (tokens > 0) & is_scored  # (N, S)
        if not is_step.any():
            return RolloutEffect()
        entropy = sum_by_turn(in_double(rollout.everywhere(rollout.scored()[1])), turn) / tokens.clamp(min=1)
        low, high = entropy[is_step].min(), entropy[is_step].max()
        h = (entropy - low) / (high - low + EPSILON)
        g = (-self.k * h).exp() / ((-self.k * h[is_step]).exp().mean() + EPSILON)
        f = torch.where(is_step, (-self.k_next * h).exp(), 0.0)
        bonus = self.zeta * torch.nn.functional.pad(f[:, 1:], (0, 1))  # of the step that follows
        modulated = advantages * at_tokens(g, turn) + at_tokens(bonus, turn)
        # advantages that differ within a step count with their mean in the centre
        centre = (sum_by_turn(modulated, turn) / tokens.clamp(min=1))[is_step].mean()
        shaped = torch.where(is_scored, modulated - centre, advantages)
        return RolloutEffect(
            advantages=rollout.here(shaped.to(rollout.advantages.dtype)),
            metrics={
                "steps": in_double(tokens > 0).sum(dim=1).mean(),  # per response
                "largest_factor": g[is_step].max(),
                "step_entropy": entropy[is_step].mean(),
            },
        )
