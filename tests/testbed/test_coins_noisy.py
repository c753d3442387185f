import random
from collections import Counter

import pytest

from hclm_rl.testbed import coins, coins_noisy, evaluate, find_task
from hclm_rl.testbed.coins import Problem
from hclm_rl.testbed.policy import load_policy, policy_path
from hclm_rl.testbed.warm_start_recipe import coins_noisy_texts, coins_texts, warm_start

PROBLEM = Problem(coins=(7, 3, 5), amount=35, forbidden=(4, 5, 7))


def test_the_task_is_coins_with_another_policy():
    noisy, plain = (find_task(name, prompts=5, eval_prompts=3, eval_split="test") for name in ("coins_noisy", "coins"))
    assert noisy.train_dataset.to_list() == plain.train_dataset.to_list()
    assert noisy.eval_dataset.to_list() == plain.eval_dataset.to_list()
    assert noisy.is_correct is plain.is_correct and noisy.max_completion_length == plain.max_completion_length
    assert policy_path("coins_noisy") != policy_path("coins")


def test_a_walk_has_two_to_eight_pairs_and_ends_at_0():
    source = random.Random(0)
    walks = [[int(word) for word in coins_noisy.random_walk(PROBLEM, source).split()] for _ in range(4000)]
    assert all(len(walk) % 2 == 0 and len(walk) <= 16 for walk in walks)
    assert all(0 not in walk[1:-2:2] for walk in walks)  # it stops at 0
    assert all(len(walk) >= 4 or walk[-1] == 0 for walk in walks)  # shorter only there
    assert max(map(len, walks)) == 16 and min(map(len, walks)) == 2


def test_a_walks_coins_and_remainders_are_right_as_often_as_stated():
    source = random.Random(1)
    walks = [[int(word) for word in coins_noisy.random_walk(PROBLEM, source).split()] for _ in range(4000)]
    # of the first pair, where every coin fits: .8 and of the rest three of the eight coins; .7 and of the rest one of
    # the 41 remainders. The standard deviation of a share of 4000 is below .008
    known = sum(walk[0] in PROBLEM.coins for walk in walks) / 4000
    right = sum(walk[1] == 35 - walk[0] for walk in walks) / 4000
    assert known == pytest.approx(0.8 + 0.2 * 3 / 8, abs=0.025)
    assert right == pytest.approx(0.7 + 0.3 / 41, abs=0.025)


def test_half_of_the_lessons_texts_are_those_of_coins(monkeypatch):
    monkeypatch.setattr("hclm_rl.testbed.warm_start_recipe.COINS_PROBLEMS", 60)
    noisy, plain = coins_noisy_texts(3), coins_texts(3)
    is_same = [a == b for a, b in zip(noisy, plain, strict=True)]
    assert is_same[::2] == [True] * 30 and sum(is_same[1::2]) < 5  # a walk may be the payment
    assert all(a.split()[:10] == b.split()[:10] for a, b in zip(noisy, plain, strict=True))  # the same prompts
    words = Counter(word for text in noisy for word in text.split()[10:])
    assert words.keys() <= {str(i) for i in range(41)}  # the policy's vocabulary


def test_the_shipped_policy_has_yet_to_learn():
    task = find_task("coins_noisy", prompts=1, eval_prompts=24)
    measured = evaluate(*load_policy("coins_noisy"), task.eval_dataset, task, samples=32)
    # 96 prompts x 64: 1.15 nats, pass@1 .085, pass@32 .80, .76 unanswered; the standard errors of 24 prompts are .02
    # nats, .015, .07 and .025
    assert 1.05 < measured.token_entropy < 1.25
    assert 0.03 < measured.pass_at[1] < 0.16
    assert 0.5 < measured.pass_at[32] < 1.0
    assert 0.65 < measured.unanswered < 0.85


@pytest.mark.slow
def test_the_recipe_gives_the_stated_start(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    warm_start(str(tmp_path), seed=1, task="coins_noisy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    task = find_task("coins_noisy", eval_split="test")
    measured = evaluate(model, tokenizer, task.eval_dataset, task)
    # the shipped one (seed 0) on validation: .085, 1.15, .80; the band leaves room for other seeds and other CPUs
    assert 0.05 < measured.pass_at[1] < 0.13
    assert 1.0 < measured.token_entropy < 1.3
    assert measured.pass_at[32] > 0.65


def test_a_shorter_walk_is_no_problem_for_the_verifier():
    row = {"coins": [7, 3, 5], "amount": 35, "forbidden": [4, 5, 7]}
    source = random.Random(2)
    right = sum(coins.is_correct(row, coins_noisy.random_walk(PROBLEM, source)) for _ in range(2000))
    assert right < 20  # chance of a right walk: at least five right pairs and a last one that fits, below .01
