"""PEAR, Phase Entropy Aware Reward: Huang et al., 2025, arXiv:2510.08026"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import in_double
from ..types import Direction, Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class Pear(Term):
    """Pays a correct answer less where its thinking is less certain than its answer, which shortens responses.

    r = min(1, full - P) if correct, else `wrong`;  P = max(0, H_think - alpha H_answer), in nats: the mean entropies,
    at the sampling policy, of the response tokens before the first closing think tag and after it; an empty phase
    counts 0. Without the tag all tokens are thinking. A correct answer falls below a wrong one where P > full - wrong.
    The tag is found by its token ids: give those of your tokenizer, and watch `closed`. A long vague answer cancels the
    penalty: watch `answer_entropy`. It replaces the whole reward, so put it first.

    Args:
        think_end: token ids of `</think>`, in order; Qwen3's, one of the paper's models
        alpha: weight of the answer's entropy; the paper's; 0 and -1 hurt accuracy there
        full: reward of a correct answer without penalty; the authors' README
        wrong: reward of any other answer; the authors' README
        correct_from: the reward from which an answer is correct: for 0/1 rewards
        floor: the least reward of a correct answer; the paper has none
        unclosed: tokens that H_think averages where there is no tag; "all_but_last" is the paper's, which then takes
            the last token for the tag; "all" a later work's

    Metrics:
        closed (share): of the responses with the closing think tag. Healthy: above 0. Else: at 0 `think_end` is not of
            this tokenizer, or responses are cut off
        thinking_entropy (nats): mean entropy before the tag
        answer_entropy (nats): mean entropy after it. Healthy: does not rise. Else: a long vague answer cancels the
            penalty; lower `alpha`
    """

    needs_scores: ClassVar[bool] = True
    seeks: ClassVar[Direction | None] = "less"
    shapes_rewards: ClassVar[bool] = True

    think_end: tuple[int, ...] = (151668,)
    alpha: float = 1.0
    full: float = 1.0
    wrong: float = 0.0
    correct_from: float = 1.0
    floor: float | None = None
    unclosed: Literal["all", "all_but_last"] = "all"

    def __post_init__(self) -> None:
        if not self.think_end or min(self.think_end) < 0:
            raise ValueError(f"think_end must be one or more token ids, got {self.think_end}")
        for name in ("alpha", "full", "wrong", "correct_from", "floor"):
            value = vars(self)[name]
            if value is not None and not abs(value) < torch.inf:
                raise ValueError(f"{name} must be finite, got {value}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        is_thinking, is_answer, is_closed = self._phases(rollout.ids, rollout.mask)
        self._require_tag(rollout, is_closed, memory)
        # float64: what a row sums to must not show how many padded slots it has; a reward is a constant
        entropy = in_double(rollout.scored()[1].detach())
        thinking, answer = mean_of_rows(entropy, is_thinking), mean_of_rows(entropy, is_answer)
        paid = (self.full - (thinking - self.alpha * answer).clamp(min=0.0)).clamp(max=1.0)
        if self.floor is not None:
            paid = paid.clamp(min=self.floor)
        is_correct = rollout.rewards >= self.correct_from
        rewards = torch.where(is_correct, paid.to(rollout.rewards.dtype), self.wrong)
        return RolloutEffect(
            rewards=torch.where(rollout.rewards.isnan(), rollout.rewards, rewards),  # unscored stays unscored
            metrics={
                "closed": in_double(is_closed).mean(),
                "thinking_entropy": thinking.mean(),
                "answer_entropy": answer.mean(),
            },
        )

    def _phases(
        self, ids: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"]
    ) -> tuple[Bool[Tensor, "N T"], Bool[Tensor, "N T"], Bool[Tensor, "N"]]:
        """The tokens before the first closing tag, those after it, and whether there is one."""
        size, width = len(self.think_end), ids.size(1)
        written = torch.where(mask, ids, -1)  # a tag that a tool wrote closes nothing
        windows = torch.nn.functional.pad(written, (0, size - 1), value=-1).unfold(1, size, 1)
        is_tag = (windows == ids.new_tensor(self.think_end)).all(dim=2)
        is_closed = is_tag.any(dim=1)
        first = torch.where(is_closed, is_tag.int().argmax(dim=1), width).unsqueeze(1)
        slot = torch.arange(width, device=ids.device)
        is_thinking = mask & (slot < first)
        if self.unclosed == "all_but_last":
            is_last = mask & (mask.cumsum(dim=1) == mask.sum(dim=1, keepdim=True))
            is_thinking = is_thinking & ~is_last  # where there is a tag the last token is not thinking
        return is_thinking, mask & (slot >= first + size), is_closed

    @staticmethod
    def _require_tag(rollout: Rollout, is_closed: Bool[Tensor, "N"], memory: dict) -> None:
        """Stops where texts show the tag but no response has had its ids yet: they are another tokenizer's."""
        shown = sum("</think>" in str(text) for text in rollout.texts)
        found, shown = rollout.total(torch.stack([is_closed.sum(), is_closed.new_tensor(shown, dtype=torch.long)]))
        memory["has_found"] = memory.get("has_found", 0) or int(found > 0)
        if shown and not memory["has_found"]:
            raise ValueError(
                f"{int(shown)} responses hold '</think>' but none has the token ids think_end: give those of this "
                "model, tokenizer.encode('</think>', add_special_tokens=False)"
            )


def mean_of_rows(values: Float[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N"]:
    """The mean of each row's values under the mask, 0 where it has none."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
