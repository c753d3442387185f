"""CURE, critical-token-guided re-concatenation: 2025, arXiv:2508.11016, stage 1; code bytedance/CURE"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from .branch import Branch
from .strategy import Asked, Response, RolloutStrategy


def candidates(
    entropies: Sequence[float], texts: Sequence[str], special: Sequence[bool], top: int, least_characters: int
) -> list[int]:
    """The `top` most uncertain tokens that a branch may sample anew, the most uncertain first.

    Neither the first token, nor a special one, nor one whose text, stripped of white space, is shorter.
    """
    order = sorted(range(len(entropies)), key=lambda t: -entropies[t])
    allowed = [t for t in order if t > 0 and not special[t] and len(texts[t].strip()) >= least_characters]
    return allowed[:top]


@dataclass(frozen=True, kw_only=True)
class Cure(RolloutStrategy):
    """Makes most of a group of branches that sample an uncertain token of an ordinary response anew, and go on.

    Of num_generations responses, one in 1 + `branches` is sampled from the prompt. From each of these so many branches
    start before one of its `top` most uncertain tokens, drawn uniformly; all of one response start at the same place,
    as in the authors' code. Where no token may be it, they start at the prompt. All share the prompt's baseline. The
    prefix of a branch counts as prompt: it is not in the loss. max_completion_length holds prefix and rest together.

    The paper's stage 2 is plain training from stage 1's checkpoint. A branch's advantage credits it for what its prefix
    decided: that is the method.

    Args:
        branches: from each sampled response, at least 1; the authors' value; num_generations is a multiple of one more
        top: candidates, at least 1; the authors' value
        least_characters: of a candidate's text, at least 0; the authors' value, which leaves out digits and brackets;
            a vocabulary of one-character words needs 1
        trains_prefix: whether the loss counts a branch's prefix too; the authors' code does not

    Metrics:
        fork (tokens): mean position of the token that a branch samples anew; 0 where it starts at the prompt
        fork_entropy (nats): mean entropy at that token. Healthy: above the mean of the response
        no_candidate (share): of the sampled responses, those without a candidate. Healthy: near 0. Else: lower
            least_characters
    """

    takes_tools: ClassVar[bool] = False

    branches: int = 3
    top: int = 20
    least_characters: int = 2
    trains_prefix: bool = False

    def __post_init__(self) -> None:
        for name in ("branches", "top"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.least_characters < 0:
            raise ValueError(f"least_characters must be at least 0, got {self.least_characters}")

    def check(self, responses: int) -> None:
        """Refuses a number of responses that is no multiple of a root with its branches."""
        if responses % (1 + self.branches):
            raise ValueError(
                f"cure: num_generations must be a multiple of 1 + branches, {1 + self.branches}, got {responses}"
            )

    def place(self, root: Branch, asked: Asked, stream: random.Random) -> int:
        """Where the branches of a response start."""
        special = set(asked.tokenizer.all_special_ids)
        texts = [asked.tokenizer.decode([word]) for word in root.ids]
        is_special = [word in special for word in root.ids]
        found = candidates(root.entropies, texts, is_special, self.top, self.least_characters)
        return stream.choice(found) if found else 0

    def __call__(self, asked: Asked) -> list[Response]:
        sampler, count = asked.sampler, asked.responses // (1 + self.branches)
        prompts = sampler.begin(asked.prompts)
        roots = [[root.fork(0, asked.stream(p, i)) for i in range(count)] for p, root in enumerate(prompts)]
        sampler.extend([each for some in roots for each in some])
        places = [[self.place(each, asked, asked.stream(p, i, "place")) for i, each in enumerate(some)]
                  for p, some in enumerate(roots)]  # fmt: skip
        forks = [
            [
                root.fork(place, asked.stream(p, i, k))
                for i, (root, place) in enumerate(zip(roots[p], places[p], strict=True))
                for k in range(self.branches)
            ]
            for p in range(len(prompts))
        ]
        sampler.extend([each for some in forks for each in some], with_entropies=False)
        at = [(root, place) for p, some in enumerate(roots) for root, place in zip(some, places[p], strict=True)]
        asked.note("fork", [float(place) for _, place in at])
        asked.note("fork_entropy", [root.entropies[place] for root, place in at if place])
        asked.note("no_candidate", [float(place == 0) for _, place in at])
        return [
            each.response(trains_prefix=self.trains_prefix)
            for originals, others in zip(roots, forks, strict=True)
            for each in [*originals, *others]
        ]
