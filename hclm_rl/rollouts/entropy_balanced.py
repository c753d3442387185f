"""AEPO, agentic entropy-balanced policy optimisation: Dong et al., 2025, arXiv:2510.14545; the rollout"""

import math
from dataclasses import dataclass
from typing import ClassVar

from .strategy import Asked, Response, RolloutStrategy
from .trees import Measure, Reduction, Tree, grow, new_trees, responses_of, start, take_turn


def fresh(budget: int, root_entropy: float, tool_entropy: float, beta: float) -> int:
    """m of `budget` trajectories begin at the prompt: int(k sigmoid(beta (H_root - H_tool))) + 1, at most k."""
    share = 0.5 * (1 + math.tanh(beta * (root_entropy - tool_entropy) / 2))  # the sigmoid, which overflows nowhere
    return min(max(int(budget * share) + 1, 1), budget)


def begins(change: float, number: float, in_a_row: int, gamma: float, threshold: float, penalty: float) -> bool:
    """Whether a branch begins: clip((u + gamma dH) (1 - penalty l), 0, 1) >= threshold, u = `number`."""
    score = (number + gamma * change) * max(0.0, 1 - penalty * in_a_row)
    return min(max(score, 0.0), 1.0) >= threshold


@dataclass(frozen=True, kw_only=True)
class EntropyBalanced(RolloutStrategy):
    """Divides a group between fresh trajectories and branches behind tools' replies, by where the uncertainty is.

    The first trajectory of a prompt is looked at: H_root is the entropy of its first segment, H_tool the mean of those
    behind replies (H_root where there are none). Then m = int(k sigmoid(beta (H_root - H_tool))) + 1 of the k =
    num_generations begin at the prompt, this one among them, and the rest are branches, as in `arpo`: one begins when
    clip((u + gamma dH) max(0, 1 - penalty l), 0, 1) >= threshold, with u uniform and l the branches of the prompt since
    an attempt that made none. At l = 0 that is with probability 1 - threshold + gamma dH. H is measured as in `arpo`.

    Where the sources differ or are silent: the authors' code averages all segments for H_tool, the paper those behind
    replies, as here; here the trajectory looked at is kept, and gets no branches. What the branches leave over begins
    at the prompt. In the authors' scripts this part is off; the term `entropy_balanced` is the others. A run without
    tools is refused.

    Args:
        beta: of the difference of entropies, at least 0; the authors' value
        gamma: of dH, at least 0; the authors' value
        threshold: in [0, 1]; the authors' value
        penalty: off a branch's score for each before it in a row, in [0, 1]; the authors' value
        beam: 1 more than the attempts at a branch a reply, at least 1, where nothing branches; the authors' value
        tokens: of a segment, at least 1; the authors' value
        candidates: likeliest words, at least 1; the authors' value
        reduction: over the tokens, "sum" as in the authors' code, or "mean"

    Metrics:
        fresh (share): of the trajectories, m / k
        branched (share): of the trajectories, those that began behind a reply
        root_entropy (log V): mean H_root over the prompts
        tool_entropy (log V): mean H_tool over the prompts
    """

    needs_tools: ClassVar[bool] = True

    beta: float = 0.5
    gamma: float = 0.2
    threshold: float = 0.5
    penalty: float = 0.05
    beam: int = 2
    tokens: int = 20
    candidates: int = 10
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        for name in ("threshold", "penalty"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("beam", "tokens", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")

    def __call__(self, asked: Asked) -> list[Response]:
        measure = Measure(tokens=self.tokens, candidates=self.candidates, reduction=self.reduction)
        trees = new_trees(asked, measure)
        for tree in trees:
            start(asked, tree, 1)
        while any(tree.live for tree in trees):
            take_turn(asked, trees, measure)
        found, counts = [], []
        for tree in trees:
            root, *behind = tree.made[0].entropies
            tool = math.fsum(behind) / len(behind) if behind else root
            found.append((root, tool))
            counts.append(fresh(tree.budget, root, tool, self.beta))
            start(asked, tree, counts[-1] - 1)

        def branches(tree: Tree, change: float, number: float) -> bool:
            return begins(change, number, tree.in_a_row, self.gamma, self.threshold, self.penalty)

        grow(asked, trees, measure, self.beam - 1, branches)
        asked.note("fresh", [count / tree.budget for count, tree in zip(counts, trees, strict=True)])
        asked.note("branched", [float(each.branch.shared > 0) for tree in trees for each in tree.made])
        asked.note("root_entropy", [root for root, _ in found])
        asked.note("tool_entropy", [tool for _, tool in found])
        return responses_of(trees)
