"""Lp-Reg, low-probability regularisation: 2025, arXiv:2510.03222"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import per_token
from ..equations.selections import below_quantile, smallest
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

LARGEST_GAP = 20.0  # nats; far beyond where k3 reaches its bound, so that exp cannot overflow


@dataclass(frozen=True, kw_only=True)
class LpReg(Term):
    """Keeps rare but plausible tokens of bad responses from being pushed to zero.

    q is the sampling policy, K_t = {v : q_v >= kappa max q}, g = q / mass_t on K_t, mass_t = sum over K_t of q. To the
    loss of a token with A_t < 0 that is among the least probable ones and has log p_t < log g_t it adds beta k3,
    k3 = min(exp(x) - x - 1, 10), x = log g_t - log p_t with g constant: it pulls p_t up to g_t. A sampled token outside
    K_t is noise and never protected.

    With one update per rollout x is -log mass, a few percent of the push down, and nothing where nothing was filtered;
    most of the force comes with several updates. The authors bound the ratio to [0, 10]: set epsilon 1 and epsilon_high
    9; then a token with A_t < 0 is not clipped at all, as they have it on the protected ones. q is at the sampling
    temperature. "step" selects once, at the sampling policy.

    Args:
        kappa: of the largest probability, in [0, 1); the paper's min-p, a token at the bound is kept as in the authors'
            code; 0 filters nothing, which collapsed
        rho: share selected, in (0, 1]; the paper's for 14B, 0.005 for 32B
        beta: >= 0; the paper's value
        population: "negative": the max(1, floor(rho N)) least probable of the N tokens with A < 0, none where that is
            1: the authors' code. "all": those with A < 0 below the rho-quantile of the sampled probabilities of all
            tokens: the paper.
        estimator: "full": KL(g || p) over the vocabulary, the paper's formula; q is then the current policy, detached,
            so it is meant for one update per rollout. Its value there is -log mass.
        statistics: "micro_batch": as the authors' code, by the current policy

    Metrics:
        kept_mass (probability): mean mass of the tokens that kappa keeps, in (0, 1]. Healthy: below 1. Else: at 1
            nothing is filtered, and with one update per rollout the term does nothing
        selected (share): of the tokens that are among the least probable ones with A < 0. Healthy: about `rho` of
            those. Else: at 0 the step is too small for `rho`
        noise (share): of the tokens that are selected and yet not kept, so not protected
    """

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    needs_vocab_gradient: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    kappa: float = 0.02
    rho: float = 0.01
    beta: float = 1.0
    population: Literal["negative", "all"] = "negative"
    estimator: Literal["k3", "full"] = "k3"
    statistics: Literal["step", "micro_batch"] = "step"

    def caveats(self) -> list[str]:
        if self.rho <= 0.1:
            return []
        return [
            f"rho {self.rho:g} protects the least probable {100 * self.rho:g} %, where the paper has 0.5 % to 1 %: "
            "these are not rare tokens, and much of the learning from bad responses is taken back"
        ]

    def __post_init__(self) -> None:
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa must be in [0, 1), got {self.kappa}")
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho is a fraction in (0, 1], not a percentage, got {self.rho}")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta must be >= 0 and finite, got {self.beta}")

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (self._of_kept,)

    def _of_kept(self, logps: Float[Tensor, "n V"]) -> Float[Tensor, "n 2"]:
        """(log of the mass that the filter keeps, log of the largest probability)."""
        return torch.stack([log_kept_mass(logps, self.kappa), logps.max(dim=-1).values], dim=-1)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        logps, _ = rollout.scored()
        log_mass, largest = rollout.over_vocab(self._of_kept).unbind(dim=-1)
        is_kept = rollout.mask & reaches(logps, largest, self.kappa)
        columns = {"log_mass": torch.where(rollout.mask, log_mass, 0), "is_kept": is_kept}
        if self.statistics == "step":
            mask = rollout.everywhere(rollout.mask)
            is_negative = mask & (rollout.everywhere(per_token(rollout.advantages, rollout.mask)) < 0)
            columns["is_selected"] = rollout.here(self._select(rollout.everywhere(logps), is_negative, mask))
        return RolloutEffect(columns=columns, metrics={"kept_mass": log_mass.exp()})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        current = batch.logps.detach()
        if self.statistics == "step":
            is_selected = batch.columns["is_selected"]
        else:
            is_selected = self._select(current, batch.mask & (batch.advantages < 0), batch.mask)
        # -inf where filtered: such a token is never below it, and is masked before anything is computed from it
        log_proxy = batch.old_logps - batch.columns["log_mass"]
        is_protected = is_selected & batch.columns["is_kept"] & (current < log_proxy)
        if self.estimator == "full":
            divergence = torch.where(is_protected, batch.over_vocab(lambda p: kl_of_filtered(p, self.kappa)), 0)
        else:
            gap = torch.where(is_protected, log_proxy - batch.logps, 0).clamp(max=LARGEST_GAP)
            divergence = (gap.exp() - gap - 1).clamp(max=10)
        metrics = {"selected": is_selected.float(), "noise": (is_selected & ~batch.columns["is_kept"]).float()}
        return Effect(loss=self.beta * divergence, metrics=metrics)

    def _select(
        self, logps: Float[Tensor, "rows T"], is_negative: Bool[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]
    ) -> Bool[Tensor, "rows T"]:
        if self.population == "all":
            return is_negative & below_quantile(logps.exp(), mask, self.rho)
        quota = int(self.rho * int(is_negative.sum()))
        return smallest(logps, is_negative, quota if quota > 1 else 0)


def reaches(logps: Float[Tensor, "*S"], largest: Float[Tensor, "*#S"], kappa: float) -> Bool[Tensor, "*S"]:
    """q_v >= kappa max q, `largest` = log max q; of what cannot be sampled (q_v = 0) never."""
    return (logps >= largest + (math.log(kappa) if kappa else -math.inf)) & (logps > -math.inf)


def is_plausible(logps: Float[Tensor, "n V"], kappa: float) -> Bool[Tensor, "n V"]:
    """q_v >= kappa max q."""
    return reaches(logps, logps.max(dim=-1, keepdim=True).values, kappa)


def log_kept_mass(logps: Float[Tensor, "n V"], kappa: float) -> Float[Tensor, "n"]:
    """log of the mass that the filter keeps, from what it drops: exactly 0 where it drops nothing."""
    dropped = torch.where(is_plausible(logps, kappa), 0, logps.exp()).sum(dim=-1)
    return torch.log1p(-dropped)


def kl_of_filtered(logps: Float[Tensor, "n V"], kappa: float) -> Float[Tensor, "n"]:
    """KL(g || p), g the filtered copy of p, a constant."""
    is_kept, constant = is_plausible(logps.detach(), kappa), logps.detach()
    log_g = constant - log_kept_mass(constant, kappa).unsqueeze(-1)
    return torch.where(is_kept, log_g.exp() * (log_g - torch.where(is_kept, logps, 0)), 0).sum(dim=-1)
