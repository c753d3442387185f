"""PrAg, prompt augmentation: Lu et al., 2026, arXiv:2602.03190"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ..types import Rollout, RolloutEffect, Term
from .response import Response
from .strategy import Asked, RolloutStrategy
from .templates import BUILT_IN, Template, template_of

NAME, SCORE = "template", "format_score"  # columns of a response


@dataclass(frozen=True, kw_only=True)
class PromptAugmentation(RolloutStrategy):
    """Asks each prompt in the words of a template drawn anew each time, which keeps responses diverse over many epochs.

    A group has one template, so its baseline compares like with like; where a prompt comes again, another is drawn. The
    reward of a response becomes R + format_weight F, F the share of the template's marks (tags, a closing phrase) that
    its text holds exactly once, 1 where it asks for none, which then cancels in the group. Marks are counted in the
    text with special tokens, each by itself: neither their order nor what stands outside is looked at. A template's
    opener, the first words of the answer, is prompt: it is neither drawn nor trained. Evaluation asks plainly.

    F counts as much as the answer: a right one without tags can have a negative advantage, and all-wrong and all-right
    groups are trained on the format alone. Reward functions get the template's name as the column `template`; TRL logs
    their rewards as they were. Terms that need 0/1 rewards see R + F: set format_weight to 0 beside them.
    Instruction-tuned models may be hurt by foreign templates.

    Args:
        templates: names of those in templates.py, or mappings with name, system, user (with `{question}`), opener and
            once (a list of marks); empty: the 13 kinds of the paper, worded by us, for mathematics
        format_weight: of F beside the reward, at least 0; the paper's value

    Metrics:
        format (share): mean F over the responses. Healthy: rises to near 1
    """

    takes_tools: ClassVar[bool] = False

    templates: Sequence[Any] = ()
    format_weight: float = 1.0

    def __post_init__(self) -> None:
        given = (self.templates,) if isinstance(self.templates, str) else self.templates
        found = tuple(map(template_of, given)) or BUILT_IN
        names = [each.name for each in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"templates has '{twice}' twice: names must differ")
        if not 0 <= self.format_weight < math.inf:
            raise ValueError(f"format_weight must be at least 0 and finite, got {self.format_weight}")
        object.__setattr__(self, "templates", found)

    def term(self) -> Term | None:
        is_scored = self.format_weight and any(each.once for each in self.templates)
        return FormatReward(format_weight=self.format_weight) if is_scored else None

    def asked(self, template: Template, prompt: Any, asked: Asked) -> list[int]:
        """The tokens of a prompt in a template's words, with the opener of its answer."""
        opener = asked.tokenizer(template.opener, add_special_tokens=False)["input_ids"] if template.opener else []
        return [*asked.encode(template.around(prompt)), *opener]

    def __call__(self, asked: Asked) -> list[Response]:
        chosen = [asked.stream(p, NAME).choice(self.templates) for p in range(len(asked.prompts))]
        prompts = [self.asked(each, raw, asked) for each, raw in zip(chosen, asked.raw, strict=True)]
        roots = asked.sampler.begin(prompts)
        rows = [(p, root.fork(0, asked.stream(p, i))) for p, root in enumerate(roots) for i in range(asked.responses)]
        asked.sampler.extend([each for _, each in rows], with_entropies=False)
        texts = asked.tokenizer.batch_decode([each.ids for _, each in rows], skip_special_tokens=False)
        scores = [chosen[p].score(text) for (p, _), text in zip(rows, texts, strict=True)]
        asked.note("format", scores)
        return [
            replace(each.response(**{NAME: chosen[p].name, SCORE: score}), prompt=prompts[p])
            for (p, each), score in zip(rows, scores, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class FormatReward(Term):
    """Adds the format's score, which the rollout read off the text, to the reward."""

    shapes_rewards: ClassVar[bool] = True

    format_weight: float

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        score = torch.tensor([float(row[SCORE]) for row in rollout.rows]).to(rollout.rewards)
        return RolloutEffect(rewards=rollout.rewards + self.format_weight * score)
