"""BAPO, Balanced Policy Optimization with Adaptive Clipping: 2025, arXiv:2510.18927"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..types import Direction, Effect, Rollout, RolloutEffect, Term, TokenBatch, Total

ROUNDING = 1e-9  # 1.2 + 6 * 0.1 is 1.7999999999999998


@dataclass(frozen=True, kw_only=True)
class Bapo(Term):
    """Moves PPO's clip bounds until tokens with A > 0 make up a given share of the update.

    Bounds (lo, hi) in the place of 1 -+ epsilon: A > 0 counts up to r = hi, A < 0 from r = lo on, r the ratio of a
    token. What a token gives is A min(r, hi) or |A| max(r, lo); of P and M, the sums over A > 0 and A < 0 of all tokens
    of the optimiser step, share = P / (P + M). From the lowest bounds on, while share < rho: hi rises by `step_hi`, or
    where it is at its end lo by `step_lo`.

    Bounds come from the sums of the same update of the rollout before (one rollout of lag; the lowest ones in the
    first), since those of an update are known only after it; so they are the same for all micro-batches and processes.
    The authors' code takes them from each micro-batch, has the order "lo first", and a dual clip of 3, which is not
    here. With one update per rollout every r is 1 and it does nothing. By value a cut token with A < 0 gives lo, more
    than its own r, so that raising lo never helps; by "gradient" what is cut gives nothing, which is what the paper
    argues with. hi up to 3 is a wide trust region on stale rollouts. What it keeps is averaged over all tokens of the
    step, as in dapo. For the losses that clip one ratio a token.

    Args:
        rho: least share, in (0, 1); the paper's, 0.5 in the authors' README
        lo_min: the lowest lo, in (0, 1]; this and the next five are the paper's
        lo_max: the highest lo, at most 1
        hi_min: the lowest hi, at least 1
        hi_max: the highest hi
        step_lo: > 0
        step_hi: > 0
        first: the bound that rises first: "hi" the paper's, "lo" the authors' code
        count: what a token that is cut gives: "value" the paper's Algorithm 1, "gradient" ours

    Metrics:
        lower (ratio): lower bound of the clipping range in this step
        upper (ratio): upper bound of the clipping range in this step
        share (share): of the loss's weight, what positive advantages have
        update (updates): number of the update within its rollout, from 0
        added (share): of the tokens that only the bounds of this step let in
        dropped (share): of the tokens that only they leave out
    """

    inert_on_policy: ClassVar[bool] = True
    needs_token_clip: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "more"

    rho: float = 0.4
    lo_min: float = 0.6
    lo_max: float = 0.9
    hi_min: float = 1.2
    hi_max: float = 3.0
    step_lo: float = 0.02
    step_hi: float = 0.05
    first: Literal["hi", "lo"] = "hi"
    count: Literal["value", "gradient"] = "value"

    def __post_init__(self) -> None:
        if not 0 < self.rho < 1:
            raise ValueError(f"rho must be in (0, 1), got {self.rho}")
        if not 0 < self.lo_min <= self.lo_max <= 1 <= self.hi_min <= self.hi_max < torch.inf:
            raise ValueError(
                "0 < lo_min <= lo_max <= 1 <= hi_min <= hi_max must hold, got "
                f"{self.lo_min}, {self.lo_max}, {self.hi_min} and {self.hi_max}"
            )
        for name in ("step_lo", "step_hi"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be positive, got {vars(self)[name]}")

    @property
    def los(self) -> list[float]:
        """All that lo can be, rising."""
        return grid(self.lo_min, self.lo_max, self.step_lo)

    @property
    def his(self) -> list[float]:
        """All that hi can be, rising."""
        return grid(self.hi_min, self.hi_max, self.step_hi)

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        memory["rollout_step"] = rollout.step
        return RolloutEffect()

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        update = batch.step - memory.get("rollout_step", batch.step)  # of the rollout, from 0
        lo, hi = memory.get("bounds", {}).get(str(update), [self.lo_min, self.hi_min])
        a = torch.where(batch.mask, batch.advantages, 0)
        ratio = torch.where(batch.mask, batch.logps.detach() - batch.old_logps, 0).exp()
        is_right = a > 0
        stock = torch.where(is_right, 1 + batch.clip_range[1], 1 - batch.clip_range[0])
        bound = torch.where(is_right, hi, lo)
        was_kept, is_kept = (torch.where(is_right, ratio <= at, ratio >= at) & (a != 0) for at in (stock, bound))
        adds, drops = is_kept & ~was_kept, was_kept & ~is_kept
        fresh = torch.where(adds, batch.logps - batch.old_logps, 0).exp()
        # with TRL's constant -A stock the value is -A r; those of tokens that stay or become constants do not matter
        loss = torch.where(adds, -a * (fresh - stock), 0)
        sums = self._sums(a, ratio)
        names = ("lower", "upper", "share")
        return Effect(
            advantages=torch.where(drops, 0, batch.advantages),
            loss=loss,
            affected=adds,
            metrics={
                "update": ratio.new_tensor(float(update)),
                "added": adds.float(),
                "dropped": drops.float(),
                **{name: Total(sums=sums, form=functools.partial(self._found, i)) for i, name in enumerate(names)},
            },
        )

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        bounds = dict(memory.get("bounds", {}))
        bounds[str(round(metrics["update"]))] = [metrics["lower"], metrics["upper"]]
        memory["bounds"] = bounds

    def _sums(self, a: Float[Tensor, "B T"], ratio: Float[Tensor, "B T"]) -> tuple[Float[Tensor, ""], ...]:
        """M at each lo, then P at each hi."""
        right, wrong = a.clamp(min=0), (-a).clamp(min=0)
        if self.count == "gradient":
            negative = [torch.where(ratio >= lo, wrong * ratio, 0).sum() for lo in self.los]
            return *negative, *(torch.where(ratio <= hi, right * ratio, 0).sum() for hi in self.his)
        return *((wrong * ratio.clamp(min=lo)).sum() for lo in self.los), *(
            (right * ratio.clamp(max=hi)).sum() for hi in self.his
        )

    def _found(self, which: int, *sums: float) -> float:
        return self.search(sums[: len(self.los)], sums[len(self.los) :])[which]

    def search(self, negative: Sequence[float], positive: Sequence[float]) -> tuple[float, float, float]:
        """(lo, hi, share) where the search ends; M at each lo and P at each hi. Without a negative token share is 1."""
        i = j = 0
        while True:
            total = positive[j] + negative[i]
            share = positive[j] / total if total else 1.0
            can_lo, can_hi = i + 1 < len(negative), j + 1 < len(positive)
            if share >= self.rho or not (can_lo or can_hi):
                return self.los[i], self.his[j], share
            if can_hi and (self.first == "hi" or not can_lo):
                j += 1
            else:
                i += 1


def grid(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to high."""
    return [low + i * step for i in range(int((high - low) / step + ROUNDING) + 1)]
