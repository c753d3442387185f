"""AEPO, arbitrary entropy (later SCOPE-RL): 2025, arXiv:2510.08141; code 597358816/AEPO and a port in axolotl"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..types import Direction, Rollout, RolloutEffect, Term
from .branch import Branch
from .response import Response
from .strategy import Asked, RolloutStrategy

Form = Literal["weigh", "replace"]
IS_AUXILIARY, NATS = "is_auxiliary", "nats"  # columns of a response
CLEARLY_BETTER = 0.05  # advantage from which the released code takes a row


@dataclass(frozen=True, kw_only=True)
class ArbitraryEntropy(RolloutStrategy):
    """Holds the entropy at `target` by training on the right answers of a few groups that are sampled hotter where it
    is too low and colder where it is too high.

    H is the mean entropy of the tokens that the other groups drew in the generation batch before. `form: weigh` (later
    versions of the paper): the auxiliary groups are sampled at T = clip(1 + target - H, coldest, hottest) times the
    loss's temperature, T = 1 in the first batch; a right answer among them gets advantage 1, a wrong one 0, and the
    loss is that of the other groups plus alpha times the mean of the auxiliary answers' own token means.
    `form: replace` (the released code): T = hottest where H <= target and else coldest, H is the mean of -log pi of
    all sampled tokens and 0 at first; of the auxiliary answers the first `most`, half as many where H > target, whose
    advantage in their group is above 0.05 get advantage 1 and count as one more ordinary row each; the others do not
    count.

    What differs here: the budget is TRL's, so the auxiliary groups take the place of ordinary ones of the same batch
    instead of being drawn beside it. They are the last prompts of each process, round(share * prompts) and at least
    one. Old log-probs are at the loss's temperature for all rows, as the method asks. TRL's KL, with `beta` above 0,
    stands on the auxiliary rows too. Terms shape the ordinary rows' advantages before the weights come over them; those
    of the auxiliary rows are as said. With answers that are never right the method does nothing.

    Args:
        form: the objective of the paper's later versions or that of the released code
        target: nats, above 0; the paper's for mathematics
        alpha: weight of the auxiliary part, and for `weigh` the share of the prompts, in (0, 1]; the port's
        coldest: times the temperature, above 0 and at most 1; the port's
        hottest: times the temperature, at least 1; the port's
        right_at: the reward from which an answer is right, for `weigh`; the port's
        share: of the prompts that are auxiliary, in (0, 1); default: alpha for `weigh`, a quarter for `replace`
        most: auxiliary answers that may be trained on, for `replace`, at least 1; the authors'

    Metrics:
        temperature (factor): of the auxiliary groups. Healthy: near 1. Else: at a bound the target is out of reach
        entropy (nats): H of this batch. Healthy: near target
        right (share): of the auxiliary answers, those that are trained on. Healthy: above 0. Else: nothing is held
    """

    takes_tools: ClassVar[bool] = False

    form: Form = "weigh"
    target: float = 0.5
    alpha: float = 1 / 64
    coldest: float = 0.8
    hottest: float = 1.2
    right_at: float = 1.0
    share: float | None = None
    most: int = 60

    def __post_init__(self) -> None:
        if self.form not in ("weigh", "replace"):
            raise ValueError(f"form must be 'weigh' or 'replace', got {self.form!r}")
        if not 0 < self.target < math.inf:
            raise ValueError(f"target must be above 0 and finite, got {self.target}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must be in (0, 1], got {self.alpha}")
        if not 0 < self.coldest <= 1 <= self.hottest < math.inf:
            raise ValueError(
                f"coldest must be in (0, 1] and hottest at least 1 and finite, got {self.coldest} and {self.hottest}"
            )
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share must be in (0, 1), got {self.share}")
        if self.most < 1:
            raise ValueError(f"most must be at least 1, got {self.most}")
        if not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward, got {self.right_at}")

    def temperature(self, entropy: float | None) -> float:
        """Of the auxiliary groups, times the loss's; `entropy` is H, None where there is none yet."""
        if self.form == "replace":
            return self.hottest if (entropy or 0.0) <= self.target else self.coldest
        return 1.0 if entropy is None else min(max(1 + self.target - entropy, self.coldest), self.hottest)

    def auxiliary(self, prompts: int) -> int:
        """Groups among so many. Refuses fewer than two prompts."""
        if prompts < 2:
            raise ValueError(
                "arbitrary_entropy samples some of the prompts of a generation batch in its own way, and on each "
                f"process there must be at least 2, got {prompts}: raise steps_per_generation or "
                "per_device_train_batch_size, or lower num_generations"
            )
        share = self.share or (self.alpha if self.form == "weigh" else 0.25)
        return min(max(1, round(share * prompts)), prompts - 1)

    def term(self) -> Term:
        return AuxiliaryRows(
            form=self.form, target=self.target, alpha=self.alpha, right_at=self.right_at, most=self.most
        )

    def nats(self, branch: Branch) -> float:
        """What a response adds to H's sum."""
        return sum(branch.entropies) if self.form == "weigh" else -sum(branch.logps)

    def __call__(self, asked: Asked) -> list[Response]:
        sampler, ordinary = asked.sampler, len(asked.prompts) - self.auxiliary(len(asked.prompts))
        temperature = self.temperature(asked.memory.get("entropy"))
        roots = sampler.begin(asked.prompts)
        groups = [[root.fork(0, asked.stream(p, i)) for i in range(asked.responses)] for p, root in enumerate(roots)]
        sampler.extend(flat(groups[:ordinary]), with_entropies=self.form == "weigh")
        sampler.extend(flat(groups[ordinary:]), temperature=temperature * sampler.temperature)
        asked.note("temperature", [temperature])
        return [
            each.response(**{IS_AUXILIARY: p >= ordinary, NATS: self.nats(each)})
            for p, group in enumerate(groups)
            for each in group
        ]


def flat(groups: Sequence[Sequence[Branch]]) -> list[Branch]:
    """The branches of all groups in one list, in their order."""
    return [each for group in groups for each in group]


@dataclass(frozen=True, kw_only=True)
class AuxiliaryRows(Term):
    """The weights of ordinary and auxiliary rows; remembers H for the batch after."""

    shapes_advantages: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "level"

    form: Form
    target: float
    alpha: float
    right_at: float
    most: int

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        device = rollout.mask.device
        auxiliary = torch.tensor([bool(row[IS_AUXILIARY]) for row in rollout.rows], device=device)
        nats = torch.tensor([float(row[NATS]) for row in rollout.rows], device=device)
        counted = ~auxiliary if self.form == "weigh" else torch.ones_like(auxiliary)
        lengths = rollout.mask.sum(dim=1)
        counted = counted & (lengths > 0)  # those that are left out of the loss have nats and no tokens
        total, tokens = rollout.total(torch.stack([nats[counted].sum(), lengths[counted].sum().to(nats)])).tolist()
        before, memory["entropy"] = memory.get("entropy", 0.0), total / max(tokens, 1)
        if self.form == "weigh":
            trained = auxiliary & (rollout.rewards >= self.right_at)
            factors = self.weighed(rollout, auxiliary)
        else:
            trained = self.first(rollout, auxiliary, self.most // (2 if before > self.target else 1))
            factors = torch.where(auxiliary, 0.0, 1.0) + trained.float()
            factors = factors * evened(rollout, ~auxiliary | trained)
        own = rollout.advantages
        of_row = [each if own.dim() == 1 else each[:, None] for each in (auxiliary, trained, factors)]
        is_auxiliary, is_trained, factor = of_row
        shaped = torch.where(is_auxiliary, is_trained.to(own), own) * factor.to(own)
        right = rollout.total(torch.stack([trained.sum(), auxiliary.sum()]).float())
        return RolloutEffect(
            advantages=shaped,
            metrics={"entropy": nats.new_tensor(memory["entropy"]), "right": right[0] / right[1].clamp(min=1)},
        )

    def weighed(self, rollout: Rollout, auxiliary: Bool[Tensor, "N"]) -> Float[Tensor, "N"]:
        """So that the loss's own mean over all rows is the mean over the ordinary ones, and alpha times the mean of the
        auxiliary ones' token means."""
        lengths = rollout.mask.sum(dim=1).clamp(min=1)
        if rollout.loss_mean == "sequences":
            all_rows, rows = rollout.total(torch.stack([auxiliary.new_ones(len(auxiliary)).sum(), auxiliary.sum()]))
            return torch.where(auxiliary, self.alpha * all_rows / rows, evened(rollout, ~auxiliary))
        tokens, rows = rollout.total(torch.stack([rollout.mask.sum(), auxiliary.sum()]))
        return torch.where(auxiliary, self.alpha * tokens / (rows * lengths), evened(rollout, ~auxiliary))

    def first(self, rollout: Rollout, auxiliary: Bool[Tensor, "N"], most: int) -> Bool[Tensor, "N"]:
        """The first so many, of all processes, that are better than their group."""
        own = rollout.advantages if rollout.advantages.dim() == 1 else rollout.advantages.amax(dim=1)
        better = rollout.everywhere(auxiliary & (own > CLEARLY_BETTER))
        return rollout.here(better & (better.cumsum(dim=0) <= most))


def evened(rollout: Rollout, rows: Bool[Tensor, "N"]) -> Float[Tensor, ""]:
    """By what the rows' losses are multiplied so that the loss's mean over all rows is that over these."""
    weights = torch.ones_like(rows, dtype=torch.float32)
    if rollout.loss_mean == "tokens":
        weights = rollout.mask.sum(dim=1).float()
    everything, theirs = rollout.total(torch.stack([weights.sum(), weights[rows].sum()]))
    return everything / theirs.clamp(min=1)
