"""Pay an amount exactly with three coins, some remainders forbidden: many right answers, an exact verifier.

Prompt, always 10 tokens: `7 3 5 : 35 ! 4 5 7 >` = three different coins (2 to 9), an amount (15 to 40), three
forbidden remainders. Completion: coin and remainder in turn, `3 32 5 27 7 20 ... 3 0`, and the end of text: at most 17
tokens. Right iff each coin is one of the three, each remainder is the one before less the coin, none is forbidden, the
last is 0, and there are at most 8 coins. Two answers are the same iff their coin sequences are.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import datasets

from hclm_rl.testbed.task import Row, Task

COINS = range(2, 10)
AMOUNTS = range(15, 41)
MOST_COINS = 8
FEWEST_SOLUTIONS = 3
MAX_COMPLETION_LENGTH = 2 * MOST_COINS + 1  # tokens: the pairs and the end of text

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Pay `amount` with any number of `coins`, so that no remainder on the way is in `forbidden`."""

    coins: tuple[int, ...]  # three different ones, in the prompt's order
    amount: int
    forbidden: tuple[int, ...]  # three different ones, ascending, in [1, amount)

    def __post_init__(self) -> None:
        if not len(self.coins) == len(set(self.coins)) == 3 or not set(self.coins) <= set(COINS):
            raise ValueError(f"coins must be three different numbers in [2, 9], got {self.coins}")
        if self.amount not in AMOUNTS:
            raise ValueError(f"amount must be in [15, 40], got {self.amount}")
        if not len(self.forbidden) == len(set(self.forbidden)) == 3 or not set(self.forbidden) <= set(
            range(1, self.amount)
        ):
            raise ValueError(f"forbidden must be three different numbers in [1, {self.amount}), got {self.forbidden}")

    @property
    def prompt(self) -> str:
        """The problem as the policy reads it: coins, amount, forbidden sums."""
        coins, forbidden = (" ".join(map(str, numbers)) for numbers in (self.coins, self.forbidden))
        return f"{coins} : {self.amount} ! {forbidden} >"

    @property
    def identity(self) -> str:
        """The same for two prompts that pose the same problem: coins and forbidden remainders are sets."""
        return f"{sorted(self.coins)} {self.amount} {sorted(self.forbidden)}"

    @property
    def split(self) -> Split:
        """The split that the problem belongs to: an eighth of all problems each for validation and test.

        Fixed by a hash of the identity, so that the splits are disjoint as problems whatever the seeds.
        """
        bucket = hashlib.sha256(self.identity.encode()).digest()[0] % 8
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"

    def ways(self) -> list[list[int]]:
        """ways[n][r] = number of ways to pay the remainder r with at most n coins; r itself must not be forbidden."""
        ways = [[1] + [0] * self.amount]
        for _ in range(MOST_COINS):
            fewer = ways[-1]
            counts = [sum(fewer[rest - coin] for coin in self.coins if coin <= rest) for rest in range(self.amount + 1)]
            for rest in self.forbidden:
                counts[rest] = 0
            ways.append([1, *counts[1:]])
        return ways

    def solutions(self) -> int:
        """Number of right answers."""
        return self.ways()[MOST_COINS][self.amount]

    def random_solution(self, source: random.Random) -> str:
        """A right completion, each of them equally likely; the problem must have one."""
        ways, rest, tokens = self.ways(), self.amount, []
        for coins_left in reversed(range(MOST_COINS)):
            payable = [coin for coin in self.coins if coin <= rest]
            weights = [ways[coins_left][rest - coin] for coin in payable]
            (coin,) = source.choices(payable, weights)
            rest -= coin
            tokens += [coin, rest]
            if rest == 0:
                break
        return " ".join(map(str, tokens))


def random_problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless row of different problems of a split, each with at least 3 solutions. Refuses another split."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}")
    source = random.Random(f"{split} {seed}")
    seen = set()
    while True:
        coins = tuple(source.sample(COINS, 3))
        amount = source.choice(AMOUNTS)
        problem = Problem(coins=coins, amount=amount, forbidden=tuple(sorted(source.sample(range(1, amount), 3))))
        if problem.split == split and problem.identity not in seen and problem.solutions() >= FEWEST_SOLUTIONS:
            seen.add(problem.identity)
            yield problem


def answer(row: Row, completion: str) -> str | None:
    """The coins paid, in order, joined by spaces.

    None if the text is no row of (coin, remainder) pairs, pays with a coin that is not among the three, or states a
    remainder that the coin does not leave: such a text names no payment. A payment may still be wrong.
    """
    tokens = completion.split()
    if not tokens or len(tokens) % 2 or not all(token.isascii() and token.isdigit() for token in tokens):
        return None
    coins, stated = [int(token) for token in tokens[::2]], [int(token) for token in tokens[1::2]]
    rest = row["amount"]
    for coin, remainder in zip(coins, stated, strict=True):
        rest -= coin
        if coin not in row["coins"] or remainder != rest:
            return None
    return " ".join(map(str, coins))


def is_correct(row: Row, completion: str) -> bool:
    """Whether the completion is one of the right payments."""
    paid = answer(row, completion)
    if paid is None:
        return False
    remainders = [int(token) for token in completion.split()[1::2]]
    return remainders[-1] == 0 and len(remainders) <= MOST_COINS and not set(remainders) & set(row["forbidden"])


def correct_payment(
    prompts: list[str],
    completions: list[str],
    *,
    coins: list[list[int]],
    amount: list[int],
    forbidden: list[list[int]],
    **columns: object,
) -> list[float]:
    """TRL reward: 1 for a right payment, else 0."""
    rows = [
        {"coins": of_coins, "amount": of_amount, "forbidden": of_forbidden}
        for of_coins, of_amount, of_forbidden in zip(coins, amount, forbidden, strict=True)
    ]
    return [float(is_correct(row, text)) for row, text in zip(rows, completions, strict=True)]


def make_dataset(split: Split, problems: int, seed: int) -> datasets.Dataset:
    """Columns prompt, coins, amount, forbidden, solutions (number of right answers)."""
    source = random_problems(split, seed)
    return datasets.Dataset.from_list(
        [
            {
                "prompt": problem.prompt,
                "coins": list(problem.coins),
                "amount": problem.amount,
                "forbidden": list(problem.forbidden),
                "solutions": problem.solutions(),
            }
            for problem, _ in zip(source, range(problems), strict=False)
        ]
    )


def make_task(
    prompts: int = 192,
    eval_prompts: int = 96,
    seed: int = 0,
    eval_seed: int = 0,
    eval_split: Split = "validation",
) -> Task:
    """Choose settings with `eval_split` "validation", report with "test".

    The three splits share no problem. The warm start learnt from 30,000 problems of the training split, so training
    prompts may be among them; held-out prompts are not.
    """
    return Task(
        train_dataset=make_dataset("train", prompts, seed),
        eval_dataset=make_dataset(eval_split, eval_prompts, eval_seed),
        reward_funcs=[correct_payment],
        answer=answer,
        is_correct=is_correct,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
