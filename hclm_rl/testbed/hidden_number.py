"""Find a hidden number by asking: several turns, each answered by a tool, and an answer that needs what it said.

Prompt: `3 14 >`, the smallest and the largest number it may be. A turn `call ask number 8 <eos>` is answered by the
tool with `: higher >`, `: lower >` or `: right >`; the last turn is `say 11 <eos>`. Right iff the number said is the
hidden one. With up to QUESTIONS questions halving always finds it, and asking anything else mostly does not.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets

from hclm_rl.responses.answers import own_last_words
from hclm_rl.testbed.task import Row, Task

NUMBERS = range(32)
WIDTHS = range(6, 16)  # how many numbers it may be
QUESTIONS = 3
TURN, REPLY, ANSWER = 5, 3, 3  # tokens of a question, of the tool's reply and of the answer
MAX_COMPLETION_LENGTH = QUESTIONS * (TURN + REPLY) + TURN

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`hidden` is one of the numbers from `low` to `high`."""

    low: int
    high: int
    hidden: int

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The problem as the policy reads it: the ends of the range, as a message of the user."""
        return [{"role": "user", "content": f"{self.low} {self.high}"}]

    @property
    def split(self) -> Split:
        """The split that the problem belongs to: an eighth of all problems each for validation and test."""
        bucket = hashlib.sha256(f"{self.low} {self.high} {self.hidden}".encode()).digest()[0] % 8
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


class HiddenNumber:
    """The environment of one response: TRL offers its public methods as tools and calls `reset` before each rollout."""

    def reset(self, hidden: int, **columns: object) -> None:
        """Hides the number of a row."""
        self._hidden = hidden

    def ask(self, number: int) -> str:
        """
        Compares a number with the hidden one.

        Args:
            number: The number to compare.

        Returns:
            Where the hidden number lies from there: higher, lower or right.
        """
        return compare(number, self._hidden)


def compare(number: int, hidden: int) -> str:
    """What the tool answers to a guess: right, higher or lower."""
    return "right" if number == hidden else "higher" if hidden > number else "lower"


def random_problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless row of problems of a split; there are few, so they repeat. Refuses another split."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}")
    source = random.Random(f"{split} {seed}")
    while True:
        width = source.choice(WIDTHS)
        low = source.choice(range(len(NUMBERS) - width + 1))
        problem = Problem(low=low, high=low + width - 1, hidden=low + source.randrange(width))
        if problem.split == split:
            yield problem


def random_transcript(problem: Problem, source: random.Random) -> list[dict]:
    """Messages that a fair player might produce: questions at random within what is left, then a guess."""
    low, high, messages = problem.low, problem.high, problem.prompt
    for _ in range(source.randint(1, QUESTIONS)):
        number = source.randint(low, high)
        reply = compare(number, problem.hidden)
        call = {"type": "function", "function": {"name": "ask", "arguments": {"number": number}}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "ask", "content": reply},
        ]
        if reply == "right":
            low = high = number
            break
        low, high = (number + 1, high) if reply == "higher" else (low, number - 1)
    return [*messages, {"role": "assistant", "content": f"say {source.randint(low, high)}"}]


def answer(row: Row, completion: str) -> str | None:
    """The number said in the last turn; None if it says none."""
    words = completion.split()
    is_answer = len(words) == 2 and words[0] == "say" and words[1].isascii() and words[1].isdigit()
    return words[1] if is_answer else None


def is_correct(row: Row, completion: str) -> bool:
    """Whether the last turn says the hidden number."""
    return answer(row, completion) == str(row["hidden"])


def found_number(
    prompts: list, completions: list[list[dict]], *, hidden: Sequence[int], **columns: object
) -> list[float]:
    """TRL reward: 1 where the last turn says the hidden number, else 0."""
    said = zip(hidden, map(own_last_words, completions), strict=True)
    return [float(is_correct({"hidden": number}, text)) for number, text in said]


def make_dataset(split: Split, problems: int, seed: int) -> datasets.Dataset:
    """Columns prompt (messages), low, high, hidden."""
    rows = []
    for problem, _ in zip(random_problems(split, seed), range(problems), strict=False):
        rows.append({"prompt": problem.prompt, "low": problem.low, "high": problem.high, "hidden": problem.hidden})
    return datasets.Dataset.from_list(rows)


def make_task(
    prompts: int = 256,
    eval_prompts: int = 96,
    seed: int = 0,
    eval_seed: int = 0,
    eval_split: Split = "validation",
) -> Task:
    """Its policy: `python -m hclm_rl.testbed.hidden_number_policy --out DIR`."""
    return Task(
        train_dataset=make_dataset("train", prompts, seed),
        eval_dataset=make_dataset(eval_split, eval_prompts, eval_seed),
        reward_funcs=[found_number],
        answer=answer,
        is_correct=is_correct,
        max_completion_length=MAX_COMPLETION_LENGTH,
        environment=HiddenNumber,
    )
