import itertools
import random
from collections import Counter

import pytest

from hclm_rl.testbed import coins, find_task
from hclm_rl.testbed.coins import Problem, answer, correct_payment, is_correct, make_task, random_problems

ROW = {"coins": [7, 3, 5], "amount": 35, "forbidden": [4, 5, 7]}
# 35 -3 32 -5 27 -7 20 -7 13 -5 8 -5 3 -3 0: seven coins, never 4, 5 or 7
RIGHT = "3 32 5 27 7 20 7 13 5 8 5 3 3 0"


def problem_of(*numbers, amount=15, forbidden=(1, 2, 3)):
    return Problem(coins=numbers, amount=amount, forbidden=forbidden)


def test_prompt_has_ten_tokens_in_the_stated_order():
    problem = Problem(coins=(7, 3, 5), amount=35, forbidden=(4, 5, 7))
    assert problem.prompt == "7 3 5 : 35 ! 4 5 7 >"


def test_a_right_payment():
    assert is_correct(ROW, RIGHT)
    assert answer(ROW, RIGHT) == "3 5 7 7 5 5 3"


@pytest.mark.parametrize(
    ("completion", "paid"),
    [
        ("7 28 7 21 7 14 7 7 7 0", "7 7 7 7 7"),  # 7 is forbidden
        ("7 28 7 21", "7 7"),  # does not end at 0
        # 5 + 10 * 3 = 35 meets no 4, 5, 7, but has eleven coins
        ("5 30 3 27 3 24 3 21 3 18 3 15 3 12 3 9 3 6 3 3 3 0", "5 3 3 3 3 3 3 3 3 3 3"),
    ],
)
def test_a_wrong_payment_is_an_answer(completion, paid):
    assert not is_correct(ROW, completion)
    assert answer(ROW, completion) == paid


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "3 32 5",  # a coin without a remainder
        "3 31 " + "7 24 7 17 7 10 5 5 5 0",  # 35 - 3 is not 31
        "4 31 " + "3 28 7 21 7 14 7 7 7 0",  # 4 is not a coin
        "7 28 7 21 > 14",
        "7 28 -7 35",
        RIGHT + " 3 0",  # pays on after 0
        RIGHT.replace("3 32", "³ 32"),  # a digit to str.isdigit, not a number
    ],
)
def test_a_text_that_names_no_payment_has_no_answer(completion):
    assert answer(ROW, completion) is None
    assert not is_correct(ROW, completion)


def test_the_reward_is_the_verifier_row_by_row():
    columns = {name: [value, value] for name, value in ROW.items()}
    assert correct_payment(["p", "p"], [RIGHT, "7 28"], **columns, trainer_state=None) == [1.0, 0.0]


def test_solutions_of_a_problem_counted_by_hand():
    # 15 = 5+5+5 = 7+8 = 8+7 and no other sum of 5, 7, 8
    assert problem_of(5, 7, 8).solutions() == 3
    # without remainder 8 the way 7 then 8 is gone, without 10 also 5 5 5
    assert problem_of(5, 7, 8, forbidden=(1, 2, 8)).solutions() == 2
    assert problem_of(5, 7, 8, forbidden=(1, 8, 10)).solutions() == 1


def right_answers_by_enumeration(problem):
    for length in range(1, 9):
        for paid in itertools.product(problem.coins, repeat=length):
            remainders = [problem.amount - total for total in itertools.accumulate(paid)]
            if remainders[-1] == 0 and not set(remainders) & set(problem.forbidden):
                yield " ".join(f"{coin} {rest}" for coin, rest in zip(paid, remainders, strict=True))


def test_solutions_agree_with_enumeration():
    for problem, _ in zip(random_problems("train", seed=3), range(20), strict=False):
        assert problem.solutions() == len(list(right_answers_by_enumeration(problem)))


@pytest.mark.slow
def test_verifier_agrees_with_enumeration():
    """Every sequence of up to 9 coins, with its remainders: right iff enumeration has it."""
    for problem, _ in zip(random_problems("train", seed=4), range(10), strict=False):
        row = {"coins": list(problem.coins), "amount": problem.amount, "forbidden": list(problem.forbidden)}
        right = set(right_answers_by_enumeration(problem))
        for length in range(1, 10):
            for paid in itertools.product(problem.coins, repeat=length):
                remainders = [problem.amount - total for total in itertools.accumulate(paid)]
                text = " ".join(f"{coin} {rest}" for coin, rest in zip(paid, remainders, strict=True))
                assert is_correct(row, text) == (text in right)


def test_random_solutions_are_right_and_equally_likely():
    problem, source = problem_of(5, 7, 8), random.Random(0)
    drawn = Counter(problem.random_solution(source) for _ in range(3000))
    assert set(drawn) == {"5 10 5 5 5 0", "7 8 8 0", "8 7 7 0"}
    # 1000 each; the standard deviation of a count is sqrt(3000 * 1/3 * 2/3) = 26
    assert all(abs(count - 1000) < 4 * 26 for count in drawn.values())


def test_one_problem_in_another_order_is_the_same_problem():
    one, other = problem_of(5, 7, 8), problem_of(8, 5, 7)
    assert (one.identity, one.split) == (other.identity, other.split)
    assert one.prompt != other.prompt


def identities(dataset):
    return [(frozenset(row["coins"]), row["amount"], frozenset(row["forbidden"])) for row in dataset]


def test_splits_share_no_problem_whatever_the_seeds():
    validation = make_task(prompts=300, eval_prompts=300, seed=1, eval_seed=1, eval_split="validation")
    test = make_task(prompts=300, eval_prompts=300, seed=2, eval_seed=1, eval_split="test")
    sets = [
        set(identities(dataset)) for task in (validation, test) for dataset in (task.train_dataset, task.eval_dataset)
    ]
    train_1, validation_1, train_2, test_1 = sets
    assert not (train_1 | train_2) & validation_1
    assert not (train_1 | train_2) & test_1
    assert not validation_1 & test_1
    for row in test.eval_dataset:
        problem = Problem(coins=tuple(row["coins"]), amount=row["amount"], forbidden=tuple(row["forbidden"]))
        assert problem.split == "test"
    assert min(validation.train_dataset["solutions"]) >= 3


def test_no_problem_comes_twice(monkeypatch):
    # one amount leaves 56 * 364 problems: 2000 draws with repetition would repeat about 100
    monkeypatch.setattr(coins, "AMOUNTS", range(15, 16))
    drawn = [problem.identity for problem, _ in zip(random_problems("train", seed=0), range(2000), strict=False)]
    assert len(set(drawn)) == 2000


def test_problems_follow_from_their_own_seed_only():
    random.seed(5)
    first = identities(find_task("coins", prompts=20, eval_prompts=5).train_dataset)
    random.seed(6)
    assert identities(find_task("coins", prompts=20, eval_prompts=5).train_dataset) == first
    assert identities(find_task("coins", prompts=20, eval_prompts=5, seed=7).train_dataset) != first


def test_bad_problems_and_splits_are_refused():
    with pytest.raises(ValueError, match=r"three different numbers in \[2, 9\], got \(3, 3, 5\)"):
        problem_of(3, 3, 5)
    with pytest.raises(ValueError, match=r"amount must be in \[15, 40\], got 41"):
        problem_of(3, 4, 5, amount=41)
    with pytest.raises(ValueError, match=r"in \[1, 15\), got \(1, 2, 15\)"):
        problem_of(3, 4, 5, forbidden=(1, 2, 15))
    # with the type checks of the suite on, those refuse first, with their own exception
    with pytest.raises(Exception, match=r"train, validation or test|Type-check error"):
        next(coins.random_problems("dev", seed=0))
