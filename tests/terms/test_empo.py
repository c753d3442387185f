"""EMPO against its card (arXiv:2504.05812): numbers, a loop written from the definition, and the traps."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.empo import Empo

from ..term_batches import Processes, card_step, first_stage, make_step, rollout

NAN = math.nan
CARD = ["4", "7", "4", "", "4", "9", "7", ""]
VERL = {"empty_reward": None, "gate": "none"}


def group_of(answers: list[str], rewards: list[float] | None = None, question: str = "2 + 2 = ?"):
    """Stage 1's view of one group; "" is a response without an answer."""
    slots = [[0.0]] * len(answers)
    view, _ = card_step([[1]] * len(answers), slots, slots, slots)
    values = torch.tensor(rewards or [0.0] * len(answers), dtype=torch.float64)
    texts = [rf"it is \boxed{{{answer}}}" if answer else "hm" for answer in answers]
    groups = values.expand(len(answers), -1)
    return replace(view, rewards=values, group_rewards=groups, texts=texts, prompts=[question] * len(answers))


def paid(answers, question="2 + 2 = ?", **settings):
    """Rewards, GRPO's advantages of them and the metrics."""
    first = first_stage(Empo(**settings), group_of(answers, question=question), {}, group_size=len(answers))
    advantages = first.advantages / (first.rewards.std() + 1e-4)
    return first.rewards.tolist(), advantages.tolist(), {name: value.item() for name, value in first.metrics.items()}


def test_the_cards_example():
    rewards, advantages, metrics = paid(CARD)
    assert rewards == [0.375, 0.25, 0.375, 0, 0.375, 0.125, 0.25, 0]
    # printed to six digits: half of the last one
    expected = [0.974629, 0.194926, 0.974629, -1.364480, 0.974629, -0.584777, 0.194926, -1.364480]
    assert advantages == pytest.approx(expected, abs=5e-7)
    assert metrics == {
        "link/semantic_entropy": pytest.approx(1.494175, abs=5e-7),
        "link/majority_share": 0.375,
        "link/gated": 0.0,
        "link/empty": 0.25,
    }
    assert metrics["link/semantic_entropy"] / math.log(8) == pytest.approx(0.718546, abs=5e-7)


def test_the_cards_example_as_in_verl():
    rewards, advantages, _ = paid(CARD, **VERL)
    assert rewards == [0.375, 0.25, 0.375, 0.125, 0.375, 0.125, 0.25, 0.125]
    expected = [1.079191, 0, 1.079191, -1.079191, 1.079191, -1.079191, 0, -1.079191]
    assert advantages == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("size", [4, 5, 6, 7, 8, 12, 16])
def test_the_gate_closes_on_different_answers_in_groups_of_any_size(size):
    # a comparison of H with ln G leaves it open for 6 and 7; two responses without an answer do not agree
    answers = [str(i) for i in range(size - 2)] + ["", ""]
    rewards, advantages, metrics = paid(answers)
    assert rewards == advantages == [0.0] * size and metrics["link/gated"] == 1
    assert metrics["link/semantic_entropy"] == pytest.approx(math.log(size))
    assert paid(answers, gate="none")[0] == [1 / size] * (size - 2) + [0.0] * 2


def test_unanimity_pays_everyone_and_teaches_nothing():
    rewards, advantages, metrics = paid(["4"] * 8)
    assert rewards == [1.0] * 8 and advantages == [0.0] * 8 and metrics["link/semantic_entropy"] == 0


def test_no_answer_at_all_is_no_majority():
    assert paid([""] * 8)[0] == [0.0] * 8
    assert paid(["", "", "", "", "", "4", "4", ""])[0] == [0, 0, 0, 0, 0, 0.25, 0.25, 0]


@pytest.mark.parametrize(
    "settings, is_open",
    [
        ({"min_max_share": 0.375}, True),
        ({"delta_low": 1.49, "delta_high": 1.50}, True),
        ({"delta_low": 1.50}, False),
        ({"delta_high": 1.49}, False),
    ],
)
def test_gates(settings, is_open):
    # H = 1.494175, the largest cluster is 3 of 8; a closed gate pays a missing answer 0 as well
    rewards, _, metrics = paid(CARD, empty_reward=-0.5, **settings)
    assert metrics["link/gated"] == (not is_open)
    assert rewards == ([0.375, 0.25, 0.375, -0.5, 0.375, 0.125, 0.25, -0.5] if is_open else [0.0] * 8)


def test_below_the_least_share_a_missing_answer_still_costs():
    # the authors' free-form reward looks for a missing answer first, and at the largest share after: 3 / 8 < 0.376
    rewards, _, metrics = paid(CARD, min_max_share=0.376, empty_reward=-0.5)
    assert rewards == [0, 0, 0, -0.5, 0, 0, 0, -0.5] and metrics["link/gated"] == 1
    assert paid(CARD, min_max_share=0.376)[0] == paid(CARD, min_max_share=0.376, empty_reward=None)[0] == [0.0] * 8
    # eight different answers of ten, 1 / 10 < 0.2, in the authors' free form; a closed gate of another kind pays 0
    free_form = {"empty_reward": -0.5, "min_max_share": 0.2, "max_overlap": 0.8}
    answers = [f"word{i}" for i in range(8)] + ["", ""]
    assert paid(answers, gate="none", **free_form)[0] == [0.0] * 8 + [-0.5] * 2
    assert paid(answers, **free_form)[0] == [0.0] * 10


def test_an_answer_that_repeats_the_question_is_not_paid_and_still_counts():
    answers = ["the sky", "blue", "the sky", "blue like the sea"]
    rewards = paid(answers, question="What colour is the sky?", max_overlap=0.8)[0]
    assert rewards == [0.0, 0.25, 0.0, 0.25]
    assert paid(answers, question="What colour is the sky?")[0] == [0.5, 0.25, 0.5, 0.25]


def test_equal_as_mathematics():
    pytest.importorskip("math_verify")
    assert paid(["1/2", "0.5", "2", "3"])[0] == [0.0] * 4
    assert paid(["1/2", "0.5", "2", "3"], equivalence="math_verify")[0] == [0.5, 0.5, 0.25, 0.25]


def test_the_verifiers_rewards_are_not_used():
    view = group_of(CARD, rewards=[5.0, NAN, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert Empo().on_rollout(view, {}).rewards.tolist() == paid(CARD)[0]


def test_a_pattern_finds_the_answer():
    view = replace(group_of(CARD), texts=["a: 1 b", "c: 2 a: 1", "c: 2", "d", "a: 1", "", "9", "a: 3"])
    # last match: 1, 1, 2, none, 1, none, none, 3
    assert Empo(answer=r": (\d)").on_rollout(view, {}).rewards.tolist() == [3 / 8, 3 / 8, 1 / 8, 0, 3 / 8, 0, 0, 1 / 8]


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_counting(seed):
    # with an equivalence that is transitive the clusters are the equal answers
    source = random.Random(seed)
    answers = [source.choice(["", "1", "2", "3"]) for _ in range(source.choice([5, 7, 16]))]
    rewards, _, metrics = paid(answers)
    count = Counter(answers)
    count.pop("", None)
    assert rewards == [count[a] / len(answers) if a else 0.0 for a in answers] or max(count.values()) == 1
    shares = [n / len(answers) for n in count.values()] + [1 / len(answers)] * answers.count("")
    assert metrics["link/semantic_entropy"] == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_a_group_on_two_processes_is_counted_whole():
    # answers 0 1 2 0 | 1 2 0 1, two responses on each of four processes
    alone = first_stage(Empo(), rollout(make_step()), {})
    assert alone.rewards.tolist() == [0.5, 0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.5]
    processes = Processes(4)
    views = processes.views(make_step(), [6, 6, 5, 5])
    together = processes.run(lambda rank: first_stage(Empo(), views[rank], {}))
    assert torch.equal(torch.cat([each.rewards for each in together]), alone.rewards)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"answer": "x"}, "answer must have one group, which holds the answer, got 'x' with 0"),
        ({"empty_reward": NAN}, "empty_reward must be finite or None, got nan"),
        ({"min_max_share": 1.5}, "min_max_share must be in [0, 1], got 1.5"),
        ({"max_overlap": -0.1}, "max_overlap must be in [0, 1], got -0.1"),
        ({"delta_low": NAN}, "delta_low must be a number of nats or None, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Empo(**wrong)
    assert str(error.value) == sentence
