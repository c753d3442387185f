"""SimKO, Simple Pass@K Policy Optimization: 2025, arXiv:2510.14807"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.selections import above_own_quantile
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Simko(Term):
    """At uncertain tokens the right ones share their push with the likeliest others, and a wrong favourite falls more.

    A token acts where its entropy is above the `tau`-quantile of its own response.
    A > 0: a share a of its push goes evenly to the K likeliest tokens, whether it is one of them or not: the gradient
    of log p becomes (1 - a) grad log p + a mean_k grad log p_k, as a loss of value 0 beside the base. What PPO's clip
    drops stays dropped. It is averaged over all tokens of the step, as in dapo: with another mean the share is not
    quite a. A < 0, and the token is the policy's first choice: A <- lam A. The K-th candidate is often junk and gets as
    much as the second. The authors leave an entropy bonus of 0.001 on, beside which a of 0.01 is small. Right is A > 0
    here; the authors' reward == 1 never holds for graded rewards. The paper's text was not at hand, its code was.

    Args:
        k: candidates, >= 1; the authors'; 1 with tau 1 is off
        a: share of the push, in [0, 1]; the authors' `mix_topk_coef`
        tau: in [0, 1]; the authors'; none of a response's tokens is above 1
        lam: of wrong favourites, >= 1; fixed in the authors' code
        statistics: "step" chooses the uncertain tokens once, at the sampling policy; "micro_batch" at every update, as
            the authors' code

    Metrics:
        shared (share): of the tokens whose push up is shared with the likeliest others
        favourites (share): of the tokens that are the likeliest, wrong, and pushed down by more
    """

    needs_vocab_gradient: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    k: int = 3
    a: float = 0.01
    tau: float = 0.8
    lam: float = 1.1
    statistics: Literal["step", "micro_batch"] = "step"

    @property
    def needs_scores(self) -> bool:
        return self.statistics == "step"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        for name in ("a", "tau"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {vars(self)[name]}")
        if not 1 <= self.lam < torch.inf:
            raise ValueError(f"lam must be at least 1 and finite, got {self.lam}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.statistics == "micro_batch":
            return RolloutEffect()
        # a response's quantile is its own, so it needs no other process
        is_fork = above_own_quantile(rollout.scored()[1], rollout.mask, self.tau)
        return RolloutEffect(columns={"is_fork": is_fork})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        is_fork = (
            batch.columns["is_fork"]
            if self.statistics == "step"
            else above_own_quantile(batch.entropy, batch.mask, self.tau)
        )
        is_wrong = is_fork & (batch.advantages < 0) & is_favourite(batch)
        is_shared = is_fork & (batch.advantages > 0)
        if batch.is_clipped is not None:
            is_shared = is_shared & ~batch.is_clipped
        ratio = torch.where(is_shared, batch.logps.detach() - batch.old_logps, 0).exp()
        push = torch.where(is_shared, self.a * batch.advantages * ratio, 0)
        candidates = batch.over_vocab(lambda logps: logps.topk(min(self.k, logps.size(1)), dim=1).values.mean(dim=1))
        towards = torch.where(is_shared, candidates - batch.logps, 0)
        return Effect(
            advantages=torch.where(is_wrong, self.lam * batch.advantages, batch.advantages),
            loss=-push * (towards - towards.detach()),
            affected=push > 0,
            metrics={"shared": is_shared.float(), "favourites": is_wrong.float()},
        )


def is_favourite(batch: TokenBatch) -> Bool[Tensor, "B T"]:
    """Whether the sampled token is the likeliest of the policy as it is, of equals the first."""

    def place(logps: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
        return logps.argmax(dim=1).float()  # whole numbers up to 2^24 are exact

    with torch.no_grad():
        return batch.mask & (batch.over_vocab(place) == batch.ids)
