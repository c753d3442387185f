"""SIREN, selective entropy regularisation: 2025, arXiv:2509.25133"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..equations.functional import in_double
from ..equations.selections import above_own_quantile
from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch

ROUNDING = 1e-6  # a cumulated probability this close to p_top has reached it: float32 sums decide no boundary


@dataclass(frozen=True, kw_only=True)
class Siren(Term):
    """Holds the entropy among the likely next tokens, at each response's most uncertain positions, at its first level.

    H_t: entropy of the nucleus, nats; the fewest most probable tokens with p_1 + ... + p_k >= p_top, renormalised.
    Peak tokens: H_t above the tau-quantile (linear) of their response. H_agg: the mean of H_t over a response's peak
    tokens, 0 where it has none, then over all responses of the step and all processes. Adds coef (H_agg - anchor)^2,
    anchor = H_agg of the first rollout: a pull in both directions, and none in the first step.

    "step" takes 2 (H_agg - anchor) at the sampling policy and applies it to the gradient of the current H_agg, whose
    peaks are the current policy's: the loss has that gradient, and not that value. "micro_batch" squares each
    micro-batch's own H_agg, which adds its variance to the loss. On a confident model most nuclei are one token, and
    only the other positions count: watch `nucleus_entropy`. The vocabulary is sorted at every position, with gradient.

    Args:
        p_top: mass of the nucleus, in (0, 1]; the authors' script
        tau: quantile within a response, in [0, 1); the authors' script
        nucleus: "exclusive": without the token that crosses p_top, as the released code; another level, so another
            anchor
        anchor: nats, >= 0; None: the level of the first rollout, kept in the checkpoint
        statistics: "micro_batch": as the authors' code, for parity with it

    Attributes:
        default_coef: the authors' script

    Metrics:
        nucleus_entropy (nats): H_agg, of the nucleus at the peak tokens. Healthy: near `anchor`. Else: below it for
            long: raise the coef
        anchor (nats): the level that is held
        peaks (share): of the tokens that are peaks of their response. Healthy: about 1 - `tau`. Else: near 0 most
            nuclei are one token and the term hardly acts
    """

    needs_scores: ClassVar[bool] = True
    needs_vocab: ClassVar[bool] = True
    needs_vocab_gradient: ClassVar[bool] = True
    default_coef: ClassVar[float] = 0.005
    seeks: ClassVar[Direction | None] = "level"

    p_top: float = 0.8
    tau: float = 0.8
    nucleus: Literal["inclusive", "exclusive"] = "inclusive"
    anchor: float | None = None
    statistics: Literal["step", "micro_batch"] = "step"

    def caveats(self) -> list[str]:
        if self.p_top >= 0.08:
            return []
        return [
            f"p_top {self.p_top:g}: a nucleus of so little mass is one token nearly everywhere, whose entropy is 0; "
            "the authors have 0.8"
        ]

    def __post_init__(self) -> None:
        if not 0 < self.p_top <= 1:
            raise ValueError(f"p_top must be in (0, 1], got {self.p_top}")
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must be in [0, 1), got {self.tau}")
        if self.anchor is not None and not 0 <= self.anchor < math.inf:
            raise ValueError(f"anchor must be >= 0 nats and finite, got {self.anchor}")

    def vocab_functionals(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return () if self.statistics == "micro_batch" else (self._of_nucleus,)  # which asks at the first rollout alone

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        if self.anchor is not None:
            memory["anchor"] = self.anchor
        if self.statistics == "micro_batch" and "anchor" in memory:
            return RolloutEffect()
        entropy = rollout.over_vocab(self._of_nucleus)
        per_response = (self._peak_share(entropy, rollout.mask) * in_double(entropy)).sum()
        sums = torch.stack([per_response, per_response.new_tensor(len(entropy)), in_double(rollout.mask.sum())])
        level, responses, tokens = rollout.total(sums).tolist()
        level = level / responses
        if tokens and math.isfinite(level):  # a batch without any says nothing of the level
            memory.setdefault("anchor", level)
        elif "anchor" not in memory:
            return RolloutEffect(shared={"pull": entropy.new_zeros(())})
        # the trainer's mean is over the tokens of the step: tokens / responses makes it one over responses
        pull = 2 * (level - memory["anchor"]) * tokens / responses
        metrics = {"nucleus_entropy": entropy.new_tensor(level), "anchor": entropy.new_tensor(memory["anchor"])}
        return RolloutEffect(shared={"pull": entropy.new_tensor(pull)}, metrics=metrics)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        entropy = batch.over_vocab(self._of_nucleus)
        share = self._peak_share(entropy, batch.mask).to(entropy.dtype)
        metrics = {"peaks": (share > 0).float()}
        if self.statistics == "step":
            return Effect(loss=batch.shared["pull"] * share * entropy, metrics=metrics)
        if "anchor" not in memory:
            return Effect(metrics=metrics)
        level = (share * entropy).sum() / len(entropy)
        return Effect(loss=(level - memory["anchor"]).square(), metrics=metrics | {"nucleus_entropy": level.detach()})

    def _of_nucleus(self, logps: Float[Tensor, "n V"]) -> Float[Tensor, "n"]:
        return nucleus_entropy(logps, self.p_top, self.nucleus == "inclusive")

    def _peak_share(self, entropy: Float[Tensor, "rows T"], mask: Bool[Tensor, "rows T"]) -> Float[Tensor, "rows T"]:
        """1 / |peaks of the response| at its peaks, 0 elsewhere."""
        is_peak = above_own_quantile(entropy, mask, self.tau)
        return in_double(is_peak) / is_peak.sum(dim=1, keepdim=True).clamp(min=1)


def nucleus_entropy(logps: Float[Tensor, "n V"], p_top: float, is_inclusive: bool = True) -> Float[Tensor, "n"]:
    """-sum u_i log u_i, u = p / sum of p over the nucleus, whose choice is a constant.

    Inclusive: the fewest most probable tokens that reach p_top together. Exclusive: without the last of them, and 0
    where that leaves none.
    """
    ranked = logps.sort(dim=-1, descending=True).values
    reached = ranked.detach().exp().cumsum(dim=-1) >= p_top - ROUNDING
    is_outside = torch.nn.functional.pad(reached[:, :-1], (1, 0), value=False) if is_inclusive else reached
    # the first token stays: alone it has u = 1, entropy 0 and no gradient, as an empty nucleus is to have
    is_inside = torch.cat([torch.ones_like(reached[:, :1]), ~is_outside[:, 1:]], dim=-1)
    log_mass = ranked.masked_fill(~is_inside, -math.inf).logsumexp(dim=-1, keepdim=True)
    log_u = torch.where(is_inside, ranked - log_mass, 0)
    return -(log_u.exp() * log_u).sum(dim=-1)
