"""Terms from left to right: each sees the advantages that the terms before it left."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..equations.functional import per_token
from ..types import Metric, Rollout, RolloutEffect, Term, TokenBatch
from .coefficients import Coefficient
from .door import check_effect, check_rollout_effect, named
from .finite import Watch


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
    shapers: tuple[str, ...] = ()  # links that had a hand in the advantages


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all links together made of a micro-batch."""

    advantages: Tensor | None  # (B, T); None where no link changed them
    losses: dict[str, Tensor]  # link: (B, T) or (), before the link's coefficient; none where that is 0
    metrics: dict[str, Metric]
    on_hidden_gradient: dict[str, Callable[[Tensor], Mapping[str, Metric]]] = field(default_factory=dict)
    shapers: tuple[str, ...] = ()  # links that had a hand in the advantages


def of_link(values: Mapping[str, Tensor], link: str) -> dict[str, Tensor]:
    """The part of {"<link>/<name>": value of any shape} that belongs to one link, by its own names."""
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
    rewards: Tensor,
    is_left_out: Tensor | None,
    renormalise: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Rollout:
    """The rollout with shaped rewards (N,), and with the advantages that the base algorithm has from them."""
    if is_left_out is not None:
        rewards = rewards.masked_fill(is_left_out, torch.nan)
    group_rewards = rollout.everywhere(rewards).view(-1, rollout.group_rewards.size(1))[rollout.group]
    advantages, scale = renormalise(rewards)
    return replace(rollout, rewards=rewards, group_rewards=group_rewards, advantages=advantages, reward_scale=scale)


def with_advantages(rollout: Rollout, shaped: Tensor) -> Rollout:
    """The rollout with shaped advantages, (N,) or (N, T); those of padding stay."""
    if shaped.dim() == 2:
        shaped = torch.where(rollout.mask, shaped, per_token(rollout.advantages, rollout.mask))
    return replace(rollout, advantages=shaped)


def left_by(
    link: str,
    effect: RolloutEffect,
    rollout: Rollout,
    coef: float,
    shapers: list[tuple[str, bool]],
    renormalise: Callable[[Tensor], tuple[Tensor, Tensor]],
    watch: Watch,
) -> Rollout:
    """The rollout as a link leaves it; `shapers`: (link, whether of advantages) of those before, and then this one.

    Refuses rewards that are shaped behind advantages.
    """
    for name, column in effect.columns.items():
        watch.note(link, f"column '{name}'", column, rollout.mask)
    for name, value in effect.shared.items():
        watch.note(link, f"shared '{name}'", value)
    if effect.rewards is not None:
        last = next((name for name, is_of_advantages in reversed(shapers) if is_of_advantages), None)
        if last is not None:
            raise ValueError(
                f"'{link}' shapes rewards, which sets the advantages anew and would undo '{last}' "
                "before it; put terms that shape rewards first"
            )
        rewards = blend(rollout.rewards, effect.rewards, coef)
        watch.note(link, "rewards", rewards, ~rollout.rewards.isnan(), coef)
        rollout = with_rewards(rollout, rewards, effect.is_left_out, renormalise)
    if effect.advantages is not None:
        rollout = with_advantages(rollout, blend(rollout.advantages, effect.advantages.detach(), coef))
        watch.note(link, "advantages", rollout.advantages, rollout.mask, coef)
    if effect.rewards is not None or effect.advantages is not None:
        shapers.append((link, effect.advantages is not None))
    return rollout


@dataclass(frozen=True)
class Chain:
    """The links of a run, in order.

    Metrics:
        <link>/coef (coefficient): strength of the link at this step, as its number, schedule or controller has it; a
            gauge has none
        <link>/affected (share): of the response tokens that the link changed; not logged of a gauge. Healthy: above 0,
            but for floors that hold. Else: after 50 steps at 0 you are warned: the method does nothing in this setting,
            as several published ones do with one update per rollout
    """

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
    def needs_sampled_states(self) -> list[str]:
        """Names of the links whose stage 1 reads the sampling policy's states, or what the head makes of them."""
        return [
            link.name
            for link in self.links
            if link.term.needs_vocab
            or (
                link.term.needs_hidden
                and type(link.term).on_rollout is not Term.on_rollout
                and not link.term.sampled_moments()
            )
        ]

    @property
    def sampled_moments(self) -> list[Callable[..., Tensor]]:
        """Of which rows, from states (n, D) to (n, D), the first stages read the moments or means alone, each once."""
        return list(dict.fromkeys(each for link in self.links for each in link.term.sampled_moments()))

    @property
    def needs_attention(self) -> list[str]:
        """Names of the links that read attention entropies."""
        return [link.name for link in self.links if link.term.needs_attention]

    @property
    def needs_vocab(self) -> list[str]:
        """Names of the links that read the whole next-token distribution, in either stage."""
        return [link.name for link in self.links if link.term.needs_vocab or link.term.needs_vocab_gradient]

    @property
    def vocab_functionals(self) -> list[Callable[[Tensor], Tensor]]:
        """What the first stages will ask of the next-token distribution, (n, V) -> (n,), each once."""
        return list(dict.fromkeys(each for link in self.links for each in link.term.vocab_functionals()))

    @property
    def needs_vocab_gradient(self) -> list[str]:
        """Names of the links that read it where there is a gradient."""
        return [link.name for link in self.links if link.term.needs_vocab_gradient]

    @property
    def needs_rescoring(self) -> list[str]:
        """Names of the links that have the policy score other texts."""
        return [link.name for link in self.links if link.term.needs_rescoring]

    # long: all that comes of a link, in one loop
    def on_rollout(
        self,
        rollout: Rollout,
        memories: Mapping[str, dict],
        coefs: Mapping[str, float],
        generators: Callable[[str], torch.Generator],
        renormalise: Callable[[Tensor], tuple[Tensor, Tensor]],
        watch: Watch | None = None,
    ) -> RolloutOutcome:
        """Stage 1. `renormalise`: this process's rewards (N,) -> the base algorithm's advantages and scale, (N,).

        Whoever gives a `watch` judges it; without one what is not finite is raised here.
        """
        stock, noted = rollout.advantages, watch or Watch()
        columns, shared, metrics, affected, shapers = {}, {}, {}, {}, []
        for link in self.links:
            name, before = link.name, rollout.advantages
            own = replace(rollout, generator=generators(name))
            with named(f"the entropy term '{name}'", "stage 1", rollout.step, noted):
                effect = link.term.on_rollout(own, memories[name])
            check_rollout_effect(effect, rollout, name)
            if coefs[name]:
                rollout = left_by(name, effect, rollout, coefs[name], shapers, renormalise, noted)
            changed = per_token(rollout.advantages, rollout.mask) != per_token(before, rollout.mask)
            affected[name] = changed & rollout.mask
            columns |= {f"{name}/{key}": column.detach() for key, column in effect.columns.items()}
            shared |= {f"{name}/{key}": value.detach() for key, value in effect.shared.items()}
            metrics |= {f"{name}/{key}": metric for key, metric in effect.metrics.items()}
        if watch is None:
            noted.require_finite(rollout.step)
        return RolloutOutcome(
            rewards=rollout.rewards,
            group_rewards=rollout.group_rewards,
            advantages=None if rollout.advantages is stock else rollout.advantages,
            columns=columns,
            shared=shared,
            metrics=metrics,
            affected=affected,
            shapers=tuple(name for name, _ in shapers),
        )

    # long: all that comes of a link, in one loop
    def __call__(
        self,
        batch: TokenBatch,
        memories: Mapping[str, dict],
        coefs: Mapping[str, float],
        generators: Callable[[str], torch.Generator],
        affected_before: Mapping[str, Tensor],
        watch: Watch | None = None,
        watched: Callable[[TokenBatch, str], TokenBatch] = lambda own, link: own,
    ) -> Outcome:
        """Stage 2. `batch.columns` and `batch.shared` hold those of all links; each term gets its own.

        `watched` puts aliases into what a link sees, whose gradients `watch` notes. Whoever gives a `watch` trains, and
        judges it; without one what is not finite is raised here.
        """
        columns, shared, stock, noted = batch.columns, batch.shared, batch.advantages, watch or Watch()
        losses, metrics, callbacks, shapers = {}, {}, {}, []
        for link in self.links:
            name, coef = link.name, coefs[link.name]
            own = replace(batch, columns=of_link(columns, name), shared=of_link(shared, name), coef=coef)
            own = replace(own if coef == 0 else watched(own, name), generator=generators(name))
            with named(f"the entropy term '{name}'", "stage 2", batch.step, noted):
                effect = link.term(own, memories[name])
            check_effect(effect, own, name, in_training=watch is not None)
            affected = affected_before[name]
            if effect.advantages is not None and coef:
                shaped = blend(batch.advantages, effect.advantages, coef)
                # the padding keeps its advantages: TRL multiplies its losses by the mask, and NaN * 0 is NaN
                shaped = torch.where(batch.mask, shaped, batch.advantages)
                noted.note(name, "advantages", shaped, batch.mask, coef)
                affected = affected | (shaped != batch.advantages)
                batch = replace(batch, advantages=shaped)
                shapers.append(name)
            if effect.loss is not None and coef:
                noted.note(name, "loss", effect.loss, batch.mask, coef)
                losses[name] = effect.loss
                affected = affected | (effect.loss.detach() != 0)
                if effect.affected is not None:
                    affected = affected | effect.affected
            metrics |= {f"{name}/{key}": metric for key, metric in effect.metrics.items()}
            metrics[f"{name}/affected"] = (affected & batch.mask).float()
            if effect.on_hidden_gradient is not None:
                callbacks[name] = effect.on_hidden_gradient
        if watch is None:
            noted.require_finite(batch.step)
        return Outcome(
            advantages=None if batch.advantages is stock else batch.advantages,
            losses=losses,
            metrics=metrics,
            on_hidden_gradient=callbacks,
            shapers=tuple(shapers),
        )
