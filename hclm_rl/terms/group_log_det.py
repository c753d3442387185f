"""Log-det of a group's pooled responses; derived here from: HCLM, Tran, 2026, arXiv:2605.22940"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import in_double, widest
from ..equations.geometry import at_least_float32, means_of_step, require_finite_states
from ..equations.rows import injected, mean_of_responses, sums_of_responses
from ..equations.triangles import full_precision
from ..responses.answers import DEFAULT, extractor
from ..responses.right_answers import number_of, said_in
from ..types import Direction, Effect, Metric, Quantiles, Rollout, RolloutEffect, Term, TokenBatch

ROUNDING = torch.finfo(torch.float32).eps  # of the states, relative
SILENT = 1e-4  # mean leverage below which responses differ by rounding alone: 1e-8 of the first step's spread


@dataclass(frozen=True, kw_only=True)
class GroupLogDet(Term):
    """Keeps the answers to a prompt apart: right answers unlike the others weigh more, or a force drives all apart.

    h_i is the mean of the last hidden states that predicted the tokens of response i, over the G responses to a prompt

        hc_i = h_i - mean h      K = Hc Hc^T / G      H = 0.5 logdet(K + eps I_G)      l_i = G [(K + eps I)^-1 K]_ii

    H is in nats and the leverage l_i in [0, G - 1] the response's part in it: G / m - 1 for each of m copies among
    answers far from one another. eps, the spread below which answers are copies, decides how fine the weights tell.
    "advantage": w_i = (l_i / mean l)^beta over the responses of the group with A > 0, clipped to [w_lo, w_hi]; A_i w_i
    is rescaled to the sum of these A. A single right answer's copies all weigh 1 there; `over: batch` takes mean and
    sum over all groups of the rollout, so that what most of a group says gives way to what few of another do. There
    `zero_sum` keeps the baseline: with beta 1/2, one right answer and eps to 0, A_i ~ (R_i - mean R) / mean R (max_rl).
    "force": adds -coef * mean over groups of H to the loss, by its gradient: each of the T_i tokens gets F_i / T_i,
    F = (K + eps I)^-1 Hc / G. Responses without a token or a score are left out (G counts the others); groups of
    fewer than two have no H. Several updates per rollout reuse l and F of the sampling policy. Longer states raise H
    too. A response's A is its mean where terms before gave every token its own.
    `features: answers` is the control without hidden states: h_i is the unit vector of the response's answer, so that
    leverage counts copies: G / m - 1 as eps tends to 0, for each of the m that give an answer; all else is the same.

    Args:
        acts: "force": its coef is 1e-3 where the recipe names none
        features: what h_i is: the mean of hidden "states", or the unit vector of one of the group's "answers"
        answer: for "answers": a regular expression with one group or the dotted path of a function; the default is the
            last \\boxed{}, or a text of nothing but whole numbers; a response without one counts by its tokens
        beta: exponent of the weights, >= 0; 0 is no weight; the card's, ours
        w_lo: least weight before rescaling, in (0, 1]; the card's, ours
        w_hi: greatest weight before rescaling, >= 1; the card's, ours
        over: the responses that share mean l and the sum of A; ours
        zero_sum: A < 0 of a group take on what its A > 0 do together: its A sum to what they did; ours
        right_only: False: responses with A < 0 too, by the inverse: mistakes unlike the others weigh less
        balance: of "both": the force's strength beside the advantages, > 0; ours
        eps_relative: eps = eps_relative * mean over groups of tr(K) / G, of the first step; > 0; ours

    Metrics:
        value (nats): H, mean over the groups. Healthy: does not fall for long. Else: the responses to a prompt grow
            alike; raise `beta` or the force's coef
        dof (responses): mean leverage of a group's responses: how many directions its answers span, of at most G - 1
        right_dof (responses): the same among right responses alone, over groups with two or more of them. Healthy: not
            near 0. Else: right answers are copies of one another; where a prompt has one right answer that is as it
            must be
        spread (squared state): mean over groups of the trace of K, the variance of the pooled states
        leverage/q* (leverage): quantiles over the tokens of their response's part in H, in [0, G - 1]
    """

    seeks: ClassVar[Direction | None] = "more"

    acts: Literal["advantage", "force", "both"] = "advantage"
    features: Literal["states", "answers"] = "states"
    answer: str = DEFAULT
    beta: float = 0.5
    w_lo: float = 0.5
    w_hi: float = 2.0
    over: Literal["group", "batch"] = "group"
    zero_sum: bool = False
    right_only: bool = True
    balance: float = 1e-3
    eps_relative: float = 1e-4

    def __post_init__(self) -> None:
        extractor(self.answer)
        if self.features == "answers" and self.acts != "advantage":
            raise ValueError(f"features: answers have no gradient, so acts must be advantage, got {self.acts}")
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if not 0 < self.w_lo <= 1 <= self.w_hi:
            raise ValueError(f"w_lo must be in (0, 1] and w_hi at least 1, got {self.w_lo} and {self.w_hi}")
        for name in ("balance", "eps_relative"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.zero_sum and not self.right_only:
            raise ValueError("zero_sum scales the responses with A < 0 together, right_only: false each for itself")

    @property
    def default_coef(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride] (one for each way to act)
        return 1e-3 if self.acts == "force" else 1.0

    @property
    def needs_scores(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (one kind of features does)
        return self.features == "states"

    @property
    def needs_hidden(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (likewise)
        return self.features == "states"

    @property
    def shapes_advantages(self) -> bool:
        return self.acts != "force"

    def sampled_moments(self) -> tuple[Callable[..., Tensor], ...]:
        return (mean_of_responses,) if self.features == "states" else ()

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        mask, lengths = rollout.mask, rollout.mask.sum(dim=1)
        pooled = self.pooled(rollout)
        advantages = mean_advantage(rollout.advantages, mask)
        counts = (lengths > 0) & ~rollout.rewards.isnan()

        order = rollout.everywhere(rollout.group).argsort(stable=True).view(-1, rollout.group_rewards.size(1))
        h, a, is_in = (rollout.everywhere(x)[order] for x in (pooled, advantages, counts))
        h = h if self.features == "states" else unit_vectors(h)
        own = rollout.here(order.flatten().argsort())  # this process's rows among those of the groups
        group = spread(h, is_in)
        has_two = is_in.sum(dim=1) > 1
        if not group.trace[has_two].mean() > ROUNDING**2 * h.square().sum(dim=2).mean():
            require_finite_states(group.trace.sum())  # NaN > 0 is False
            return RolloutEffect()
        eps = memory.setdefault("eps", self.eps_relative * group.trace[has_two].mean().item() / h.size(1))
        lower, leverage = group.factor(eps)
        right = spread(h, is_in & (a > 0))
        has_two_right = right.count > 1
        right_dof = right.factor(eps)[1].sum(dim=1) / right.count.clamp(min=1)
        metrics: dict[str, Metric] = {
            "value": lower.diagonal(dim1=1, dim2=2).log().sum(dim=1)[has_two].mean(),
            "dof": (leverage.sum(dim=1) / group.count.clamp(min=1))[has_two].mean(),
            "right_dof": torch.where(has_two_right, right_dof, 0).sum() / has_two_right.sum().clamp(min=1),
            "spread": group.trace[has_two].mean(),
            "leverage": Quantiles(values=leverage.flatten()[own].unsqueeze(1).expand(mask.shape)),
        }
        shaped, columns = None, {}
        if self.acts != "force":
            of_row = self.all_weights(leverage, a, is_in).flatten()[own].to(rollout.advantages)
            shaped = rollout.advantages * (of_row if rollout.advantages.dim() == 1 else of_row.unsqueeze(1))
        if self.acts != "advantage":
            # the trainer divides the sum over tokens by `tokens`; here it is to be divided by the number of groups
            tokens = rollout.total(lengths.sum()).to(pooled)  # a quotient of integers would be float32
            scale = tokens / has_two.sum() / lengths.clamp(min=1).unsqueeze(1)
            columns["force"] = (group.force(lower)[own] * scale).to(at_least_float32(rollout.scored()[0]))
        return RolloutEffect(advantages=shaped, columns=columns, metrics=metrics)

    def pooled(self, rollout: Rollout) -> Float[Tensor, "N D"] | Int[Tensor, "N"]:
        """What tells the responses apart: their mean states, or a number for the answer of each."""
        if self.features == "states":
            return means_of_step(rollout)
        numbers = [number_of(said) for said in said_in(rollout, extractor(self.answer))]
        return torch.tensor(numbers, device=rollout.mask.device)

    def all_weights(
        self, leverage: Float[Tensor, "P G"], a: Float[Tensor, "P G"], is_in: Bool[Tensor, "P G"]
    ) -> Float[Tensor, "P G"]:
        """w of every response: of the right ones, of the wrong ones unless `right_only`, balanced where `zero_sum`."""
        weights = self.weights(leverage, a, is_in & (a > 0))
        if not self.right_only:
            weights = weights * self.weights(leverage, a, is_in & (a < 0), inverse=True)
        if self.zero_sum:
            weights = torch.where(is_in & (a < 0), change_of_sum(weights, torch.where(is_in, a, 0)), weights)
        return weights

    def weights(
        self, leverage: Float[Tensor, "P G"], a: Float[Tensor, "P G"], side: Bool[Tensor, "P G"], inverse: bool = False
    ) -> Float[Tensor, "P G"]:
        """w of the responses of one side, which leaves the sum of their advantages as it is; 1 elsewhere."""

        def total(x: Tensor) -> Tensor:
            sums = torch.where(side, x, 0).sum(dim=1, keepdim=True)
            return sums if self.over == "group" else sums.sum().expand_as(sums)

        mean = total(leverage) / total(torch.ones_like(leverage)).clamp(min=1)
        ratio = torch.where(side & (mean > SILENT), leverage / mean.clamp(min=SILENT), 1)
        w = ratio.pow(-self.beta if inverse else self.beta).clamp(self.w_lo, self.w_hi)
        before, after = total(a), total(w * a)
        return torch.where(side, w * before / torch.where(after == 0, 1, after), 1)

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "force" not in batch.columns:
            return Effect()
        of_response, row = batch.columns["force"], batch.mask.nonzero()[:, 0]
        gain = injected(batch.hidden(), batch.mask, lambda _, piece: of_response[row[piece]])
        return Effect(loss=-gain * (self.balance if self.acts == "both" else 1.0))


def change_of_sum(weights: Float[Tensor, "P G"], a: Float[Tensor, "P G"]) -> Float[Tensor, "P 1"]:
    """By what factor the weights change the sum of each group's A > 0; 1 where there is none."""
    before, after = ((w * a.clamp(min=0)).sum(dim=1, keepdim=True) for w in (1, weights))
    return torch.where(before > 0, after / before, 1)


def unit_vectors(answers: Int[Tensor, "P G"]) -> Float[Tensor, "P G G"]:
    """One for each response: that of the first of its group which gives the same answer."""
    first = (answers.unsqueeze(2) == answers.unsqueeze(1)).int().argmax(dim=2)
    return torch.nn.functional.one_hot(first, answers.size(1)).to(widest(answers.device))


def mean_advantage(advantages: Float[Tensor, "N"] | Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Tensor:
    """A of each response, (N,): the mean over its tokens where they differ."""
    a = in_double(advantages)
    if a.dim() == 1:
        return a
    return sums_of_responses(a[mask], mask).to(a) / mask.sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class Spread:
    """The Gram matrices of P groups of centred pooled responses; those left out are zeros."""

    centred: Float[Tensor, "P G D"]  # Hc
    gram: Float[Tensor, "P G G"]  # K
    count: Float[Tensor, "P"]  # responses that count
    trace: Float[Tensor, "P"]  # of K

    def factor(self, eps: float) -> tuple[Float[Tensor, "P G G"], Float[Tensor, "P G"]]:
        """L with L L^T = K + eps I, and the leverages."""
        eye = torch.eye(self.gram.size(1), dtype=self.gram.dtype, device=self.gram.device)
        lower = torch.linalg.cholesky(self.gram + eps * eye)
        share = torch.cholesky_solve(self.gram, lower).diagonal(dim1=1, dim2=2)
        return lower, self.count.unsqueeze(1) * share

    def force(self, lower: Float[Tensor, "P G G"]) -> Float[Tensor, "rows D"]:
        """The gradient of half the log-det by each pooled response, group after group."""
        solved = torch.cholesky_solve(self.centred, lower) / self.count.clamp(min=1).view(-1, 1, 1)
        return solved.flatten(0, 1)


def spread(h: Float[Tensor, "P G D"], counts: Bool[Tensor, "P G"]) -> Spread:
    """K = Hc Hc^T / G over the responses that count."""
    inside, count = counts.unsqueeze(2), counts.sum(dim=1).to(h)
    n = count.clamp(min=1).view(-1, 1, 1)
    centred = torch.where(inside, h - torch.where(inside, h, 0).sum(dim=1, keepdim=True) / n, 0)
    with full_precision(h):
        gram = centred @ centred.mT / n
    return Spread(centred, gram, count, gram.diagonal(dim1=1, dim2=2).sum(dim=1))
