"""Multiply a number of three digits by one of one digit: one right answer, an exact verifier.

Prompt, always 6 tokens: `4 7 3 * 8 =`. Completion: the digits of the product, `3 7 8 4`, and the end of text: at most
5 tokens. The four splits share no question.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

import datasets

from hclm_rl.testbed.task import Row, Task

LEFT, RIGHT = range(100, 1000), range(2, 10)
MAX_COMPLETION_LENGTH = 5  # tokens: four digits and the end of text

Split = Literal["warm_start", "train", "validation", "test"]
# eighths of all questions; those of the warm start are its alone, so that a policy knows the training prompts no better
# than the held-out ones
BUCKETS: dict[str, range] = {
    "test": range(1),
    "validation": range(1, 2),
    "train": range(2, 3),
    "warm_start": range(3, 8),
}


def bucket_of(left: int, right: int) -> int:
    """0 to 7, fixed by a hash, so that the splits are disjoint whatever the seeds."""
    return hashlib.sha256(f"{left} {right}".encode()).digest()[0] % 8


def questions_of(split: Split) -> list[tuple[int, int]]:
    """All questions of a split. Refuses another split."""
    if split not in BUCKETS:
        raise ValueError(f"split must be one of {', '.join(BUCKETS)}, got {split!r}")
    return [(left, right) for left in LEFT for right in RIGHT if bucket_of(left, right) in BUCKETS[split]]


def spelt(number: int) -> str:
    """473 as `4 7 3`: a word a digit."""
    return " ".join(str(number))


def random_questions(split: Split, seed: int) -> Iterator[tuple[int, int]]:
    """The questions of a split in random order."""
    questions = questions_of(split)
    random.Random(f"{split} {seed}").shuffle(questions)
    yield from questions


def answer(row: Row, completion: str) -> str | None:
    """The number in canonical form; None for anything but digits without a leading zero."""
    digits = completion.split()
    if not digits or any(digit not in "0123456789" or len(digit) != 1 for digit in digits) or digits[0] == "0":
        return None
    return "".join(digits)


def is_correct(row: Row, completion: str) -> bool:
    """Whether the product that stands in the completion is the right one."""
    return answer(row, completion) == str(row["left"] * row["right"])


def correct_product(completions: list[str], left: list[int], right: list[int], **columns: object) -> list[float]:
    """TRL reward: 1 for the right product, else 0."""
    rows = [{"left": a, "right": b} for a, b in zip(left, right, strict=True)]
    return [float(is_correct(row, text)) for row, text in zip(rows, completions, strict=True)]


def make_dataset(split: Split, questions: int, seed: int) -> datasets.Dataset:
    """Columns prompt, left, right. Refuses more questions than the split has."""
    drawn = [pair for pair, _ in zip(random_questions(split, seed), range(questions), strict=False)]
    if len(drawn) < questions:
        raise ValueError(f"the split {split} has {len(drawn)} questions, {questions} were asked for")
    return datasets.Dataset.from_list(
        [{"prompt": f"{spelt(a)} * {spelt(b)} =", "left": a, "right": b} for a, b in drawn]
    )


def make_task(
    prompts: int = 384,
    eval_prompts: int = 384,
    seed: int = 0,
    eval_seed: int = 0,
    eval_split: Split = "validation",
) -> Task:
    """Choose settings with `eval_split` "validation", report with "test"."""
    return Task(
        train_dataset=make_dataset("train", prompts, seed),
        eval_dataset=make_dataset(eval_split, eval_prompts, eval_seed),
        reward_funcs=[correct_product],
        answer=answer,
        is_correct=is_correct,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
