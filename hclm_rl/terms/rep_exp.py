"""RepExp, Representation-Based Exploration: 2025, arXiv:2510.11686"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double, widest
from ..equations.geometry import require_finite_states
from ..equations.gram import unexplained
from ..equations.rows import mean_of_responses
from ..equations.triangles import full_precision
from ..responses.right_answers import is_right, tell_of_unclear_rewards
from ..types import Direction, Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class RepExp(Term):
    """Pays responses whose hidden states in the model of the start are unlike those of their group.

    h_i is the mean of the last hidden states at the tokens of response i; p_i = h_i P, centred over the group's n
    responses, P a random D x d matrix, sparse and drawn anew for each rollout

        R'_i = R_i + beta b_i      b_i = p_i^T (lam I + sum_j p_j p_j^T)^-1 p_i in [0, 1)

    In a group of equal rewards GRPO's division by the deviation makes advantages of size 1 of any bonus: most of what
    it does on solved prompts, which `skips_solved` or `scale_rewards: none` ends. lam is absolute: where states are far
    longer than its root and n - 1 <= d, all leverages are near (n - 1) / n and say nothing (watch `spread`);
    `group_log_det` takes its ridge from the data for this reason, weighs right answers alone, and keeps their sum.
    Right or wrong, what is unlike is paid. Responses without a token or a score have no part. The authors' form that
    accumulates over epochs is not here.

    Args:
        beta: in rewards, >= 0; the authors' runs (their configuration file has 1)
        features: "reference", the frozen model of the run's KL penalty (beta of the run above 0), which no policy can
            move; "policy", the states that predicted the tokens, ours
        form: "leave_one_out" is b / (1 - b): the sum without i; the authors' file has it, their runs "leverage"
        dimensions: d, >= 1; the authors' for MATH and GSM8K, 128 for DAPO; None: no projection
        lam: ridge, in squared states, > 0; the authors'
        normalise: b over the group: divided by its deviation, or centred too; the authors' runs have none
        skips_unsolved: no bonus in a group without a right response; the authors'
        skips_solved: no bonus in a group without a wrong one; the authors have the switch, off
        right_only: True: only right responses are paid; ours
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1

    Metrics:
        bonus (reward): mean of what is added to the rewards
        spread (reward): its standard deviation over the responses
    """

    seeks: ClassVar[Direction | None] = "more"
    shapes_rewards: ClassVar[bool] = True

    beta: float = 0.01
    features: Literal["reference", "policy"] = "reference"
    form: Literal["leverage", "leave_one_out"] = "leverage"
    dimensions: int | None = 32
    lam: float = 0.01
    normalise: Literal["none", "deviation", "z_score"] = "none"
    skips_unsolved: bool = True
    skips_solved: bool = False
    right_only: bool = False
    right_at: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be >= 0 and finite, got {self.beta}")
        if not 0 < self.lam < math.inf:
            raise ValueError(f"lam must be positive and finite, got {self.lam}")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1 or None, got {self.dimensions}")

    # which passes it reads hangs on `features`
    @property
    def needs_scores(self) -> bool:
        return self.features == "policy"

    @property
    def needs_hidden(self) -> bool:
        return self.features == "policy"

    @property
    def needs_rescoring(self) -> bool:
        return self.features == "reference"

    @property
    def needs_reference_model(self) -> bool:
        return self.features == "reference"

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        tell_of_unclear_rewards("rep_exp", rollout, self.right_at, memory)
        mask, rewards = rollout.mask, rollout.rewards
        states = rollout.hidden() if self.features == "policy" else rollout.reference_hidden()
        counts = mask.any(dim=1) & ~rewards.isnan()
        right = counts & is_right(rewards, self.right_at)
        order = rollout.everywhere(rollout.group).argsort(stable=True).view(-1, rollout.group_rewards.size(1))
        own = rollout.here(order.flatten().argsort())  # this process's rows among those of the groups
        pooled = mean_of_responses(states.detach()[mask], mask, widest(states.device))
        h, is_in, is_right_one = (rollout.everywhere(x)[order] for x in (pooled, counts, right))
        b = self._bonus(self._projected(h, is_in, rollout.generator), is_in)
        spread = deviation(b, is_in).mean()
        b = self._normalised(b, is_in)
        is_paid = is_right_one if self.right_only else is_in
        if self.skips_unsolved:
            is_paid = is_paid & is_right_one.any(dim=1, keepdim=True)
        if self.skips_solved:
            is_paid = is_paid & (is_in & ~is_right_one).any(dim=1, keepdim=True)
        b = torch.where(is_paid, b, 0)
        paid = self.beta * b.flatten()[own].to(rewards)
        return RolloutEffect(rewards=rewards + paid, metrics={"bonus": self.beta * b.mean(), "spread": spread})

    def _projected(
        self, h: Float[Tensor, "P G D"], is_in: Bool[Tensor, "P G"], generator: torch.Generator
    ) -> Float[Tensor, "P G d"]:
        """p, centred over each group; zeros for those left out."""
        inside = is_in.unsqueeze(2)
        h = torch.where(inside, h, 0)
        require_finite_states(h.square().sum())
        if self.dimensions is not None:
            with full_precision(h):
                h = h @ sparse_projection(h.size(2), self.dimensions, generator).to(h)
        mean = h.sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(inside, h - mean, 0)

    def _bonus(self, p: Float[Tensor, "P G d"], is_in: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """b before it is normalised."""
        rest = unexplained(p, self.lam)
        b = (1 - rest) / rest if self.form == "leave_one_out" else 1 - rest
        return torch.where(is_in, b, 0)

    def _normalised(self, b: Float[Tensor, "P G"], is_in: Bool[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        if self.normalise == "none":
            return b
        scale = deviation(b, is_in).unsqueeze(1)
        if self.normalise == "z_score":
            b = b - b.sum(dim=1, keepdim=True) / is_in.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.where(is_in & (scale > 0), b / torch.where(scale > 0, scale, 1), 0)


def deviation(b: Float[Tensor, "P G"], is_in: Bool[Tensor, "P G"]) -> Float[Tensor, "P"]:
    """Of each group's responses that count, with n - 1; 0 of one."""
    count = is_in.sum(dim=1, keepdim=True)
    centred = torch.where(is_in, b - torch.where(is_in, b, 0).sum(dim=1, keepdim=True) / count.clamp(min=1), 0)
    return (centred.square().sum(dim=1) / (count.squeeze(1) - 1).clamp(min=1)).sqrt()


def sparse_projection(width: int, dimensions: int, generator: torch.Generator) -> Float[Tensor, "D d"]:
    """Li's very sparse projection: entries +-sqrt(s / d) with probability 1 / (2 s) each, else 0, s = sqrt(D)."""
    s = math.sqrt(width)
    draw = in_double(torch.rand(width, dimensions, generator=generator))
    sign = (draw < 0.5 / s).to(draw) - (draw >= 1 - 0.5 / s).to(draw)
    return sign * math.sqrt(s / dimensions)
