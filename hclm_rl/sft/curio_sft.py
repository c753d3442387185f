"""CurioSFT, adaptive self-distillation: Wang et al., 2026, arXiv:2602.02244"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..equations.temperature import COLDEST, entropy_of, temperature_at_entropy
from .method import Losses, SftBatch, SftMethod


@dataclass(frozen=True, kw_only=True)
class CurioSft(SftMethod):
    """Pulls each label towards a softer copy of the model itself, softened where the model is uncertain already.

    loss_t = -l_t + alpha (l_t - q_t)^2 / 2, l_t = log p(label), q_t = log softmax(z / tau_t)[label] of the teacher,
    without gradient. H over the `top` largest logits of the teacher, renormalised; it may rise by
    most_rise sigmoid(kappa (H - centre)); tau_t in [coldest, hottest] is where it has, by bisection. Tokens whose whole
    distribution has an entropy of at most `gate` take the coldest. The pull works against the push of plain SFT once
    the student is above the teacher, and cancels it at l = q + 1 / alpha.

    The teacher follows closely: after every `sync_every` optimiser steps it is (1 - new_weight) of itself and
    new_weight of the student, just before that step's update. (The authors count forward passes, which is the same
    without gradient accumulation.) It costs a second copy of the weights that are trained and a forward pass; with LoRA
    the copy is the adapter's. Only the label's log-prob is pulled: this is no KL to the softened teacher.

    Args:
        alpha: strength, at least 0; 0 is plain SFT; the authors' script
        most_rise: nats, at least 0; the authors' script
        kappa: per nat, at least 0; the authors' script
        centre: nats; the authors' script
        coldest: temperature, more than 0; the authors' script
        hottest: temperature, at least `coldest`; the authors' script
        top: words whose entropy decides, at least 2; the authors' script
        gate: nats, at least 0; the authors' script
        sync_every: optimiser steps, at least 1; the authors' script
        new_weight: of the student in the new teacher, in [0, 1]; the authors' script: nearly a copy, no slow average
    """

    alpha: float = 1.0
    most_rise: float = 0.5
    kappa: float = 2.0
    centre: float = 1.2
    coldest: float = 1.1
    hottest: float = 1.5
    top: int = 512
    gate: float = 0.03
    sync_every: int = 5
    new_weight: float = 0.99

    def __post_init__(self) -> None:
        for name in ("alpha", "most_rise", "kappa", "gate"):
            if not (0 <= vars(self)[name] < math.inf):
                raise ValueError(f"{name} must be at least 0 and finite, got {vars(self)[name]}")
        if not math.isfinite(self.centre):
            raise ValueError(f"centre must be finite, got {self.centre}")
        if not (0 < self.coldest <= self.hottest < math.inf):
            raise ValueError(f"0 < coldest <= hottest must hold, got {self.coldest} and {self.hottest}")
        if self.top < 2 or self.sync_every < 1:
            raise ValueError(f"top must be at least 2 and sync_every at least 1, got {self.top} and {self.sync_every}")
        if not 0 <= self.new_weight <= 1:
            raise ValueError(f"new_weight must be in [0, 1], got {self.new_weight}")

    def temperatures(self, logps: Float[Tensor, "M V"]) -> Float[Tensor, "M"]:
        """The tau of each position; logits do as well as log-probs."""
        largest = logps.float().topk(min(self.top, logps.shape[1]), dim=1).values
        entropy = entropy_of(largest)
        target = entropy + self.most_rise * torch.sigmoid(self.kappa * (entropy - self.centre))
        tau = temperature_at_entropy(largest, target, self.coldest, self.hottest, steps=20)
        return torch.where(entropy_of(logps) <= self.gate, max(self.coldest, COLDEST), tau)

    def of_teacher(self, logps: Float[Tensor, "M V"], labels: Int[Tensor, "M"]) -> dict[str, Float[Tensor, "M"]]:
        """Log-probs of the labels under the softened teacher, and the temperatures that soften it."""
        tau = self.temperatures(logps)
        soft = (logps.float() / tau.unsqueeze(1)).log_softmax(dim=1)
        return {"softened": soft.gather(1, labels.unsqueeze(1)).squeeze(1), "temperature": tau}

    def __call__(self, batch: SftBatch) -> Losses:
        pull = 0.5 * self.alpha * (batch.logps - batch.columns["softened"]).square()
        pull = torch.where(batch.mask, pull, 0.0)
        labels = batch.mask.sum().clamp(min=1)
        return Losses(
            losses=pull - batch.logps,
            metrics={
                "pull": pull.detach().sum() / labels,
                "temperature": torch.where(batch.mask, batch.columns["temperature"], 0.0).sum() / labels,
            },
        )
