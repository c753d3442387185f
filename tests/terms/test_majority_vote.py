"""Majority vote against the card of ETTRL (arXiv:2508.11356, 2504.16084): numbers, a loop, and the traps."""

import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.entropy_advantage import EntropyAdvantage
from hclm_rl.terms.majority_vote import MajorityVote

from ..term_batches import Processes, card_step, first_stage, make_step, rollout


def group_of(answers: list[str], entropies: list[float] | None = None):
    """Stage 1's view of one group; "" is a response without an answer."""
    slots = [[each] for each in entropies or [0.0] * len(answers)]
    view, _ = card_step([[1]] * len(answers), slots, slots, slots, slots)
    texts = [rf"it is \boxed{{{answer}}}" if answer else "hm" for answer in answers]
    return replace(view, rewards=torch.zeros(len(answers), dtype=torch.float64), texts=texts)


def voted(answers: list[str], **settings):
    """Rewards, GRPO's advantages of them, and the metrics."""
    first = first_stage(MajorityVote(**settings), group_of(answers), {}, group_size=len(answers))
    scored = first.rewards[~first.rewards.isnan()]
    metrics = {name: value.item() for name, value in first.metrics.items()}
    return first.rewards.tolist(), (first.advantages / (scored.std() + 1e-4)).tolist(), metrics


def test_the_cards_vote():
    rewards, advantages, metrics = voted(["4", "7", "4", "9"])
    assert rewards == [1, 0, 1, 0] and metrics == {"link/majority_ratio": 0.5, "link/empty": 0.0}
    # printed to six digits: half of the last one
    assert advantages == pytest.approx([0.865875, -0.865875, 0.865875, -0.865875], abs=5e-7)


def test_the_cards_vote_with_ettrls_advantages():
    view = group_of(["4", "7", "4", "9"], entropies=[0.5, 1.0, 0.3, 0.6])
    first = first_stage(MajorityVote(), view, {})
    advantages = first.advantages / (first.rewards.std() + 1e-4)
    after = EntropyAdvantage().on_rollout(replace(view, advantages=advantages), {}).advantages
    assert after.tolist() == pytest.approx([1.010188, -0.288625, 1.298813, -0.865875], abs=6e-7)


def test_equal_votes_go_to_the_answer_seen_first():
    assert voted(["7", "4", "4", "7"])[0] == [1, 0, 0, 1]
    assert voted(["", "4", "7"])[0] == [0, 1, 0]


def test_no_answer_neither_votes_nor_is_paid():
    rewards, _, metrics = voted(["", "", "", "4", "4", "9"])
    assert rewards == [0, 0, 0, 1, 1, 0]
    assert metrics == {"link/majority_ratio": pytest.approx(2 / 6), "link/empty": 0.5}
    rewards, advantages, metrics = voted([""] * 4)
    assert rewards == advantages == [0.0] * 4 and metrics["link/majority_ratio"] == 0


def test_unanimity_teaches_nothing():
    rewards, advantages, metrics = voted(["4"] * 4)
    assert rewards == [1.0] * 4 and advantages == [0.0] * 4 and metrics["link/majority_ratio"] == 1


def test_all_vote_and_the_first_ones_train():
    # y = 9 by three of six votes; of the first four only the second gave it, so mean 1/4 and A = -1/4, 3/4 undivided
    answers = ["4", "9", "7", "4", "9", "9"]
    first = first_stage(MajorityVote(samples=4), group_of(answers), {}, group_size=6)
    assert first.rewards[:4].tolist() == [0, 1, 0, 0] and first.rewards[4:].isnan().all()
    assert first.advantages.tolist() == [-0.25, 0.75, -0.25, -0.25, 0.0, 0.0]
    assert first.metrics["link/majority_ratio"] == 0.5
    with pytest.raises(ValueError, match="samples must be at most num_generations, 6, got 7"):
        MajorityVote(samples=7).on_rollout(group_of(answers), {})


def test_votes_by_text_and_by_equivalence():
    pytest.importorskip("math_verify")
    answers = ["1/2", "0.5", "3", "3", r"\frac{1}{2}"]
    assert voted(answers)[0] == [0, 0, 1, 1, 0]
    assert voted(answers, equivalence="math_verify")[0] == [0, 0, 1, 1, 0]  # the vote was split
    rewards, _, metrics = voted(answers, equivalence="math_verify", vote_by="equivalence")
    assert rewards == [1, 1, 0, 0, 1] and metrics["link/majority_ratio"] == 0.6
    # the verifier pays what the vote counted apart
    assert voted(["0.5", "0.5", "1/2", "3"], equivalence="math_verify")[0] == [1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_counting(seed):
    source = random.Random(seed)
    answers = [source.choice(["", "1", "2", "3"]) for _ in range(source.choice([4, 7, 16]))]
    given = [answer for answer in answers if answer]
    best = max((given.count(answer) for answer in given), default=0)
    y = next((answer for answer in given if given.count(answer) == best), None)
    rewards, _, metrics = voted(answers)
    assert rewards == [float(answer == y) for answer in answers]
    assert metrics["link/majority_ratio"] == pytest.approx(best / len(answers))


def test_a_group_on_two_processes_votes_as_one():
    # answers 0 1 2 0 | 1 2 0 1, two responses on each of four processes
    alone = first_stage(MajorityVote(samples=3), rollout(make_step()), {})
    processes = Processes(4)
    views = processes.views(make_step(), [6, 6, 5, 5])
    together = processes.run(lambda rank: first_stage(MajorityVote(samples=3), views[rank], {}))
    rewards = torch.cat([each.rewards for each in together])
    assert rewards.nan_to_num(9.0).tolist() == [1, 0, 0, 9, 1, 0, 0, 9]
    assert torch.equal(torch.cat([each.advantages for each in together]), alone.advantages)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"answer": "x"}, "answer must have one group, which holds the answer, got 'x' with 0"),
        ({"samples": 1}, "samples must be at least 2 or None, got 1"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        MajorityVote(**wrong)
    assert str(error.value) == sentence
