"""One optimiser step of a small made-up policy, as both stages of a chain see it: the batches of the terms' tests.

8 responses to 2 prompts, up to 6 tokens, hidden states of width 4, a vocabulary of 11. Values are random from a
generator of their own, and off-policy: the policy has moved since it sampled. The last four responses leave the last
slot empty, so that they can be on a process with a narrower batch.
"""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl.trainer.utils import nanstd

from hclm_rl import Chain, Constant, Link, Rollout, Term, TokenBatch, Transcript
from hclm_rl.chain.chain import Outcome, RolloutOutcome, per_token
from hclm_rl.equations.vocab import Head, entropy_by_head, over_vocab, slope_along, slope_by_head
from hclm_rl.types import Attention

LENGTHS = (6, 4, 6, 3, 5, 2, 1, 5)
WORDS = ("so", "it", "is", "4", "wait", "let", "me", "see", "check", "then", ".")
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="."))
)
TOKENIZER.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


@dataclass(frozen=True, kw_only=True)
class Step:
    """All responses of a step; `old_` is the sampling policy. Change a part with dataclasses.replace."""

    ids: Tensor
    mask: Tensor
    old_logps: Tensor
    old_entropy: Tensor
    old_hidden: Tensor
    logps: Tensor
    entropy: Tensor
    hidden: Tensor
    head: Tensor
    rewards: Tensor
    group_size: int

    @property
    def groups(self) -> Tensor:
        """(P, G) rewards of each prompt."""
        return self.rewards.view(-1, self.group_size)

    @property
    def reward_scale(self) -> Tensor:
        """TRL's default: the deviation of the group plus 1e-4; NaN where fewer than two responses were scored."""
        return (nanstd(self.groups, dim=1) + 1e-4).repeat_interleave(self.group_size)

    @property
    def advantages(self) -> Tensor:
        """GRPO's, as TRL hands them to the terms: 0 where the group has no deviation."""
        return torch.nan_to_num(centred(self.rewards, self.group_size) / self.reward_scale, nan=0.0)


def centred(rewards: Tensor, group_size: int) -> Tensor:
    """R - mean of the group."""
    groups = rewards.view(-1, group_size)
    return (groups - groups.nanmean(dim=1, keepdim=True)).view(-1)


def of_head(hidden: Tensor, head: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the sampled tokens and entropy in nats."""
    logps = (hidden @ head.T).log_softmax(-1)
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


def make_step(seed: int = 0, dtype: torch.dtype = torch.float32) -> Step:
    """Spread entropies, graded rewards, a policy that has moved."""
    source = torch.Generator().manual_seed(seed)
    n, t, width, vocabulary = len(LENGTHS), max(LENGTHS), 4, 11
    head = 1.5 * torch.randn(vocabulary, width, generator=source, dtype=dtype)
    old_hidden = torch.randn(n, t, width, generator=source, dtype=dtype)
    hidden = old_hidden + 0.3 * torch.randn(n, t, width, generator=source, dtype=dtype)
    ids = torch.randint(vocabulary, (n, t), generator=source)
    old_logps, old_entropy = of_head(old_hidden, head, ids)
    logps, entropy = of_head(hidden, head, ids)
    return Step(
        ids=ids,
        mask=torch.arange(t) < torch.tensor(LENGTHS).unsqueeze(1),
        old_logps=old_logps,
        old_entropy=old_entropy,
        old_hidden=old_hidden,
        logps=logps,
        entropy=entropy,
        hidden=hidden,
        head=head,
        rewards=torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.25, 0.0], dtype=dtype),
        group_size=4,
    )


def whole_texts(transcript: Transcript) -> tuple[Tensor, Tensor, int]:
    """(ids, mask, length of the completion)."""
    ids = torch.cat([transcript.prompt_ids, transcript.ids], dim=1)
    return ids, torch.cat([transcript.prompt_mask, transcript.present], dim=1), transcript.ids.size(1)


def read(head: Tensor, transcript: Transcript) -> tuple[Tensor, Tensor]:
    """Rollout.score of a made-up model, whose state is the sum of the head's rows of the tokens read so far."""
    head, (ids, mask, tail) = head.double(), whole_texts(transcript)
    states = torch.where(mask.unsqueeze(2), head[ids], 0.0).cumsum(dim=1)
    logps, entropy = of_head(states[:, -tail - 1 : -1], 0.3 * head, ids[:, -tail:])
    return logps.float(), entropy.float()


def rollout(step: Step, rows: slice = slice(None), **changes: object) -> Rollout:
    """Stage 1's view of some rows; `changes` replace fields."""
    count = len(step.ids[rows])
    group = torch.arange(len(step.ids)) // step.group_size
    whole = Rollout(
        ids=step.ids[rows],
        mask=step.mask[rows],
        advantages=step.advantages[rows],
        rewards=step.rewards[rows],
        reward_parts=step.rewards[rows].unsqueeze(1),
        group_rewards=step.groups[group[rows]],
        group=group[rows],
        reward_scale=step.reward_scale[rows],
        logps=step.old_logps[rows],
        entropy=step.old_entropy[rows],
        ref_logps=step.old_logps[rows],
        beta=0.1,
        prompts=["2 + 2 = ?"] * count,
        texts=[rf"so it is \boxed{{{i % 3}}}" for i in range(len(step.ids))][rows],
        rows=[{"solution": WORDS[i % 11]} for i in range(len(step.ids))][rows],
        tokenizer=TOKENIZER,
        transcript=transcript_of(step.ids[rows], step.mask[rows], group[rows]),
        score=lambda transcript, scorer="policy": read(step.head, transcript),
        progress=0.5,
        step=3,
        generator=torch.Generator().manual_seed(1),
        **reads_of_rollout(step.old_hidden[rows], step.ids[rows], step.head, step.mask[rows]),
    )
    return replace(whole, **changes)


def reads_of_rollout(hidden: Tensor, ids: Tensor, head: Tensor, mask: Tensor | None = None) -> dict[str, Callable]:
    """What a rollout makes of hidden states."""
    return {
        "hidden": lambda: hidden,
        "reference_hidden": lambda: 0.5 * hidden.flip(2),
        "over_vocab": lambda functional: over_vocab(functional, hidden, Head(weight=head), mask=mask),
        "slope": lambda direction: slope_along(direction, hidden, ids, Head(weight=head)),
        "entropy_by_head": lambda tokens: entropy_by_head(hidden, Head(weight=head), tokens),
        "slope_by_head": lambda direction, tokens: slope_by_head(direction, hidden, ids, Head(weight=head), tokens),
    }


def token_batch(step: Step, rows: slice | Tensor = slice(None), **changes: object) -> TokenBatch:
    """Stage 2's view of some rows; log-probs, entropies and hidden states are leaves that collect gradients."""
    mask = step.mask[rows]
    hidden = step.hidden[rows].clone().requires_grad_()
    whole = TokenBatch(
        ids=step.ids[rows],
        mask=mask,
        logps=step.logps[rows].clone().requires_grad_(),
        old_logps=step.old_logps[rows],
        entropy=step.entropy[rows].clone().requires_grad_(),
        advantages=per_token(step.advantages[rows], mask),
        ref_logps=step.old_logps[rows],
        rewards=step.rewards[rows],
        group_rewards=step.groups.repeat_interleave(step.group_size, dim=0)[rows],
        progress=0.5,
        step=3,
        generator=torch.Generator().manual_seed(2),
        **reads_of_batch(hidden, mask, step.head),
    )
    return replace(whole, **changes)


def reads_of_batch(hidden: Tensor, mask: Tensor, head: Tensor) -> dict[str, Callable]:
    """What a micro-batch makes of hidden states; other texts' log-probs too hang on those of its tokens."""

    def score(transcript: Transcript, scorer: str = "policy") -> tuple[Tensor, Tensor]:
        nudge = 0.1 * torch.where(mask.unsqueeze(2), hidden, 0).mean()
        logps, entropy = read(head, transcript)
        return logps + nudge, entropy + nudge

    return {
        "hidden": lambda: hidden,
        "attention": lambda: attention_of(hidden),
        "over_vocab": lambda functional: over_vocab(functional, hidden, Head(weight=head), mask=mask),
        "score": score,
    }


def transcript_of(ids: Tensor, mask: Tensor, group: Tensor | None = None) -> Transcript:
    """Behind a prompt of four tokens, of which the first of the later prompts are padding; without groups, of two.

    All up to the last response token is present, a tool's tokens in between too.
    """
    present = mask.flip(1).cumsum(dim=1).flip(1) > 0
    if group is None:
        prompt = torch.tensor([[1, 2]]).expand(len(ids), 2)
        return Transcript(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt).bool(), ids=ids, present=present)
    prompt, is_there = (torch.arange(4) + 3 * group.unsqueeze(1)) % 11, torch.arange(4) >= group.unsqueeze(1)
    return Transcript(prompt_ids=prompt, prompt_mask=is_there, ids=ids, present=present)


def reading(transcript: Transcript, head: Tensor) -> Tensor:
    """A policy that scores tokens by the mean of the two before them: what stood earlier changes log-probs, no more."""
    ids = torch.cat([transcript.prompt_ids, transcript.ids], dim=1)
    width = transcript.ids.size(1)
    state = head[ids]
    before = (state[:, -width - 1 : -1] + state[:, -width - 2 : -2]) / 2
    return (before @ head.T).log_softmax(-1).gather(-1, transcript.ids.unsqueeze(-1)).squeeze(-1)


def attention_of(hidden: Tensor) -> Attention:
    """As many made-up heads as the states are wide, after a prompt of three tokens; linear, so that NaN stays."""
    b, t, _ = hidden.shape
    visible = (torch.arange(t) + 3).expand(b, 1, t)
    largest = visible.to(hidden.dtype).log()
    return Attention(entropy=largest * (0.5 + 0.2 * hidden.transpose(1, 2)), visible=visible, width=t + 3)


def one_link(term: Term) -> Chain:
    """A chain of this term alone."""
    return Chain((Link(name="link", term=term, coef=Constant(coefficient=1.0)),))


def always_the_same(link: str) -> torch.Generator:
    """The generator of a link: in the same state on all processes."""
    return torch.Generator().manual_seed(7)


def first_stage(term: Term, view: Rollout, memory: dict, coef: float = 1.0, group_size: int = 4) -> RolloutOutcome:
    """Stage 1 of a chain of one link; shaped rewards are centred within their groups, over all processes."""

    def renormalise(rewards: Tensor) -> tuple[Tensor, Tensor]:
        groups = view.everywhere(rewards).view(-1, group_size)[view.group]
        return torch.nan_to_num(rewards - groups.nanmean(dim=1), nan=0.0), torch.ones_like(rewards)

    return one_link(term).on_rollout(view, {"link": memory}, {"link": coef}, always_the_same, renormalise)


def second_stage(
    term: Term,
    batch: TokenBatch,
    first: RolloutOutcome,
    memory: dict,
    rows: slice | Tensor = slice(None),
    coef: float = 1.0,
) -> Outcome:
    """Stage 2 of a chain of one link, given what stage 1 made of the rows, as the trainers hand it over."""
    advantages = batch.advantages if first.advantages is None else per_token(first.advantages[rows], batch.mask)
    columns = {name: column[rows] for name, column in first.columns.items()}
    batch = replace(batch, advantages=advantages, columns=columns, shared=first.shared)
    affected = {name: value[rows] for name, value in first.affected.items()}
    return one_link(term)(batch, {"link": memory}, {"link": coef}, always_the_same, affected)


def both_stages(
    term: Term, step: Step, coef: float = 1.0, memory: dict | None = None, **changes: object
) -> tuple[TokenBatch, Tensor, Outcome]:
    """The whole step as one micro-batch: the batch, its advantages (N, T) afterwards, and all that was asked for."""
    memory = {} if memory is None else memory
    first = first_stage(term, rollout(step), memory, coef, step.group_size)
    batch = token_batch(step, **changes)
    outcome = second_stage(term, batch, first, memory, coef=coef)
    left = batch.advantages if first.advantages is None else per_token(first.advantages, batch.mask)
    return batch, left if outcome.advantages is None else outcome.advantages, outcome


def surrogate(batch: TokenBatch, advantages: Tensor) -> Tensor:
    """PPO's token loss, -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), r = exp(logp - logp_old): (B, T)."""
    ratio = (batch.logps - batch.old_logps).exp()
    clipped = ratio.clamp(1 - batch.clip_range[0], 1 + batch.clip_range[1])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def mean_over(mask: Tensor, values: Tensor) -> Tensor:
    """The mean over the tokens that count."""
    return values[mask].mean()


class Processes:
    """A barrier and a table: what the processes of a run tell one another."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier, self._said = count, threading.Barrier(count, timeout=20), [torch.empty(0)] * count

    def gather(self, rank: int, x: Tensor) -> list[Tensor]:
        """Every process's x, in order; all must call it."""
        self._said[rank] = x
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said

    def everywhere(self, rank: int, x: Tensor) -> Tensor:
        """All rows, padded with zeros to the widest."""
        said = self.gather(rank, x)
        width = max(rows.size(1) for rows in said) if x.dim() > 1 else 0
        return torch.cat([fit(rows, width) if x.dim() > 1 else rows for rows in said])

    def views(self, step: Step, widths: Sequence[int]) -> list[Rollout]:
        """Stage 1's view on each process; `widths`: the slots of its batch."""
        n = len(step.ids) // self.count

        def view(rank: int, width: int) -> Rollout:
            rows = slice(rank * n, (rank + 1) * n)
            names = ("ids", "mask", "old_logps", "old_entropy", "old_hidden")
            narrow = replace(step, **{name: getattr(step, name)[:, :width] for name in names})
            return rollout(
                narrow,
                rows,
                everywhere=lambda x: self.everywhere(rank, x),
                here=lambda x: x[rows, :width] if x.dim() > 1 else x[rows],
                total=lambda x: torch.stack(self.gather(rank, x)).sum(dim=0),
            )

        return [view(rank, width) for rank, width in enumerate(widths)]

    def run(self, work: Callable[[int], object]) -> list:
        """work(rank) of all processes at the same time."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))


def fit(x: Tensor, width: int) -> Tensor:
    """x (N, T, ...) with zeros up to `width` columns."""
    return torch.cat([x, x.new_zeros(len(x), width - x.size(1), *x.shape[2:])], dim=1)


def card_step(
    mask: list[list[int]],
    logps: list[list[float]],
    old_logps: list[list[float]],
    advantages: list[list[float]],
    entropy: list[list[float]] | None = None,
) -> tuple[Rollout, TokenBatch]:
    """Both views of a method card's worked example, in float64: what the card leaves out is 0."""
    values = [torch.tensor(x, dtype=torch.float64) for x in (logps, old_logps, advantages, entropy or logps)]
    blank, counts = torch.zeros_like(values[0]), torch.tensor(mask).bool()
    step = Step(
        ids=torch.zeros(blank.shape, dtype=torch.long),
        mask=counts,
        logps=values[0],
        old_logps=values[1],
        entropy=values[3],
        old_entropy=values[3],
        hidden=blank.unsqueeze(2),
        old_hidden=blank.unsqueeze(2),
        head=blank.new_zeros(1, 1),
        rewards=blank[:, 0],
        group_size=len(blank),
    )
    return rollout(step, advantages=values[2]), token_batch(step, advantages=values[2])


def grpo(groups: Tensor) -> Tensor:
    """GRPO's advantages of (P, G) rewards, row after row: unbiased deviation, eps 1e-4, as TRL has it."""
    scale = (nanstd(groups, dim=1) + 1e-4).repeat_interleave(groups.size(1))
    return torch.nan_to_num(centred(groups.flatten(), groups.size(1)) / scale, nan=0.0)


def groups_view(*groups: list[float], logps: list[list[float]] | None = None, **changes: object) -> Rollout:
    """Stage 1's view of groups of rewards of one size with GRPO's advantages, in float64; a token each at log-prob 0.

    `logps`: those of the tokens of each response instead, however many.
    """
    rewards = torch.tensor(groups, dtype=torch.float64)
    rows = [[0.0]] * rewards.numel() if logps is None else logps
    width = max(map(len, rows)) + 1
    slots = [row + [math.nan] * (width - len(row)) for row in rows]
    view, _ = card_step([[1] * len(row) + [0] * (width - len(row)) for row in rows], slots, slots, slots)
    view = replace(
        view,
        advantages=grpo(rewards),
        rewards=rewards.flatten(),
        group_rewards=rewards.repeat_interleave(rewards.size(1), dim=0),
        group=torch.arange(rewards.numel()) // rewards.size(1),
    )
    return replace(view, **changes)
