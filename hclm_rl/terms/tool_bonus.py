"""Fading tool reward of SPEAR: Qin et al., 2025, arXiv:2509.22601"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..responses.turns import number_turns
from ..types import Rollout, RolloutEffect, Term


@dataclass(frozen=True, kw_only=True)
class ToolBonus(Term):
    """Pays for tool calls, right answer or wrong, less and less over the first steps.

    R + mu(s) min(largest, each n),  mu(s) = (cos(pi s / S) + 1) / 2 up to step S, then 0;  n = messages of the response
    that call a tool, in text without messages the calls after whose answer the response goes on. With `largest` 1 it
    can equal the whole reward of a right answer: scale it to yours. Put it first.

    Args:
        each: reward a call, >= 0; the authors'
        largest: the most that calls can earn, >= 0; the authors'
        fade: S, optimiser steps, >= 1; the README's, 200 in its scripts. None: mu = 1 throughout, the authors'
            use_toolcall_reward "constant"
        right_answers: "whole": with a call, a response whose reward is above 0 earns mu `largest`, however many calls
            it made; the authors' reward for Qwen3

    Metrics:
        calls (calls a response): mean number of tool calls. Healthy: above 0, and not rising once `mu` is 0. Else:
            where calls rise without the reward, lower `each` or `largest`
        mu (weight): of the bonus at this step, from 1 to 0
    """

    shapes_rewards: ClassVar[bool] = True

    each: float = 0.1
    largest: float = 1.0
    fade: int | None = 100
    right_answers: Literal["by_call", "whole"] = "by_call"

    def __post_init__(self) -> None:
        for name in ("each", "largest"):
            if not 0 <= vars(self)[name] < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {vars(self)[name]}")
        if self.fade is not None and self.fade < 1:
            raise ValueError(f"fade must be at least 1, or None for a bonus that stays, got {self.fade}")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        calls = self._calls(rollout).to(rollout.rewards)
        mu = 1.0 if self.fade is None else (math.cos(math.pi * min(rollout.step / self.fade, 1)) + 1) / 2
        earned = (self.each * calls).clamp(max=self.largest)
        if self.right_answers == "whole":
            earned = torch.where((rollout.rewards > 0) & (calls > 0), self.largest, earned)
        return RolloutEffect(
            rewards=rollout.rewards + mu * earned,
            metrics={"calls": rollout.everywhere(calls).mean(), "mu": torch.tensor(mu)},
        )

    @staticmethod
    def _calls(rollout: Rollout) -> Tensor:
        if rollout.texts and all(isinstance(text, list) for text in rollout.texts):
            return torch.tensor([sum(bool(message.get("tool_calls")) for message in text) for text in rollout.texts])
        turns = number_turns(rollout.mask)
        last = turns.amax(dim=1) if turns.size(1) else turns.sum(dim=1)
        return last.clamp(min=0)  # between two turns there is one answer
