"""Right-answer anchor, derived here; nearest: DPH-RL, Li et al., 2025, arXiv:2509.07430"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..equations.functional import beyond, in_double, ratio, widest
from ..equations.geometry import means_of_step
from ..equations.rows import mean_of_responses
from ..responses.answers import DEFAULT, Extract, extractor
from ..responses.replay import picked_from
from ..responses.right_answers import (
    Keep,
    RightAnswers,
    bytes_of,
    count_in,
    is_right,
    kept_in,
    number_of,
    prompt_numbers,
    prompts_of,
    said_in,
    tell_of_unclear_rewards,
    tell_once,
    trimmed,
    unpadded,
)
from ..types import Effect, Rollout, RolloutEffect, Term, TokenBatch, Total, Transcript

PATIENCE = 50  # rollouts without a prompt that came again, after which a run is told
GB = 1e9
AS_BEFORE = 1e-5  # nats a token: a policy that has not moved is read so much lower in a batch of another width
ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001


@dataclass(frozen=True, kw_only=True)
class RightAnchor(Term):
    """What was once sampled and right may not become less likely: its log-prob is held from below.

    A store keeps up to `capacity` different right responses of each prompt, with their log-probs when first sampled:
    l_0 = sum_t log pi_0(o_t). A `share` of the rows each replays one of an earlier step, drawn uniformly. Its loss is

        max(0, l_0 - margin - l)    l = sum_t log pi(o_t) now    summed over replays, over the number of their tokens

    times coef; up to 1e-5 nats a token are rounding, and 0. Where nothing right has become less likely the gradient is
    0, so learning is free, unlike under a KL to the start, which holds the start's mistakes too. It is likelihood
    without an importance ratio, on purpose: a floor. A replay costs one more pass forward, and where it lies below its
    floor another, forward and backward (with `unit: token` or without the hinge, each one of that alone); those drawn
    twice in a micro-batch are read once. The store is the same on all processes and goes into checkpoints: 28 bytes a
    response, 4 for each token of its prompt, 9 for each of its own (`bytes` logs the sum); with `keep: log_det` 4 D
    more, with `keep: count` 8 and 12 for each answer ever counted. What was right by luck is held too; with dropout l
    is noisy.

    Args:
        source: "prompt": a row replays what its own prompt was once answered; "any": what any prompt was, for data
            sets whose prompts seldom come twice.
        unit: what is compared with l_0: "response", its sum; "token", each token, sum_t max(0, l_0t - margin - l_t),
            for long responses, whose sums drift by many nats.
        hinge: False: plain cross-entropy -l, the baseline of rejection fine-tuning, which never stops.
        margin: nats that may be lost, of a response or of a token as `unit` says; at least 0.
        capacity: responses kept for a prompt, at least 1.
        share: of the rows, in (0, 1]: those that replay, hence the cost.
        distinct: which responses to a prompt are different: those of other "tokens", or of another "answer".
        answer: for `distinct: answer` and `keep: count`: a regular expression with one group or the dotted path of a
            function; the default is the last \\boxed{}, or a text of nothing but whole numbers. A response without an
            answer counts by its tokens.
        keep: when a prompt's store is full: "first" keeps those that came first; "log_det" drops what adds least to the
            spread of their pooled hidden states (least leverage in the Gram matrix, eps its mean eigenvalue), which
            are those of the step at which each was sampled; "count", the control without hidden states, drops what
            gives the answer that was sampled most often so far, of a tie the last.
        right_at: the reward from which a response is right; None: 1, with a warning where rewards are not 0 or 1.
        most_gb: the store takes no more responses beyond so many 10^9 bytes, and says so once; above 0.

    Metrics:
        kept (responses): number of those in the store
        prompts (prompts): number of those with a response in the store. Healthy: grows, up to the prompts that were
            ever solved. Else: at 0 nothing right was sampled; the start has to learn first
        bytes (bytes): size of the store, in memory and in each checkpoint. Healthy: under `most_gb`. Else: lower
            `capacity`
        replayed (responses): number of those that are held in this step. Healthy: about `share` of the rows. Else: at 0
            with source "prompt" no prompt came twice: set source "any"
        lost (share): of the replays that lie below their floor. Healthy: does not rise for long. Else: raise `coef` or
            `share`
        nats (nats): mean of what a replay lies below its floor, 0 where it does not; without the hinge the floor is 0,
            and every replay lies below it
    """

    needs_scores: ClassVar[bool] = True
    needs_rescoring: ClassVar[bool] = True
    rescores_in_loss: ClassVar[bool] = True
    default_coef: ClassVar[float] = 0.3
    # what it tells; other terms hold answers by it
    title: ClassVar[str] = "right_anchor"
    of_room: ClassVar[str] = "lower capacity, or raise most_gb"
    of_none_again: ClassVar[str] = (
        "so source: prompt holds nothing yet; source: any holds the right answers of all prompts"
    )

    source: Literal["prompt", "any"] = "prompt"
    unit: Literal["response", "token"] = "response"
    hinge: bool = True
    margin: float = 0.0
    capacity: int = 16
    share: float = 1.0
    distinct: Literal["tokens", "answer"] = "tokens"
    answer: str = DEFAULT
    keep: Keep = "first"
    right_at: float | None = None
    most_gb: float = 1.0

    def __post_init__(self) -> None:
        extractor(self.answer)
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            raise ValueError(f"margin is a number of nats, at least 0, got {self.margin}")
        if self.margin and not self.hinge:
            raise ValueError(f"margin belongs to the hinge: with hinge: false leave it out, got {self.margin}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        if self.right_at is not None and not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite reward or None, got {self.right_at}")
        there = psutil.virtual_memory().total
        if not 0 < self.most_gb * GB <= there:
            raise ValueError(f"most_gb must be above 0 and at most this machine's {there / GB:.1f}, got {self.most_gb}")

    @property
    def needs_hidden(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (one way to choose does)
        return self.keep == "log_det"

    def sampled_moments(self) -> tuple[Callable[..., Tensor], ...]:
        return (mean_of_responses,) if self.keep == "log_det" else ()

    def on_rollout(self, rollout: Rollout, memory: dict, may_replay: Bool[Tensor, "N"] | None = None) -> RolloutEffect:
        """`may_replay`: the rows of all processes that may; None: all."""
        tell_of_unclear_rewards(self.title, rollout, self.right_at, memory)
        assert rollout.transcript is not None
        kept, prompt = kept_in(memory), prompt_numbers(rollout)
        is_busy = rollout.everywhere(rollout.mask.any(dim=1)).cpu()
        is_busy = is_busy if may_replay is None else is_busy & may_replay.cpu()
        columns, shared = self.replays(rollout, kept, drawn := self.draw(rollout, kept, prompt, is_busy))
        if kept is not None and self.source == "prompt":
            self._tell_if_none_came_again(kept, prompt, memory)
        kept = self.with_new(rollout, kept, prompt, memory)
        kept.save(memory)
        metrics = {"kept": len(kept), "prompts": len(kept.prompt.unique()), "bytes": bytes_of(kept, memory)}
        metrics["replayed"] = int((drawn >= 0).sum())
        return RolloutEffect(
            columns=columns,
            shared=shared,
            metrics={name: torch.tensor(float(value)) for name, value in metrics.items()},
        )

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if "replay" not in batch.columns:
            return Effect()
        kept, number = batch.shared, batch.columns["replay"]
        replays = number >= 0
        # the same calls on every process, and at least one row in each: a sharded model is read by all or by none
        read, place = torch.unique(number.where(replays, number.max().clamp(min=0)), return_inverse=True)
        lost = self._lost_of(batch, read)[place]
        # on the row's first token; the trainer divides by the tokens of the step, `weight` has them
        is_first = batch.mask & (batch.mask.cumsum(dim=1) == 1) & replays.unsqueeze(1)
        of_row = (lost * kept["weight"].to(lost)).unsqueeze(1)
        seen = [in_double(x[replays].sum()) for x in (replays, lost.detach() > 0, lost.detach())]
        return Effect(
            loss=torch.where(is_first, of_row, 0.0),
            affected=batch.mask & (replays & (lost > 0)).unsqueeze(1),
            metrics={
                "lost": Total(sums=(seen[1], seen[0]), form=ratio),
                "nats": Total(sums=(seen[2], seen[0]), form=ratio),
            },
        )

    def _lost_of(self, batch: TokenBatch, rows: Int[Tensor, "R"]) -> Float[Tensor, "R"]:
        """What these of the shared texts have lost, with gradient where they have lost anything."""
        if not self.is_one_sided:
            return self._read(batch, rows)
        with torch.no_grad():
            found = self._read(batch, rows)
        below = found > 0
        below[0] |= ~below.any()
        return found.masked_scatter(below, self._read(batch, rows[below]))

    def _read(self, batch: TokenBatch, rows: Int[Tensor, "R"]) -> Float[Tensor, "R"]:
        kept = {name: x[rows] for name, x in batch.shared.items() if x.dim() > 0}
        names = ("prompt_ids", "prompt_mask", "ids", "present")
        now, _ = batch.score(Transcript(**trimmed({name: kept[name] for name in names})))
        return self.lost(kept["logps"][:, : now.size(1)], now, kept["mask"][:, : now.size(1)])

    @property
    def is_one_sided(self) -> bool:
        """Whether many responses have no gradient, so that a pass without it, which says which, pays for itself."""
        return self.hinge and self.unit == "response"

    def lost(
        self, first: Float[Tensor, "R T"], now: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]
    ) -> Float[Tensor, "R"]:
        """Each response's loss: nats below its floor; without the hinge, below 0."""
        if not self.hinge:
            return -torch.where(mask, now, 0.0).sum(dim=1)
        gap = torch.where(mask, first - now, 0.0)
        if self.unit == "response":
            return beyond(gap.sum(dim=1) - self.margin, AS_BEFORE * mask.sum(dim=1))
        return beyond(gap - self.margin, AS_BEFORE).sum(dim=1)

    def draw(
        self, rollout: Rollout, kept: RightAnswers | None, prompt: Int[Tensor, "N"], is_busy: Bool[Tensor, "N"]
    ) -> Int[Tensor, "N"]:
        """The stored response that each row of all processes replays, -1 for none."""
        count = len(prompt)
        order = torch.randperm(count, generator=rollout.generator)
        at = torch.randint(2**62, (count,), generator=rollout.generator)
        chooses = torch.zeros(count, dtype=torch.bool)
        chooses[order[: math.ceil(self.share * count - ROUNDING)]] = True
        if kept is None or not len(kept):
            return torch.full((count,), -1)
        picked = picked_from(kept.prompt, prompt, at, of_any=self.source == "any")
        return torch.where(chooses & is_busy, picked, -1)

    def replays(
        self, rollout: Rollout, kept: RightAnswers | None, drawn: Int[Tensor, "N"]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The drawn texts (n, T), which every process has, and which of them each row (N,) of this one replays."""
        replays = drawn >= 0
        tokens = rollout.total(rollout.mask.sum()).item()  # on every process, whether there is a replay or not
        if kept is None or not replays.any():
            return {}, {}
        read, place = torch.unique(drawn[replays], return_inverse=True)
        chosen = kept.rows(read)
        shared = chosen.padded()
        replayed = int(shared["mask"].sum(dim=1)[place].sum())
        number = torch.full_like(drawn, -1).masked_scatter(replays, place)
        device = rollout.mask.device
        shared["weight"] = torch.tensor(tokens / max(replayed, 1), dtype=widest(device))
        shared = {name: x.to(device) for name, x in shared.items()}
        return {"replay": rollout.here(number.to(device))}, shared

    def with_new(
        self, rollout: Rollout, kept: RightAnswers | None, prompt: Int[Tensor, "N"], memory: dict
    ) -> RightAnswers:
        """The store with this rollout's right responses that it has not, from all processes."""
        new = self._right_ones(rollout, prompt)
        kept = new.rows(torch.zeros(0, dtype=torch.long)) if kept is None else kept
        if (takes := bytes_of(kept, memory)) <= self.most_gb * GB:
            sampled = count_in(memory, new.counted.flatten()) if self.keep == "count" else None
            return kept.with_new(new, self.capacity, self.keep, sampled)
        tell_once(
            memory,
            "full",
            f"{self.title}: the store of right answers takes {takes / GB:.2f} GB, most_gb allows "
            f"{self.most_gb}, so it takes no more than the {len(kept)} responses that it has: {self.of_room}",
        )
        return kept

    def _right_ones(self, rollout: Rollout, prompt: Int[Tensor, "N"]) -> RightAnswers:
        """The rollout's right responses, from all processes."""
        assert rollout.transcript is not None
        own, extract, mask = rollout.transcript, extractor(self.answer), rollout.mask

        def numbers(rule: Extract | None) -> Int[Tensor, "N"]:
            both = zip(prompts_of(own), said_in(rollout, rule), strict=True)
            return everywhere(torch.tensor([number_of(asked, said) for asked, said in both], device=mask.device))

        states = torch.zeros_like(mask[:, :0]).float()
        if self.keep == "log_det":
            states = means_of_step(rollout).to(states)

        def everywhere(x: Tensor) -> Tensor:
            return rollout.everywhere(x).cpu()

        rewards, counts = everywhere(rollout.rewards), everywhere(mask)
        right = is_right(rewards, self.right_at) & counts.any(dim=1)
        found = unpadded(
            Transcript(**{name: everywhere(x) for name, x in vars(own).items()}),
            counts,
            everywhere(torch.where(mask, rollout.scored()[0].detach(), 0.0)),
            prompt=prompt,
            answer=numbers(extract if self.distinct == "answer" else None),
            step=rollout.step,
            states=everywhere(states),
            counted=numbers(extract).unsqueeze(1) if self.keep == "count" else prompt.new_zeros(len(prompt), 0),
        )
        return found.rows(right)

    def _tell_if_none_came_again(self, kept: RightAnswers, prompt: Int[Tensor, "N"], memory: dict) -> None:
        memory["alone"] = memory.get("alone", 0) + 1 if not torch.isin(prompt, kept.prompt).any() else -math.inf
        if memory["alone"] >= PATIENCE:
            tell_once(
                memory,
                "seldom",
                f"{self.title}: no prompt with a right answer has come again in {PATIENCE} rollouts, "
                f"{self.of_none_again}",
            )
