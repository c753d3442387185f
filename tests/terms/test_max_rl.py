"""MaxRL against its definition (arXiv:2602.02710): numbers, and the gradient by enumeration."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.max_rl import MaxRl

from ..term_batches import card_step, first_stage

NAN = math.nan


def advantages_of(*groups: list[float]) -> list[float]:
    """Groups of one size, through stage 1."""
    values = torch.tensor(groups, dtype=torch.float64)
    slots = [[0.0]] * values.numel()
    view, _ = card_step([[1]] * values.numel(), slots, slots, slots)
    of_group = values.repeat_interleave(values.size(1), dim=0)
    view = replace(view, advantages=values.new_zeros(len(slots)), rewards=values.flatten(), group_rewards=of_group)
    return first_stage(MaxRl(), view, {}).advantages.tolist()


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 0, 0, 0], [3, -1, -1, -1]),  # m = 1/4
        ([1, 1, 0, 0], [1, 1, -1, -1]),
        ([1, 1, 1, 0], [1 / 3, 1 / 3, 1 / 3, -1]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),  # no success, no gradient
        ([0.5, 1.5, 1, 1], [-0.5, 0.5, 0, 0]),  # graded
        ([1, 0, NAN, NAN], [1, -1, 0, 0]),  # what no function scored has no part in m
        ([NAN, NAN, NAN, NAN], [0, 0, 0, 0]),
    ],
)
def test_by_hand(rewards: list[float], expected: list[float]):
    assert advantages_of(rewards) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_in_expectation_it_is_the_gradient_of_the_passes(size: int, p: float):
    """One parameter, p itself: d log pi(response) / dp is 1 / p where it is right and -1 / (1 - p) where not."""
    found = 0.0
    for draw in itertools.product([0.0, 1.0], repeat=size):
        chance = math.prod(p if right else 1 - p for right in draw)
        score = [1 / p if right else -1 / (1 - p) for right in draw]
        found += chance * sum(a * g for a, g in zip(advantages_of(list(draw)), score, strict=True)) / size
    # d pass@k / dp = k (1 - p)^(k-1)
    assert found == pytest.approx(sum((1 - p) ** (k - 1) for k in range(1, size)), rel=1e-12)


def test_rewards_below_0_are_refused():
    with pytest.raises(ValueError, match=r"max_rl .* needs rewards of 0 or more; 3 responses have less: pay 0 and 1"):
        advantages_of([-1, -1, 1, 1], [-1, NAN, 1, 0])


def test_each_group_has_its_own_mean():
    assert advantages_of([1, 0, 0, 0], [1, 1, 0, 0]) == [3, -1, -1, -1, 1, 1, -1, -1]
