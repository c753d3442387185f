"""Stage 1 of the chain for another trainer, in the one process that sees the whole generation batch."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..chain.chain import Chain
from ..chain.door import moved, strength
from ..chain.generators import link_generator
from ..chain.metrics import StepMetrics
from ..chain.state import ChainState
from ..equations.functional import per_token
from ..types import Rollout
from .absent import Absent
from .groups import Groups
from .told import AFFECTED, COLUMN, GROUP_REWARDS, REWARDS, Told

# rewards (M,) of some rows of the batch, and which: what the trainer makes of them, advantages and scale, (M,) each
Renormalise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A whole generation batch as another trainer has it: all its rows, in its own order."""

    ids: Int[Tensor, "N T"]
    mask: Bool[Tensor, "N T"]
    rewards: Float[Tensor, "N"]
    advantages: Float[Tensor, "N T"]
    uid: Sequence[Hashable]  # of the prompt of each row
    counts: Sequence[bool]  # False: the trainer filled its batch up with this row
    scale: Float[Tensor, "N"]  # what centred rewards were divided by
    logps: Float[Tensor, "N T"] | None = None
    entropy: Float[Tensor, "N T"] | None = None
    no_entropy: str = ""  # with log-probs and without entropies: what a term that reads these is told
    ref_logps: Float[Tensor, "N T"] | None = None
    beta: float = 0.0
    loss_mean: Literal["tokens", "sequences"] = "tokens"
    prompts: Sequence = ()
    texts: Sequence = ()
    tokenizer: Any = None


@dataclass(frozen=True, kw_only=True)
class Shaped:
    """What stage 1 made of a generation batch, in the trainer's order of rows."""

    advantages: Tensor | None  # (N, T); None where no link changed them
    rows: dict[str, Tensor]  # what travels with the rows: (N,), (N, T) or (N, G)
    told: Told
    metrics: dict[str, float]


class Alone:
    """Stands for accelerate's Accelerator where one process sees everything."""

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        """The value, of any shape, as one process has it."""
        return value

    def pad_across_processes(self, value: Tensor, **_: object) -> Tensor:
        """The value, of any shape, as one process has it."""
        return value

    def gather(self, value: Tensor) -> Tensor:
        """The value, of any shape, as one process has it."""
        return value


@dataclass
class FirstStage:
    """Stage 1 and what it remembers between steps."""

    chain: Chain
    state: ChainState
    seed: int = 0

    @classmethod
    def of(cls, chain: Chain, seed: int = 0) -> "FirstStage":
        """That of a chain at the start of a run."""
        return cls(chain=chain, state=ChainState.fresh(chain), seed=seed)

    # long: what comes in and what goes out, each field once
    def __call__(
        self, given: Generated, renormalise: Renormalise, *, step: int, progress: float, share: float = 1.0
    ) -> Shaped:
        groups = Groups.of(given.uid, given.counts)
        rollout = rollout_of(given, groups, step=step, progress=progress)
        entropy = mean_entropy(given)
        coefs = {
            link.name: strength(link.coef, link.name, progress, self.state.controller[link.name], entropy, step)
            for link in self.chain.links
        }
        outcome = self.chain.on_rollout(
            rollout,
            self.state.memory,
            coefs,
            functools.partial(link_generator, self.seed, step, "rollout"),
            functools.partial(renormalised, groups, renormalise),
        )
        for link in self.chain.links:
            if entropy is not None:
                before = self.state.controller[link.name]
                self.state.controller[link.name] = moved(link.coef, link.name, entropy, before, step)
        seen = StepMetrics()
        for name, metric in outcome.metrics.items():
            seen.add(name, metric, rollout.mask)
        metrics = seen.flush(Alone())  # pyright: ignore[reportArgumentType]  (stands for one)
        metrics |= {f"{name}/coef": coef for name, coef in coefs.items()}
        nothing = given.rewards.new_zeros
        rows = {
            REWARDS: groups.back(outcome.rewards, given.rewards),
            GROUP_REWARDS: groups.back(outcome.group_rewards, nothing(len(given.rewards), groups.size)),
        }
        for name, value in outcome.affected.items():
            rows[AFFECTED + name] = groups.back(value, torch.zeros_like(given.mask))
        for name, value in outcome.columns.items():
            rows[COLUMN + name] = groups.back(value, value.new_zeros(len(given.rewards), *value.shape[1:]))
        shaped = None
        if outcome.advantages is not None:
            shaped = groups.back(per_token(outcome.advantages, rollout.mask), given.advantages)
            shaped = torch.where(given.mask, shaped, given.advantages)
        told = Told(
            step=step,
            progress=progress,
            coefs=coefs,
            shared=outcome.shared,
            memory=self.state.memory,
            share=share,
            seed=self.seed,
            masks=tuple(name for name, value in rows.items() if value.dtype == torch.bool),
        )
        return Shaped(advantages=shaped, rows=rows, told=told, metrics=metrics)


def mean_entropy(given: Generated) -> float | None:
    """Of the tokens that count, at sampling; None where it is not known or nothing counts."""
    if given.entropy is None or not given.mask.any():
        return None
    mean = given.entropy[given.mask].mean().item()
    return mean if math.isfinite(mean) else None


def rollout_of(given: Generated, groups: Groups, *, step: int, progress: float) -> Rollout:
    """The batch as terms see it: group by group, with empty places where a group is smaller than the others."""

    def placed(values: Tensor | None) -> Tensor | None:
        return None if values is None else groups.placed(values, 0)

    rewards, logps, entropy = groups.placed(given.rewards, torch.nan), placed(given.logps), placed(given.entropy)
    if logps is not None and entropy is None:
        entropy = Absent.like(logps, given.no_entropy)
    number = groups.number
    return Rollout(
        ids=groups.placed(given.ids, 0),
        mask=groups.placed(given.mask, False),
        advantages=groups.placed(given.advantages, 0),
        rewards=rewards,
        reward_parts=rewards.unsqueeze(1),
        group_rewards=rewards.view(-1, groups.size)[number],
        group=number,
        reward_scale=groups.placed(given.scale, 1),
        logps=logps,
        entropy=entropy,
        ref_logps=placed(given.ref_logps),
        beta=given.beta,
        loss_mean=given.loss_mean,
        prompts=groups.listed(given.prompts),
        texts=groups.listed(given.texts),
        tokenizer=given.tokenizer,
        progress=progress,
        step=step,
    )


def renormalised(groups: Groups, renormalise: Renormalise, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Shaped rewards, place by place, to the trainer's advantages and scale; unscored places have no part in it.

    All are (N,), N the places of the groups.
    """
    has_part = (groups.row >= 0).to(rewards.device) & ~rewards.isnan()
    advantages, scale = torch.zeros_like(rewards), torch.ones_like(rewards)
    if has_part.any():
        rows = groups.row.to(rewards.device)[has_part]
        advantages[has_part], scale[has_part] = renormalise(rewards[has_part], rows)
    return advantages, scale
