"""REPO-R, Entropy-Preserving Reinforcement Learning: 2026, arXiv:2603.11682"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..equations.functional import ratio
from ..types import Direction, Effect, Metric, Term, TokenBatch, Total


@dataclass(frozen=True, kw_only=True)
class Repo(Term):
    """Takes a multiple of log p off the advantage: rare right tokens gain, rare wrong ones are pushed down less.

    Entropy falls because A and log p rise together. l is log p of the policy as it is, a constant:

        A > 0: A' = max(A (1 - zeta l), 0)      A < 0: A' = min(A (1 + zeta l), 0)

    zeta > 0 raises the entropy, zeta < 0 lowers it; no sign flips and A = 0 stays. Right tokens gain 1 + zeta H on
    average and wrong ones lose it, which `right_factor` and `wrong_factor` log; the form "centred" has no such drift.
    With `controls` zeta doubles where the entropy is on the wrong side of the target for its sign and halves where not;
    below `minimum` it changes its sign. Doubling has no damping: near the target zeta walks over 0 every few steps.

    Not verified: the order of the controller's branches at `minimum`, and the paper's text; ADAPO is not here.

    Args:
        zeta: in 1 / nats, not 0: at the first step, or fixed; the value of a port's example
        form: "centred" is the paper's general one, A' = A - zeta (l + H), which may flip signs; without `controls`
        controls: whether zeta follows the entropy of each optimiser step
        target: nats; None: the entropy of the first step, as in the paper
        minimum: of |zeta|, > 0; the port's
        maximum: of |zeta|; the port's

    Metrics:
        zeta (1/nats): the strength of this step. Healthy: below `maximum`. Else: at it the target is out of reach
        entropy (nats): mean token entropy of the loss's own pass, which the controller reads
        right_factor (factor): mean factor of the advantages of right tokens. Healthy: near 1. Else: they are raised or
            lowered as a whole
        wrong_factor (factor): the same of wrong ones
    """

    zeta: float = 0.001
    form: Literal["repo_r", "centred"] = "repo_r"
    controls: bool = True
    target: float | None = None
    minimum: float = 1e-4
    maximum: float = 0.05

    @property
    def seeks(self) -> Direction | None:  # pyright: ignore[reportIncompatibleVariableOverride] (one for each way)
        if self.controls:
            return "level"
        return "more" if self.zeta > 0 else "less"

    def __post_init__(self) -> None:
        if not 0 < abs(self.zeta) < math.inf:
            raise ValueError(f"zeta must be finite and not 0, got {self.zeta}")
        if self.form == "centred" and self.controls:
            raise ValueError("the form 'centred' has a fixed zeta: set controls: false")
        if self.target is not None and not self.target >= 0:
            raise ValueError(f"target must not be negative, got {self.target}")
        if self.controls and not 0 < self.minimum <= abs(self.zeta) <= self.maximum < math.inf:
            raise ValueError(
                f"0 < minimum <= |zeta| <= maximum must hold, got minimum {self.minimum}, zeta {self.zeta}, maximum "
                f"{self.maximum}"
            )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        zeta, a = memory.get("zeta", self.zeta) if self.controls else self.zeta, batch.advantages
        logps = torch.where(batch.mask, batch.logps.detach(), 0)
        if self.form == "centred":
            entropy = torch.where(batch.mask, batch.entropy.detach(), 0)
            shaped = torch.where(a != 0, a - zeta * (logps + entropy), a)
        else:
            factor = torch.where(a > 0, 1 - zeta * logps, 1 + zeta * logps)
            shaped = torch.where(a != 0, a * factor.clamp(min=0), a)
        shaped = torch.where(batch.mask, shaped, a)
        metrics: dict[str, Metric] = {"zeta": logps.new_tensor(zeta), "entropy": batch.entropy.detach()}
        for name, side in (("right_factor", batch.mask & (a > 0)), ("wrong_factor", batch.mask & (a < 0))):
            sums = tuple(torch.where(side, x, 0).sum() for x in (shaped, a))
            metrics[name] = Total(sums=sums, form=ratio)
        return Effect(advantages=shaped, metrics=metrics)

    def on_step(self, metrics: Mapping[str, float], memory: dict) -> None:
        entropy = metrics["entropy"]
        if not self.controls or not 0 < entropy < math.inf:  # 0: a step without tokens
            return
        target = memory.setdefault("target", entropy) if self.target is None else self.target
        memory["zeta"] = doubled_or_halved(
            memory.get("zeta", self.zeta), entropy, target, minimum=self.minimum, maximum=self.maximum
        )


def doubled_or_halved(zeta: float, entropy: float, target: float, *, minimum: float, maximum: float) -> float:
    """The next zeta: twice as large where its sign is right for the side of the target, else half; in the bounds."""
    if entropy == target:
        return zeta
    size = abs(zeta) * (2 if (zeta > 0) == (entropy < target) else 0.5)
    if size < minimum:
        return -math.copysign(minimum, zeta)
    return math.copysign(min(size, maximum), zeta)
