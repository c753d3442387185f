"""Terms from left to right: each sees the advantages that the terms before it left."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..equations.functional import per_token
from ..types import Metric, Rollout, RolloutEffect, Term, TokenBatch
from .coefficients import Coefficient


@dataclass(frozen=True, kw_only=True)
class Link:
    """A term in a chain: its name in logs and checkpoints, and its strength over time.

    The coefficient interpolates; 0 is absence, exactly. For advantages and rewards it is the share of the way from
    stock to shaped, for a loss its weight. A term that gives only metrics is a diagnostic.
    """

    name: str
    term: Term
    coef: Coefficient

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"the name of an entropy term must be text without '/', got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class RolloutOutcome:
    """What all links together made of a generation batch."""

    rewards: Tensor  # (N,), as stage 2 sees them
    group_rewards: Tensor  # (N, G)
    advantages: Tensor | None  # (N,) or (N, T); None where no link changed them
    columns: dict[str, Tensor]  # "<link>/<name>": (N,) or (N, T)
    shared: dict[str, Tensor]  # "<link>/<name>": any shape
    metrics: dict[str, Metric]
    affected: dict[str, Tensor]  # link: (N, T) bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all links together made of a micro-batch."""

    advantages: Tensor | None  # (B, T); None where no link changed them
    losses: dict[str, Tensor]  # link: (B, T) or (), before the link's coefficient; none where that is 0
    metrics: dict[str, Metric]
    on_hidden_gradient: dict[str, Callable[[Tensor], Mapping[str, Metric]]] = field(default_factory=dict)


class NotFinite(RuntimeError):
    """A term produced a NaN or an infinity: the run stops before the weights see it."""


def require_finite(value: Tensor, mask: Tensor | None, link: str, step: int, quantity: str) -> None:
    """Raises NotFinite with the link, the step and the quantity; what the mask leaves out is not looked at."""
    if not value.is_floating_point():
        return
    where = value if mask is None or value.shape != mask.shape else torch.where(mask, value, 0)
    is_bad = ~torch.isfinite(where.detach())
    if is_bad.any():
        raise NotFinite(
            f"the entropy term '{link}' produced {int(is_bad.sum())} values that are not finite in its {quantity} at "
            f"step {step}; training stopped before they reached the weights, and the last checkpoint is intact"
        )


def of_link(values: Mapping[str, Tensor], link: str) -> dict[str, Tensor]:
    """The part of {"<link>/<name>": value} that belongs to one link, by its own names."""
    return {name.removeprefix(f"{link}/"): value for name, value in values.items() if name.startswith(f"{link}/")}


def blend(stock: Tensor, shaped: Tensor, coef: float) -> Tensor:
    """stock at coef 0 and shaped at coef 1, exactly; (N,) and (N, T) mix."""
    if coef in (0.0, 1.0):
        return shaped if coef else stock
    if stock.dim() != shaped.dim():
        stock, shaped = (x if x.dim() == 2 else x.unsqueeze(1) for x in (stock, shaped))
    return torch.lerp(stock, shaped.to(stock.dtype), coef)


def with_rewards(
    rollout: Rollout,
    shaped: Tensor,
    is_left_out: Tensor | None,
    coef: float,
    renormalise: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Rollout:
    """The rollout with shaped rewards, and with the advantages that the base algorithm has from them."""
    rewards = blend(rollout.rewards, shaped, coef)
    if is_left_out is not None:
        rewards = rewards.masked_fill(is_left_out, torch.nan)
    group_rewards = rollout.everywhere(rewards).view(-1, rollout.group_rewards.size(1))[rollout.group]
    advantages, scale = renormalise(rewards)
    return replace(rollout, rewards=rewards, group_rewards=group_rewards, advantages=advantages, reward_scale=scale)


def with_advantages(rollout: Rollout, shaped: Tensor, coef: float) -> Rollout:
    """The rollout with shaped advantages; those of padding stay."""
    shaped = blend(rollout.advantages, shaped.detach(), coef)
    if shaped.dim() == 2:
        shaped = torch.where(rollout.mask, shaped, per_token(rollout.advantages, rollout.mask))
    return replace(rollout, advantages=shaped)


@dataclass(frozen=True)
class Chain:
    """The links of a run, in order."""

    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        names = [link.name for link in self.links]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two entropy terms are called '{name}'; give one of them another name, as in "
                    f"`- {name}: {{name: {name}_2}}`"
                )

    @property
    def needs_scores(self) -> bool:
        """Whether a term reads, in stage 1, what the scoring pass gives."""
        return any(link.term.needs_scores or link.coef.needs_entropy for link in self.links)

    @property
    def needs_hidden(self) -> list[str]:
        """Names of the links that read hidden states."""
        return [link.name for link in self.links if link.term.needs_hidden]

    @property
    def needs_attention(self) -> list[str]:
        """Names of the links that read attention entropies."""
        return [link.name for link in self.links if link.term.needs_attention]

    @property
    def needs_vocab(self) -> list[str]:
        """Names of the links that read the whole next-token distribution, in either stage."""
        return [link.name for link in self.links if link.term.needs_vocab or link.term.needs_vocab_gradient]

    @property
    def needs_vocab_gradient(self) -> list[str]:
        """Names of the links that read it where there is a gradient."""
        return [link.name for link in self.links if link.term.needs_vocab_gradient]

    @property
    def needs_rescoring(self) -> list[str]:
        """Names of the links that have the policy score other texts."""
        return [link.name for link in self.links if link.term.needs_rescoring]

    def on_rollout(
        self,
        rollout: Rollout,
        memories: Mapping[str, dict],
        coefs: Mapping[str, float],
        generators: Callable[[str], torch.Generator],
        renormalise: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> RolloutOutcome:
        """Stage 1. `renormalise`: this process's rewards (N,) -> the base algorithm's advantages and scale, (N,)."""
        stock, last_shaper = rollout.advantages, None
        columns, shared, metrics, affected = {}, {}, {}, {}
        for link in self.links:
            effect = link.term.on_rollout(replace(rollout, generator=generators(link.name)), memories[link.name])
            coef, before = coefs[link.name], rollout.advantages
            if coef:
                self._require_finite_rollout(effect, rollout, link.name)
            if effect.rewards is not None and coef:
                if last_shaper is not None:
                    raise ValueError(
                        f"'{link.name}' shapes rewards, which sets the advantages anew and would undo '{last_shaper}' "
                        "before it; put terms that shape rewards first"
                    )
                rollout = with_rewards(rollout, effect.rewards, effect.is_left_out, coef, renormalise)
            if effect.advantages is not None and coef:
                rollout, last_shaper = with_advantages(rollout, effect.advantages, coef), link.name
            changed = per_token(rollout.advantages, rollout.mask) != per_token(before, rollout.mask)
            affected[link.name] = changed & rollout.mask
            columns |= {f"{link.name}/{name}": column.detach() for name, column in effect.columns.items()}
            shared |= {f"{link.name}/{name}": value.detach() for name, value in effect.shared.items()}
            metrics |= {f"{link.name}/{name}": metric for name, metric in effect.metrics.items()}
        return RolloutOutcome(
            rewards=rollout.rewards,
            group_rewards=rollout.group_rewards,
            advantages=None if rollout.advantages is stock else rollout.advantages,
            columns=columns,
            shared=shared,
            metrics=metrics,
            affected=affected,
        )

    def __call__(
        self,
        batch: TokenBatch,
        memories: Mapping[str, dict],
        coefs: Mapping[str, float],
        generators: Callable[[str], torch.Generator],
        affected_before: Mapping[str, Tensor],
    ) -> Outcome:
        """Stage 2. `batch.columns` and `batch.shared` hold those of all links; each term gets its own."""
        columns, shared, stock = batch.columns, batch.shared, batch.advantages
        losses, metrics, callbacks = {}, {}, {}
        for link in self.links:
            name, coef = link.name, coefs[link.name]
            own = replace(batch, columns=of_link(columns, name), shared=of_link(shared, name), coef=coef)
            own = replace(own, generator=generators(name))
            effect = link.term(own, memories[name])
            affected = affected_before[name]
            if effect.advantages is not None and coef:
                require_finite(effect.advantages, batch.mask, name, batch.step, "advantages")
                shaped = blend(batch.advantages, effect.advantages.detach(), coef)
                # the padding keeps its advantages: TRL multiplies its losses by the mask, and NaN * 0 is NaN
                shaped = torch.where(batch.mask, shaped, batch.advantages)
                affected = affected | (shaped != batch.advantages)
                batch = replace(batch, advantages=shaped)
            if effect.loss is not None and coef:
                require_finite(effect.loss, batch.mask, name, batch.step, "loss")
                losses[name] = effect.loss
                affected = affected | (effect.loss.detach() != 0)
                if effect.affected is not None:
                    affected = affected | effect.affected
            metrics |= {f"{name}/{key}": metric for key, metric in effect.metrics.items()}
            metrics[f"{name}/affected"] = (affected & batch.mask).float()
            if effect.on_hidden_gradient is not None:
                callbacks[name] = effect.on_hidden_gradient
        return Outcome(
            advantages=None if batch.advantages is stock else batch.advantages,
            losses=losses,
            metrics=metrics,
            on_hidden_gradient=callbacks,
        )

    @staticmethod
    def _require_finite_rollout(effect: RolloutEffect, rollout: Rollout, link: str) -> None:
        quantities = {"rewards": effect.rewards, "advantages": effect.advantages}
        quantities |= {f"column '{name}'": column for name, column in effect.columns.items()}
        quantities |= {f"shared '{name}'": value for name, value in effect.shared.items()}
        for quantity, value in quantities.items():
            if value is not None:
                counts = ~rollout.rewards.isnan() if quantity == "rewards" else rollout.mask
                counts = None if quantity.startswith("shared") else counts
                require_finite(value, counts, link, rollout.step, quantity)
                if quantity.startswith("column") and value.size(0) != rollout.mask.size(0):
                    raise ValueError(
                        f"the entropy term '{link}' attached {quantity} with {value.size(0)} rows to a batch of "
                        f"{rollout.mask.size(0)}; what is not one row a response belongs into `shared`"
                    )
