"""ETMR, entropy-fork tree rollouts: ETTRL, 2025, arXiv:2508.11356; no public code"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .strategy import Asked, Response, RolloutStrategy


def most_uncertain(entropies: Sequence[float], count: int) -> list[int]:
    """The `count` positions with the largest entropies, the largest first; of equal ones the earlier."""
    return sorted(range(len(entropies)), key=lambda t: (-entropies[t], t))[:count]


@dataclass(frozen=True, kw_only=True)
class EntropyFork(RolloutStrategy):
    """Makes a group of trees: one whole response, and others that leave it at its most uncertain tokens.

    Of each tree's root the `forks` tokens with the largest entropies are sampled anew, `branches` times each, with all
    that follows. num_generations is a multiple of 1 + forks x branches, and all leaves are one group: each is a
    response like any other, with its prefix in the loss. If forks were uniform in position, a group would draw (1 + B N
    / 2) / (1 + B N) of the tokens of plain sampling; `rollout/tokens_drawn` counts what it does draw. A root with fewer
    tokens than forks branches more often at those it has.

    What was read of the paper leaves open whether the fork's own token is sampled anew and whether a prefix is trained:
    here both.

    Args:
        forks: of a root, at least 1; the paper's value
        branches: from each fork, at least 1; the paper's value, with 12 trees
        trains_prefix: whether the loss counts the prefix of a branch too, once in each leaf that has it

    Metrics:
        fork (share): mean position of the forks, of the root's length. Healthy: near 0.5 or below. Else: late forks
            give near copies
        fork_entropy (nats): mean entropy at the forks
    """

    takes_tools: ClassVar[bool] = False

    forks: int = 2
    branches: int = 2
    trains_prefix: bool = True

    def __post_init__(self) -> None:
        for name in ("forks", "branches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def leaves(self) -> int:
        """Of a tree."""
        return 1 + self.forks * self.branches

    def check(self, responses: int) -> None:
        """Refuses a number of responses that is no multiple of the leaves of a tree."""
        if responses % self.leaves:
            raise ValueError(
                f"entropy_fork: num_generations must be a multiple of 1 + forks x branches, {self.leaves}, got "
                f"{responses}"
            )

    def __call__(self, asked: Asked) -> list[Response]:
        sampler, trees = asked.sampler, asked.responses // self.leaves
        prompts = sampler.begin(asked.prompts)
        roots = [[root.fork(0, asked.stream(p, i)) for i in range(trees)] for p, root in enumerate(prompts)]
        sampler.extend([each for some in roots for each in some])
        groups, places = [], []
        for p, some in enumerate(roots):
            group = []
            for i, root in enumerate(some):
                found = most_uncertain(root.entropies, self.forks)
                places += [(root, at) for at in found]
                group.append(root)
                for n in range(self.forks * self.branches):
                    group.append(root.fork(found[n // self.branches % len(found)], asked.stream(p, i, n)))
            groups.append(group)
        leaves = [each for group in groups for each in group]
        sampler.extend([each for each in leaves if each.parent not in prompts], with_entropies=False)
        asked.note("fork", [at / len(root.ids) for root, at in places])
        asked.note("fork_entropy", [root.entropies[at] for root, at in places])
        return [each.response(trains_prefix=self.trains_prefix) for each in leaves]
