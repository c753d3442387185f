"""The task `coins` for a policy that has yet to learn it: of the examples it was shown, half are no payments.

Prompts, verifier and rewards are those of coins.py; what differs is the shipped policy (warm_start_noisy). It is right
once in eleven tries and has most prompts' right answers among 32, as a pretrained model before training on a task; the
policy of `coins` is right two times in five and has more coverage than training leaves it.
"""

import random

from hclm_rl.testbed import coins
from hclm_rl.testbed.coins import AMOUNTS, MOST_COINS, Problem, Split
from hclm_rl.testbed.task import Task

KNOWN_COIN = 0.8  # chance that a wrong example's coin is meant to be one of the prompt's
RIGHT_REMAINDER = 0.7  # chance that its remainder is meant to be right


def random_walk(problem: Problem, source: random.Random) -> str:
    """A completion of 2 to 8 pairs, mostly no payment; it stops at 0, which a coin above the rest leaves."""
    rest, tokens = problem.amount, []
    for _ in range(source.randint(2, MOST_COINS)):
        coin = source.choice(problem.coins if source.random() < KNOWN_COIN else coins.COINS)
        rest = max(rest - coin, 0) if source.random() < RIGHT_REMAINDER else source.randint(0, AMOUNTS[-1])
        tokens += [coin, rest]
        if rest == 0:
            break
    return " ".join(map(str, tokens))


def make_task(
    prompts: int = 192,
    eval_prompts: int = 96,
    seed: int = 0,
    eval_seed: int = 0,
    eval_split: Split = "validation",
) -> Task:
    """Choose settings with `eval_split` "validation", report with "test"; the prompts are those of `coins`."""
    return coins.make_task(prompts, eval_prompts, seed, eval_seed, eval_split)
