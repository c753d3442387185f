"""Self-imitation of SPEAR: Qin et al., 2025, arXiv:2509.22601"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..equations.functional import covariance_contributions, in_double, per_token, quantile
from ..equations.selections import between, drawn, drawn_places, quota
from ..responses.replay import Replay, kept_in, left_padded
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch, Transcript

LONGEST_KEPT = 10  # optimiser steps; the authors' cap


@dataclass(frozen=True, kw_only=True)
class SelfImitation(Term):
    """Replays earlier responses that beat the usual reward, with a weight that grows over the first steps.

    Adds gamma(s) times the clipped objective of replayed tokens, -min(r A, clip(r) A), r = p now / p when sampled,
    A = R - b > 0;  b = median of the group means of all earlier steps, gamma(s) = (1 - cos(pi s / S)) / 2, 1 from S on.
    After a step its responses with a positive advantage and a tool call enter the buffer; before that those leave it
    that are more than `keep_steps` older than the newest there. Once more than 1.5 `buffer` of them have R > b (with
    `decay`: once it holds more than that), `buffer` at random (or the largest power of two there is) are replayed in
    the updates of one generation batch, and the buffer is emptied. A few replayed tokens whose covariance is in
    (cov_lower, cov_upper) lose their gradient, as in clip_cov, which serves the fresh tokens; they are drawn once, by
    the log-probs of when they were sampled, where the authors draw in each micro-batch by present ones. They give
    replays optimiser steps of their own and centre rewards without a deviation (scale_rewards: none); their tool reward
    is the term `tool_bonus`. A replay costs one more pass, forward and backward, over as many rows.

    Args:
        buffer: responses of a replay, >= 1; the README's
        keep_steps: optimiser steps after which a response leaves, 1 to 10; the README's, 5 in its scripts
        warm_up: S, optimiser steps, >= 1; the README's, 100 for ALFWorld, 300 for maths
        baselines: group means kept for b, whole steps leave at once, >= 1; the README's
        needs_tool_call: False: for text without tools
        cov_ratio: share of the replayed tokens without gradient, in (0, 1]; the README's. The released code does not
            read its keys for replays (clip_cov_*_replay) and takes those of the fresh tokens, in its yaml 0.0002, 1
            and 5; nor does it read trajectory_score_threshold: what enters has an advantage above 0
        cov_lower: the README's, like cov_upper for advantages that no deviation divides
        cov_upper: the README's, see `cov_lower`
        decay: in (0, 1]: a replay's advantage is `decay` times the one it had, instead of R - b; the authors' option
        average: over replayed tokens; "width": a response's sum over `width`, then over responses, as dr_grpo does; the
            authors sum over responses
        width: tokens, max_completion_length for "width"; None: the longest replay

    Attributes:
        default_coef: c; the authors' README, their yaml has 0.001

    Metrics:
        buffered (responses): number of those in the buffer
        replayed (responses): number of those that this step replays, 0 between replays. Healthy: above 0 now and then.
            Else: the buffer never fills; lower `buffer`, or set needs_tool_call: false for text without tools
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    default_coef: ClassVar[float] = 1.0

    buffer: int = 2048
    keep_steps: int = 10
    warm_up: int = 200
    baselines: int = 10240
    needs_tool_call: bool = True
    cov_ratio: float = 0.02
    cov_lower: float = 1.0
    cov_upper: float = 40.0
    decay: float | None = None
    average: Literal["tokens", "width"] = "tokens"
    width: int | None = None

    def caveats(self) -> list[str]:
        if 2e-4 <= self.cov_ratio <= 0.2:
            return []
        return [
            f"cov_ratio {self.cov_ratio:g} stops the gradient of {100 * self.cov_ratio:g} % of the replayed tokens, "
            "where the README has 2 %: "
            + ("little is left to imitate" if self.cov_ratio > 0.2 else "it bounds nothing")
        ]

    def __post_init__(self) -> None:
        for name in ("buffer", "keep_steps", "warm_up", "baselines"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {vars(self)[name]}")
        if self.keep_steps > LONGEST_KEPT:
            raise ValueError(f"keep_steps must be at most {LONGEST_KEPT}, the authors' limit, got {self.keep_steps}")
        if not 0 < self.cov_ratio <= 1:
            raise ValueError(f"cov_ratio must be in (0, 1], got {self.cov_ratio}")
        if not self.cov_lower < self.cov_upper:
            raise ValueError(f"cov_lower must be below cov_upper, got {self.cov_lower} and {self.cov_upper}")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1] or None, got {self.decay}")
        if self.width is not None and (self.width < 1 or self.average == "tokens"):
            raise ValueError(f"width is a number of tokens for average='width', got {self.width} for '{self.average}'")

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        replay, columns = kept_in(memory), {}
        replayed, baseline = 0, self._baseline(memory)
        if replay is not None:
            # with `decay` all count: those that entered have an advantage above 0
            is_good = replay.reward > baseline if self.decay is None else torch.ones_like(replay.step, dtype=torch.bool)
            is_busy = rollout.everywhere(rollout.mask.any(dim=1))
            if is_good.sum() > 1.5 * self.buffer and is_busy.any():
                replayed = min(self.buffer, 2 ** int(math.log2(int(is_good.sum()))))
                chosen = drawn_places(is_good, replayed, rollout.generator)
                columns = self._columns(rollout, replay.rows(chosen), baseline, is_busy)
                replay = replay.rows(replay.step < 0)
            elif len(replay):
                replay = replay.rows(replay.step >= replay.step.max() - self.keep_steps)
        self._remember(rollout, replay, memory)
        metrics = {"buffered": float(len(memory["replay_ids"])), "replayed": float(replayed)}
        return RolloutEffect(columns=columns, metrics={name: torch.tensor(value) for name, value in metrics.items()})

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "ids" not in batch.columns:
            return Effect()
        kept = {name: column.flatten(0, 1) for name, column in batch.columns.items()}
        names = ("prompt_ids", "prompt_mask", "ids", "present")
        logps, _ = batch.score(Transcript(**{name: kept[name] for name in names}))
        ratio = torch.where(kept["mask"], logps - kept["logps"], 0.0).exp()
        clipped = ratio.clamp(1 - batch.clip_range[0], 1 + batch.clip_range[1])
        advantages = kept["advantage"].unsqueeze(1)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        losses = torch.where(kept["mask"] & ~kept["is_dropped"], losses, 0.0).sum(dim=1) * kept["weight"]
        of_row = losses.view(len(batch.mask), -1).sum(dim=1, keepdim=True) * gamma(batch.step, self.warm_up)
        # on the row's first token; the trainer divides by the tokens of the step, `weight` has them
        is_first = batch.mask & (batch.mask.cumsum(dim=1) == 1)
        return Effect(loss=torch.where(is_first, of_row, 0.0))

    @staticmethod
    def _baseline(memory: dict) -> float:
        values = torch.tensor([value for step in memory.get("baselines", []) for value in step], dtype=torch.float64)
        return float(quantile(values, 0.5)) if len(values) else math.inf

    def _columns(self, rollout: Rollout, chosen: Replay, baseline: float, is_busy: Tensor) -> dict[str, Tensor]:
        """The replays spread over the rows that have tokens, so that they travel with them."""
        advantage = chosen.reward - baseline if self.decay is None else self.decay * chosen.advantage
        tokens = in_double(rollout.total(rollout.mask.sum()))
        whole = self.width or chosen.ids.size(1)
        share = chosen.mask.sum() if self.average == "tokens" else whole * len(chosen)
        cov = covariance_contributions(chosen.logps, per_token(advantage, chosen.mask).contiguous(), chosen.mask)
        is_candidate = between(cov, chosen.mask, self.cov_lower, self.cov_upper)
        is_dropped = drawn(is_candidate, quota(self.cov_ratio, chosen.mask), rollout.generator)
        each = math.ceil(len(chosen) / int(is_busy.sum()))
        place = rollout.here(is_busy.cumsum(dim=0) - 1)
        number = place.unsqueeze(1) * each + torch.arange(each, device=place.device)
        counts = rollout.mask.any(dim=1, keepdim=True) & (number < len(chosen))
        number = number.clamp(min=0) % len(chosen)  # rows without one read another's, with weight 0
        names = ("prompt_ids", "prompt_mask", "ids", "present", "mask", "logps")
        columns = {name: getattr(chosen, name)[number] for name in names}
        columns |= {"advantage": advantage[number].to(chosen.logps.dtype), "is_dropped": is_dropped[number]}
        return columns | {"weight": torch.where(counts, tokens / share, 0.0).to(chosen.logps.dtype)}

    def _remember(self, rollout: Rollout, replay: Replay | None, memory: dict) -> None:
        """This step's group means and its responses above their group's mean, from all processes."""
        assert rollout.transcript is not None
        rewards, text = rollout.everywhere(rollout.rewards), rollout.transcript
        mask = rollout.everywhere(rollout.mask)
        advantages = rollout.everywhere(per_token(rollout.advantages, rollout.mask))
        prompts = left_padded(rollout.everywhere(text.prompt_ids), rollout.everywhere(text.prompt_mask))
        new = Replay(
            prompt_ids=prompts[0],
            prompt_mask=prompts[1],
            ids=rollout.everywhere(text.ids),
            present=rollout.everywhere(text.present),
            mask=mask,
            logps=rollout.everywhere(torch.where(rollout.mask, rollout.scored()[0].detach(), 0.0)),
            reward=rewards,
            advantage=torch.where(mask, advantages, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1),
            step=torch.full_like(rewards, rollout.step, dtype=torch.long),
        )
        is_good = (new.advantage > 0) & ~rewards.isnan() & new.logps.isfinite().all(dim=1)
        if self.needs_tool_call:  # present but not the model's: what a tool wrote
            is_good = is_good & (new.present & ~mask).any(dim=1) & mask.any(dim=1)
        new = new.rows(is_good)
        (new if replay is None else replay.joined(new)).save(memory)
        groups = rollout.everywhere(rollout.group_rewards.nanmean(dim=1))
        first = torch.unique(rollout.everywhere(rollout.group), return_inverse=True)[1]
        means = {number: mean for number, mean in zip(first.tolist(), groups.tolist(), strict=True) if mean == mean}
        history = [*memory.get("baselines", []), list(means.values())]
        while sum(map(len, history)) > self.baselines and len(history) > 1:
            history = history[1:]
        memory["baselines"] = history


def gamma(step: int, warm_up: int) -> float:
    """(1 - cos(pi s / S)) / 2 up to s = S, then 1."""
    return (1 - math.cos(math.pi * min(step / warm_up, 1))) / 2
