"""QAE against its card (arXiv:2509.22611): numbers, the definition of the quantile by a loop, and the traps."""

import math
import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.qae import Qae

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan


def advantages_of(rewards: list[float], scale: float | None = None, **settings) -> list[float]:
    """One group, through stage 1; `scale` is what GRPO divides by, the card's std + 1e-6 unless given."""
    values = torch.tensor(rewards, dtype=torch.float64)
    slots = [[0.0]] * len(rewards)
    view, _ = card_step([[1]] * len(rewards), slots, slots, slots)
    view = replace(
        view,
        advantages=torch.zeros_like(values),
        rewards=values,
        group_rewards=values.expand(len(values), -1),
        reward_scale=torch.full_like(values, values.std().item() + 1e-6 if scale is None else scale),
    )
    return first_stage(Qae(**settings), view, {}).advantages.tolist()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [1.999996, 0, 0, 0]),
        ([1, 1, 0, 0], [1.732048, 1.732048, 0, 0]),
        ([1, 1, 1, 0], [0, 0, 0, -1.999996]),
    ],
)
def test_the_cards_example(rewards, expected):
    # printed to six digits: half of the last one
    assert advantages_of(rewards) == pytest.approx(expected, abs=5e-7)


def test_the_cards_group_of_eight():
    # b = 1 at K = 0.4 and at 0.6: the five successes get exactly 0, the failures -1 / scale
    for quantile_k in (0.4, 0.6):
        assert advantages_of([1] * 5 + [0] * 3, scale=0.5, quantile_k=quantile_k) == [0.0] * 5 + [-2.0] * 3


def test_interpolation_is_two_sided():
    # b = 0.2: no response is left alone, which the paper's quantile would
    expected = [1.385638, 1.385638, -0.346410, -0.346410]
    assert advantages_of([1, 1, 0, 0], interpolate=True) == pytest.approx(expected, abs=5e-7)


def test_a_floating_ceiling():
    # 0.28 * 25 is 7, in floating point 7.000000000000001: b is the 7th smallest
    assert advantages_of(list(range(1, 26)), scale=1.0, quantile_k=0.28) == [float(i - 7) for i in range(1, 26)]


def test_two_responses_learn_from_the_better_one():
    # index ceil(0.8) - 1 = 0: b = min R
    assert advantages_of([0.25, 1.0], scale=0.5) == [0.0, 1.5]


def test_equal_rewards_move_nothing():
    for reward in (0.0, 1.0, 0.3):
        assert advantages_of([reward] * 4) == [0.0] * 4


def test_an_unscored_response_counts_nowhere_and_moves_nothing():
    # of (0, 0, 1): index ceil(1.2) - 1 = 1, so b = 0; with the NaN counted as a fourth response it would be 0 too, but
    # at K = 0.6 it is index ceil(1.8) - 1 = 1, so 0, against ceil(2.4) - 1 = 2, so 1
    assert advantages_of([NAN, 0, 0, 1], scale=1.0, quantile_k=0.6) == [0.0, 0.0, 0.0, 1.0]
    assert advantages_of([NAN] * 4, scale=1.0) == [0.0] * 4
    # the only scored response of its group: its deviation is NaN, and GRPO gives it 0 as well
    assert advantages_of([NAN, NAN, NAN, 1.0], scale=NAN) == [0.0] * 4


@pytest.mark.parametrize("quantile_k", [0.05, 0.25, 0.4, 0.5, 0.6, 0.99])
def test_agrees_with_the_definition_of_the_quantile(quantile_k):
    source = random.Random(0)
    for size in (2, 3, 8, 16):
        rewards = [source.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(size)]
        # the smallest reward x that at least the share K of the group does not exceed
        baseline = min(x for x in rewards if sum(r <= x for r in rewards) >= quantile_k * size - 1e-9)
        assert advantages_of(rewards, scale=1.0, quantile_k=quantile_k) == [r - baseline for r in rewards]


def test_each_prompt_has_its_own_baseline():
    # rewards (1, 0, 0.5, 0 | 1, 1, 0.25, 0), K = 0.4, index ceil(1.6) - 1 = 1: b = 0 and 0.25
    view = rollout(make_step())
    expected = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.75, 0.75, 0.0, -0.25]) / view.reward_scale
    assert torch.equal(first_stage(Qae(), view, {}).advantages, expected)


@pytest.mark.parametrize("quantile_k", [0.0, 1.0, NAN])
def test_refuses(quantile_k):
    with pytest.raises(ValueError) as error:
        Qae(quantile_k=quantile_k)
    assert str(error.value) == f"quantile_k must be in (0, 1), got {quantile_k}"
