"""ARPO, agentic reinforced policy optimisation: Dong et al., 2025, arXiv:2507.19849; code RUC-NLPIR/ARPO"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..types import Term
from .strategy import Asked, Response, RolloutStrategy
from .trees import Measure, Reduction, SharedCredit, Tree, grow, new_trees, responses_of, start


def begins(change: float, number: float, weight: float, threshold: float) -> bool:
    """Whether a branch begins: with probability clip(threshold + weight change, 0, 1)."""
    return min(max(number - weight * change, 0.0), 1.0) <= threshold


@dataclass(frozen=True, kw_only=True)
class Arpo(RolloutStrategy):
    """Spends part of a group on branches behind the replies of tools, rather where the entropy rose.

    Of num_generations trajectories, the share `initial` begins at the prompt. Whenever a tool has replied to a live
    one, up to `beam` - 1 times, while the budget lasts: a branch with the reply in it begins with probability
    clip(threshold + weight dH, 0, 1), dH = H of the segment before the reply, less that of the trajectory's first. H =
    sum of -p log p over the segment's first `tokens` tokens and the `candidates` likeliest words, over log V. As in the
    authors' code a segment shorter than that has a smaller H; `reduction: mean` has not, and wants a weight `tokens`
    times as large. What the branches leave over begins at the prompt: the authors' code copies trajectories instead.

    Without tools there is nothing to branch behind: such a run is refused. Environments are copied (`copy.deepcopy`)
    where a branch begins. A group's branches are alike, so its mean is rather that of its largest trees.

    Args:
        initial: share of the trajectories that begin at the prompt, in (0, 1]; the authors' value; rounded, at least 1
        beam: 1 more than the attempts at a branch a reply, at least 1, where nothing branches; the authors' value
        threshold: probability of a branch at dH = 0, in [0, 1]; the authors' value
        weight: of dH; the authors' value for 7B
        tokens: of a segment, at least 1; the authors' value
        candidates: likeliest words, at least 1; the authors' value
        reduction: over the tokens, "sum" as in the authors' code, or "mean"
        attribution: "soft" trains each trajectory on its own advantage, as the authors' code does; "hard", the paper's
            other form, gives tokens that several share the mean of theirs

    Metrics:
        branched (share): of the trajectories, those that began behind a reply
        change (log V): mean dH of the trajectories, over their own segments
    """

    needs_tools: ClassVar[bool] = True

    initial: float = 0.5
    beam: int = 2
    threshold: float = 0.5
    weight: float = 0.2
    tokens: int = 20
    candidates: int = 10
    reduction: Reduction = "sum"
    attribution: Literal["soft", "hard"] = "soft"

    def __post_init__(self) -> None:
        if not 0 < self.initial <= 1:
            raise ValueError(f"initial must be in (0, 1], got {self.initial}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight must be finite, got {self.weight}")
        for name in ("beam", "tokens", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {self.reduction!r}")
        if self.attribution not in ("soft", "hard"):
            raise ValueError(f"attribution must be 'soft' or 'hard', got {self.attribution!r}")

    def term(self) -> Term | None:
        return SharedCredit(rollout="arpo") if self.attribution == "hard" else None

    def __call__(self, asked: Asked) -> list[Response]:
        measure = Measure(tokens=self.tokens, candidates=self.candidates, reduction=self.reduction)
        trees = new_trees(asked, measure)
        for tree in trees:
            start(asked, tree, max(1, round(self.initial * asked.responses)))

        def branches(tree: Tree, change: float, number: float) -> bool:
            return begins(change, number, self.weight, self.threshold)

        grow(asked, trees, measure, self.beam - 1, branches)
        made = [each for tree in trees for each in tree.made]
        asked.note("branched", [float(each.branch.shared > 0) for each in made])
        asked.note("change", [each.change for each in made])
        return responses_of(trees, "arpo" if self.attribution == "hard" else None)
