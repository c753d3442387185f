"""InfoPO, Information-Driven Policy Optimization: 2026, arXiv:2603.00656"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import in_double, per_token
from ..responses.turns import at_tokens, number_turns, sum_by_turn, tokens_by_turn
from ..types import Rollout, RolloutEffect, Term

EPSILON = 1e-6  # the authors', beside deviations


@dataclass(frozen=True, kw_only=True)
class InfoPo(Term):
    """Credits a turn by how much the tool's reply to it changed the next turn, where the group's rewards do not differ.

    IG_t = mean over the tokens of turn t + 1 of  log p(token | reply) - log p(token | placeholder),  nats, at the
    sampling policy, the reply overwritten in place. Each token of turn t gets IG_t / |turn t|; these are standardised
    over the tokens of the group that have one (A_i; 0 elsewhere, so long turns count more often), and bounded:
    A_i min(1, max(dev A, 1) / dev A_i) over all response tokens of the step.
    A_t = A + beta g A_i,  g = 1 / (1 + exp(d / temperature)),  d = deviation of the group's rewards.
    With `gamma` < 1 turn t of T has gamma^(T - t) of the outcome, times what makes the mean over the response A again.
    g is at most 1/2, and with 0/1 rewards nearly a switch: groups of equal rewards alone. A filter that drops those
    leaves nothing, and in text without tools the term does nothing. One forward pass more for each reply of the longest
    response. Groups that all fail are driven by information alone: it rewards asking for anything that surprises.
    Responses without a reward have no part in it.

    Args:
        beta: >= 0; the authors'. Its decay over epochs, 0 there, is a schedule of `coef`
        temperature: of the gate, > 0, in units of the reward; the authors'
        gamma: of the outcome by turns, in (0, 1]; 1 is the authors' default, "Equalized" turns, whose own gamma of 0.8
            acts on nothing; below 1 their "R2G" turns where the reward comes with the last one
        placeholder: stands for the reply: cut to its length, or its last token repeated
        template_before: tokens that the chat template puts before what the tool said; they are kept
        template_after: likewise after it, up to where the next turn begins

    Metrics:
        information (nats): mean of what a tool's reply changed in the next turn, a reply. Healthy: above 0. Else: the
            replies do not matter to what follows
        gate (weight): mean g, in [0, 1/2]: the more a group's rewards differ the smaller. Healthy: not near 1/2. Else:
            nearly all groups have equal rewards, and information alone is trained
        credited (share): of the tokens in a turn with a reply and a turn after it. Healthy: above 0. Else: at 0 the
            term does nothing: the text has no tools
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    shapes_advantages: ClassVar[bool] = True

    beta: float = 0.1
    temperature: float = 0.05
    gamma: float = 1.0
    placeholder: str = "No information found."
    template_before: int = 0
    template_after: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < torch.inf:
            raise ValueError(f"beta must be >= 0 and finite, got {self.beta}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")
        if not self.placeholder.strip():
            raise ValueError(f"placeholder must be text, got {self.placeholder!r}")
        if min(self.template_before, self.template_after) < 0:
            raise ValueError(
                f"template_before and template_after must be >= 0, got {self.template_before}, {self.template_after}"
            )

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        information, is_credited = self._information(rollout)
        turn = number_turns(rollout.mask)
        lengths = tokens_by_turn(turn)
        credit = rollout.everywhere(at_tokens(information / lengths.clamp(min=1), turn))
        is_scored = ~rollout.rewards.isnan().unsqueeze(1)
        has_credit = rollout.everywhere(is_scored & (at_tokens(in_double(is_credited), turn) > 0))
        mask = rollout.everywhere(is_scored & rollout.mask)
        discount = at_tokens(by_turn(lengths, self.gamma), turn)
        outcome = rollout.everywhere(discount * in_double(per_token(rollout.advantages, rollout.mask)))
        intrinsic = standardised_by_group(credit, has_credit, rollout.everywhere(rollout.group))
        if mask.sum() > 1:
            spread = intrinsic[mask].std() + EPSILON
            intrinsic = intrinsic * ((outcome[mask].std() + EPSILON).clamp(min=1) / spread).clamp(max=1)
        gate = torch.sigmoid(-deviation(rollout.group_rewards) / self.temperature)
        shaped = rollout.here(outcome) + self.beta * gate.unsqueeze(1) * rollout.here(intrinsic)
        credits = rollout.total(in_double(is_credited).sum())
        return RolloutEffect(
            advantages=torch.where(rollout.mask, shaped, 0.0).to(rollout.advantages.dtype),
            metrics={
                "information": rollout.total(information.sum()) / credits.clamp(min=1),  # nats a reply
                "gate": rollout.everywhere(gate).mean(),
                "credited": rollout.here(has_credit).float(),
            },
        )

    def _information(self, rollout: Rollout) -> tuple[Float[Tensor, "N S"], Bool[Tensor, "N S"]]:
        """IG of each turn, and which turns have one: those with a reply and a turn after it."""
        turn = number_turns(rollout.mask)
        lengths = tokens_by_turn(turn)
        information = torch.zeros_like(lengths)
        is_credited = torch.zeros_like(lengths, dtype=torch.bool)
        most = int((rollout.everywhere(turn.amax(dim=1)) if turn.size(1) else turn.new_zeros(1)).max())
        for asked in range(most):  # as often on every process
            assert rollout.transcript is not None
            span = self._reply(rollout.mask, rollout.transcript.present, turn, asked)
            without, _ = rollout.score(replace(rollout.transcript, ids=self._overwritten(rollout, span)))
            gain = in_double(rollout.scored()[0] - without)
            if asked + 1 < lengths.size(1):
                is_credited[:, asked] = span.any(dim=1) & (lengths[:, asked + 1] > 0)
                mean = sum_by_turn(gain, turn)[:, asked + 1] / lengths[:, asked + 1].clamp(min=1)
                information[:, asked] = torch.where(is_credited[:, asked], mean, 0.0)
        return information, is_credited

    def _reply(
        self, mask: Bool[Tensor, "N T"], present: Bool[Tensor, "N T"], turn: Int[Tensor, "N T"], asked: int
    ) -> Bool[Tensor, "N T"]:
        """The tokens of the tool's reply to turn `asked`, without what the chat template puts around it."""
        begun = turn.cummax(dim=1).values  # the last turn that has begun
        span = present & ~mask & (begun == asked)
        place = span.cumsum(dim=1)  # from 1
        return span & (place > self.template_before) & (place <= place[:, -1:] - self.template_after)

    def _overwritten(self, rollout: Rollout, span: Bool[Tensor, "N T"]) -> Int[Tensor, "N T"]:
        """The ids with the placeholder in the span."""
        if not span.any():
            return rollout.ids
        if rollout.tokenizer is None:
            raise ValueError("this rollout has no tokenizer, which the placeholder needs")
        words = rollout.tokenizer(self.placeholder, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(words, dtype=rollout.ids.dtype, device=rollout.ids.device)
        place = (span.cumsum(dim=1) - 1).clamp(min=0, max=len(ids) - 1)
        return torch.where(span, ids[place], rollout.ids)


def by_turn(lengths: Float[Tensor, "N S"], gamma: float) -> Float[Tensor, "N S"]:
    """gamma^(T - t) for turn t = 1, ..., T of each response, divided by its mean over the tokens."""
    after = (lengths > 0).sum(dim=1, keepdim=True) - 1 - torch.arange(lengths.size(1), device=lengths.device)
    discount = torch.where(lengths > 0, gamma ** in_double(after), 0.0)
    total = (discount * lengths).sum(dim=1, keepdim=True)
    return discount * lengths.sum(dim=1, keepdim=True) / torch.where(total > 0, total, 1.0)


def standardised_by_group(
    x: Float[Tensor, "N T"], counts: Bool[Tensor, "N T"], group: Int[Tensor, "N"]
) -> Float[Tensor, "N T"]:
    """(x - mean) / (deviation + EPSILON) over what counts in each group; 0 elsewhere, and where one value is alone."""
    _, place = group.unique(return_inverse=True)

    def by_group(values: Float[Tensor, "N T"]) -> Float[Tensor, "N 1"]:
        """The sum over what counts in each row's group; all groups at once, so that it is linear in the rows."""
        sums = torch.where(counts, values, 0).sum(dim=1)
        return sums.new_zeros(len(sums)).index_add(0, place, sums)[place].unsqueeze(1)

    number = by_group(torch.ones_like(x))
    centred = x - by_group(x) / number.clamp(min=1)
    deviation = (by_group(centred.square()) / (number - 1).clamp(min=1)).sqrt()
    return torch.where(counts & (number > 1), centred / (deviation + EPSILON), 0)


def deviation(group_rewards: Float[Tensor, "N G"]) -> Float[Tensor, "N"]:
    """The unbiased deviation of the scored rewards of each row; 0 where fewer than two were scored."""
    rewards = in_double(group_rewards)
    count = (~rewards.isnan()).sum(dim=1)
    centred = rewards - rewards.nanmean(dim=1, keepdim=True)
    return ((centred**2).nansum(dim=1) / (count - 1).clamp(min=1)).sqrt()
