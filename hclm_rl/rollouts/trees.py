"""Trees of trajectories with tools: which trajectory gets a branch behind a tool's reply, within a budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..equations.functional import per_token
from ..types import Rollout, RolloutEffect, Term
from .branch import Branch
from .sampler import Sampler
from .strategy import Asked, Response

Reduction = Literal["sum", "mean"]


def segment_entropy(of_likeliest: Sequence[float], words: int, tokens: int, reduction: Reduction) -> float:
    """H of a segment: over its first `tokens` tokens, -sum p log p of the likeliest words each, in units of log V."""
    some = of_likeliest[:tokens]
    total = math.fsum(some) / math.log(words)
    return total if reduction == "sum" or not some else total / len(some)


@dataclass(eq=False)
class Trajectory:
    """A branch, and the entropies of the segments that it drew itself."""

    branch: Branch
    entropies: list[float] = field(default_factory=list)
    read: int = 0  # tokens before the segment that is drawn next

    @property
    def change(self) -> float:
        """Of the entropy, from the first segment to the last."""
        return self.entropies[-1] - self.entropies[0] if self.entropies else 0.0


@dataclass(eq=False)
class Tree:
    """The trajectories of one prompt."""

    prompt: int
    root: Branch
    budget: int
    made: list[Trajectory] = field(default_factory=list)
    live: list[Trajectory] = field(default_factory=list)
    attempts: int = 0  # at a branch
    in_a_row: int = 0  # branches since an attempt that made none

    @property
    def missing(self) -> int:
        """Responses that are still to be made."""
        return self.budget - len(self.made)


# (tree, change of the trajectory's entropy, a number in [0, 1)) -> whether a branch begins
Decision = Callable[[Tree, float, float], bool]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How uncertain a segment is."""

    tokens: int
    candidates: int
    reduction: Reduction

    def __call__(self, of_likeliest: Sequence[float], sampler: Sampler) -> float:
        return segment_entropy(of_likeliest, sampler.words, self.tokens, self.reduction)


def new_trees(asked: Asked, measure: Measure) -> list[Tree]:
    """One for each prompt, without a trajectory."""
    asked.sampler.likeliest = measure.candidates
    roots = asked.sampler.begin(asked.prompts)
    return [Tree(prompt=p, root=root, budget=asked.responses) for p, root in enumerate(roots)]


def start(asked: Asked, tree: Tree, count: int) -> None:
    """So many fresh trajectories."""
    for _ in range(count):
        branch = tree.root.fork(0, asked.stream(tree.prompt, len(tree.made)))
        if asked.tools is not None:
            asked.tools.begin(branch, tree.prompt)
        tree.made.append(Trajectory(branch))
        tree.live.append(tree.made[-1])


def take_turn(asked: Asked, trees: Sequence[Tree], measure: Measure) -> None:
    """Draws a segment for each live trajectory and runs the tools that it calls; the others are done."""
    live = [each for tree in trees for each in tree.live]
    asked.sampler.extend([each.branch for each in live])
    for each in live:
        if segment := each.branch.of_likeliest[each.read :]:
            each.entropies.append(measure(segment, asked.sampler))
    going = set(map(id, asked.sampler.answered([each.branch for each in live], asked.tools)))
    for tree in trees:
        tree.live = [each for each in tree.live if id(each.branch) in going]
        for each in tree.live:
            each.read = len(each.branch.ids)


def branch_off(asked: Asked, tree: Tree, attempts: int, branches: Decision) -> None:
    """In order, for each live trajectory: a branch is a copy of its text with the reply just made."""
    for each in list(tree.live):
        for _ in range(attempts):
            if tree.missing < 1 or not asked.sampler.is_open(each.branch):
                break
            tree.attempts += 1
            number = asked.stream(tree.prompt, "attempt", tree.attempts).random()
            if not branches(tree, each.change, number):
                tree.in_a_row = 0
                continue
            tree.in_a_row += 1
            new = each.branch.fork(each.read, asked.stream(tree.prompt, len(tree.made)))
            if asked.tools is not None:
                asked.tools.copy(new)
            tree.made.append(Trajectory(new, read=each.read))
            tree.live.append(tree.made[-1])


def grow(asked: Asked, trees: Sequence[Tree], measure: Measure, attempts: int, branches: Decision) -> None:
    """Until every tree has its budget and no trajectory is live; what branches leave over begins at the prompt."""
    while True:
        for tree in trees:
            if not tree.live:
                start(asked, tree, tree.missing)
        if not any(tree.live for tree in trees):
            return
        take_turn(asked, trees, measure)
        for tree in trees:
            branch_off(asked, tree, attempts, branches)


def responses_of(trees: Sequence[Tree], name: str | None = None) -> list[Response]:
    """In the order in which they were begun; with a name they say whose branch each is, for `SharedCredit`."""
    found = []
    for tree in trees:
        number = {id(each.branch): i for i, each in enumerate(tree.made)}
        for each in tree.made:
            parent = number.get(id(each.branch.parent), -1)
            columns = {} if name is None else {f"{name}_parent": parent, f"{name}_shared": each.branch.shared}
            found.append(replace(each.branch.response(), columns=columns))
    return found


def shared_credit(
    advantages: Float[Tensor, "G T"], parents: Int[Tensor, "G"], shared: Int[Tensor, "G"]
) -> Float[Tensor, "G T"]:
    """Of one group: the mean advantage of the rows that a token is in; parents stand before their branches."""
    rows, width = advantages.shape
    owner = torch.arange(rows, device=advantages.device)[:, None].repeat(1, width)
    for i, (parent, length) in enumerate(zip(parents.tolist(), shared.tolist(), strict=True)):
        if parent >= 0:
            owner[i, :length] = owner[parent, :length]
    sums = torch.zeros_like(advantages).scatter_add(0, owner, advantages)
    counts = torch.zeros_like(advantages).scatter_add(0, owner, torch.ones_like(advantages))
    return (sums / counts.clamp(min=1)).gather(0, owner)


@dataclass(frozen=True, kw_only=True)
class SharedCredit(Term):
    """Gives tokens that several trajectories share the mean of these trajectories' advantages."""

    shapes_advantages: ClassVar[bool] = True

    rollout: str  # whose columns say what is shared

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        advantages = per_token(rollout.advantages, rollout.mask)
        parents, shared = (
            torch.tensor([row[f"{self.rollout}_{what}"] for row in rollout.rows], device=advantages.device)
            for what in ("parent", "shared")
        )
        size = rollout.group_rewards.shape[1]
        groups = zip(advantages.split(size), parents.split(size), shared.split(size), strict=True)
        return RolloutEffect(advantages=torch.cat([shared_credit(*each) for each in groups]))
