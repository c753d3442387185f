"""Stage 2 of the chain for another trainer, on a micro-batch of one worker; it keeps nothing between steps."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..chain.chain import Chain, Outcome
from ..chain.finite import Watch
from ..chain.generators import link_generator
from ..equations.selections import outside_clip
from ..types import TokenBatch, Total
from .told import AFFECTED, COLUMN, GROUP_REWARDS, REWARDS, Told


class Kept(dict):
    """A term's memory as the workers get it: what is written here would be lost with the step."""

    def refuse(self, *_: object, **__: object) -> NoReturn:
        """Refuses any change."""
        raise ValueError("its stage 2 writes into its memory, which under this trainer is a copy: only stage 1 may")

    __setitem__ = __delitem__ = __ior__ = refuse
    setdefault = update = pop = popitem = clear = refuse  # pyright: ignore[reportAssignmentType]  (whatever they take)


def token_batch(
    told: Told,
    rows: Mapping[str, Tensor],
    *,
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ids: Int[Tensor, "B T"],
    clip_range: tuple[float, float] = (0.2, 0.2),
    clips: bool = True,
    ref_logps: Float[Tensor, "B T"] | None = None,
) -> TokenBatch:
    """The micro-batch as terms see it. `rows`: (B, T) or (B,), of stage 1; `clips`: whether the loss clips tokens."""
    empty = advantages.new_full((len(mask),), torch.nan)
    device = advantages.device
    is_clipped = None
    if clips:
        ratio = torch.where(mask, logps.detach() - old_logps, 0).exp()
        is_clipped = outside_clip(ratio, advantages, mask, clip_range)
    return TokenBatch(
        ids=ids,
        mask=mask,
        logps=logps,
        old_logps=old_logps,
        entropy=entropy,
        advantages=advantages,
        ref_logps=ref_logps,
        rewards=rows.get(REWARDS, empty),
        group_rewards=rows.get(GROUP_REWARDS, empty.unsqueeze(1)),
        columns={name.removeprefix(COLUMN): value for name, value in rows.items() if name.startswith(COLUMN)},
        shared={name: value.to(device) for name, value in told.shared.items()},
        clip_range=clip_range,
        is_clipped=is_clipped,
        progress=told.progress,
        step=told.step,
        share=told.share,
    )


def second_stage(
    chain: Chain, told: Told, batch: TokenBatch, rows: Mapping[str, Tensor], micro_batch: int = 0
) -> Outcome:
    """Stage 2 on a micro-batch; raises where a term made what is not finite, or writes into its memory.

    `rows` are those of stage 1, (B, T) or (B,).
    """
    memory = {link.name: Kept(told.memory.get(link.name, {})) for link in chain.links}
    nothing = torch.zeros_like(batch.mask)
    affected = {link.name: rows.get(AFFECTED + link.name, nothing).bool() for link in chain.links}
    watch = Watch()
    with torch.autocast(batch.logps.device.type, enabled=False):
        outcome = chain(
            batch,
            memory,
            told.coefs,
            functools.partial(link_generator, told.seed, told.step, f"micro-batch {micro_batch}"),
            affected,
            watch,
        )
    watch.require_finite(batch.step)
    if outcome.advantages is not None:
        # what a trainer multiplies by its mask must be finite in the padding too
        outcome = replace(outcome, advantages=torch.where(batch.mask, outcome.advantages, 0))
    return outcome


def logged(outcome: Outcome, mask: Tensor) -> dict[str, tuple[float, Literal["token", "batch"]]]:
    """Each metric of a micro-batch: a sum over its tokens ("token"), or a value of its own ("batch").

    `mask` is (B, T).
    """
    found: dict[str, tuple[float, Literal["token", "batch"]]] = {}
    for name, metric in outcome.metrics.items():
        if isinstance(metric, Total):
            found[name] = metric.form(*(value.item() for value in metric.sums)), "batch"
        elif isinstance(metric, Tensor) and metric.dim() == 2:
            found[name] = torch.where(mask, metric.detach().float(), 0).sum().item(), "token"
        elif isinstance(metric, Tensor):
            found[name] = metric.item(), "batch"
    return found


def added(outcome: Outcome, told: Told, of_tokens: Callable[[Tensor], Tensor], of_batch: float) -> Tensor | None:
    """The links' losses times their coefficients. `of_tokens`: a (B, T) loss to its share of the step's mean.

    `of_batch`: this micro-batch's share of the step, for a loss that is () already.
    """
    shares = [
        told.coefs[link] * (loss * of_batch if loss.dim() == 0 else of_tokens(loss))
        for link, loss in outcome.losses.items()
    ]
    return sum(shares[1:], shares[0]) if shares else None
