"""What a model beside its base no longer answers, problem by problem, and what to do about it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .compare import Samples
from .statistics import Estimate
from .verdict import Verdict

SHOWN, ANSWERS, LONGEST = 10, 3, 400  # problems, answers of each, characters of a prompt
CUT_OFF = 0.1  # share of responses above which the limit of tokens comes first


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A problem that the base answered right in some response and the trained model in none."""

    problem: str
    prompt: str
    right: int  # of the base's responses
    responses: int
    was: list[tuple[str, int]]  # the base's right answers and how often, the commonest first
    is_now: list[tuple[str, int]]  # the trained model's answers


def commonest(answers: Sequence[str | None]) -> list[tuple[str, int]]:
    """The first few, in the order in which they came where equally common."""
    return [("no answer" if each is None else str(each), n) for each, n in Counter(answers).most_common(ANSWERS)]


def lost_problems(base: Sequence[Samples], trained: Sequence[Samples], prompts: Mapping[str, str]) -> list[Lost]:
    """All of them, first those that the base answered right most often: chance took these least likely."""
    found = [
        Lost(
            problem=before.problem,
            prompt=prompts.get(before.problem, "")[:LONGEST],
            right=sum(before.is_right),
            responses=len(before.is_right),
            was=commonest(before.right),
            is_now=commonest(after.answers),
        )
        for before, after in zip(base, trained, strict=True)
        if any(before.is_right) and not any(after.is_right)
    ]
    return sorted(found, key=lambda each: -each.right)


def next_steps(verdict: Verdict | None, trained: Mapping[str, Estimate], samples: int) -> list[str]:
    """What to do, in the order in which to do it."""
    steps = []
    cut_off = trained.get("truncated")
    if cut_off is not None and cut_off.mean > CUT_OFF:
        steps.append(
            f"{100 * cut_off.mean:.0f} % of the responses were cut off: raise --max_new_tokens and judge again."
        )
    if verdict is None:
        return [*steps, "Name the model that training started from, --base MODEL, to see what training cost."]
    given = set(verdict.given)
    if {"sharpened", "support loss"} & given:
        steps += [
            "Sample hotter first (--temperature 1.2): what comes back was not lost, only rare.",
            "Look for the step at which it went: `hclm-rl watch RUN`, and this evaluation on an earlier checkpoint.",
            "Train again: with `hold_coverage` where prompts have several right answers, with TRL's `beta: 0.3` to "
            "`0.5` where they have one (docs/choose.md).",
        ]
    elif given:
        steps += [
            "No right answer is shown to be lost, but the answers got fewer: watch the next run (docs/howto/watch.md).",
            "If pass@k matters to you, hold coverage or a level of entropy (docs/choose.md).",
        ]
    else:
        steps.append("Nothing to mend that these numbers show.")
    if any(signal.is_given is None for signal in verdict.signals) or samples < 64:
        steps.append(f"Draw more responses (--samples {max(4 * samples, 64)}) to see rarer answers.")
    return steps
