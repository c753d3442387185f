"""The unlikeliness reward against its card (arXiv:2506.02355): numbers, ranks by a sort, the traps."""

import math
import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.unlikeliness import Unlikeliness, ranks

from ..term_batches import first_stage, groups_view, grpo, make_step, rollout

NAN = math.nan
MEANS = [-0.5, -0.2, -1.0, -0.8]


def paid(*rewards: list[float], logps=None, **settings) -> list[float]:
    logps = [[x] for x in MEANS] * len(rewards) if logps is None else logps
    view = groups_view(*rewards, logps=logps)
    return Unlikeliness(**settings).on_rollout(view, {}).rewards.tolist()


@pytest.mark.parametrize(
    ("settings", "rewards", "shaped", "advantages"),
    [
        ({}, [1, 1, 1, 0], [0.875, 0.8125, 1, 0], [0.446772, 0.309304, 0.721709, -1.477785]),
        ({"form": "paper"}, [1, 1, 1, 0], [0.8125, 0.75, 0.9375, 0], None),
        (
            {"mixed_only": False},
            [1, 1, 1, 1],
            [0.875, 0.8125, 1, 0.9375],
            [-0.387294, -1.161881, 1.161881, 0.387294],
        ),
    ],
)
def test_the_cards_worked_example(settings, rewards, shaped, advantages):
    found = paid(rewards, **settings)
    assert found == shaped
    if advantages is not None:  # the card's eps is 1e-6, TRL's 1e-4: of a deviation of .08 and more
        after = grpo(torch.tensor([found], dtype=torch.float64)).tolist()
        assert after == pytest.approx(advantages, rel=1.5e-3)


def test_the_cards_advantages_with_its_own_eps():
    r = torch.tensor(paid([1, 1, 1, 0]), dtype=torch.float64)
    found = (r - r.mean()) / (r.std() + 1e-6)
    assert found.tolist() == pytest.approx([0.446772, 0.309304, 0.721709, -1.477785], abs=6e-7)


@pytest.mark.parametrize("rewards", [[1, 1, 1, 1], [0, 0, 0, 0], [NAN] * 4, [1, NAN, 1, NAN]])
def test_groups_of_one_outcome_are_left_alone(rewards):
    assert paid(rewards) == pytest.approx(rewards, nan_ok=True)


def test_only_rewards_above_0_are_lowered():
    # a likely wrong answer is not punished less
    assert paid([1, -1, 0.5, -1]) == [0.875, -1, 0.5, -1]
    assert paid([1, 1, 1, -1], mixed_only=False, beta=0.4) == pytest.approx([0.8, 0.7, 1, -1])


def test_ties_get_their_mean_rank_and_what_does_not_count_none():
    x = torch.tensor([[-1.0, -1.0, -2.0, -0.5, -9.0], [-1.0, -1.0 + 1e-7, -1.0, -1.0, -3.0]], dtype=torch.float64)
    counts = torch.tensor([[True, True, True, True, False], [True] * 5])
    assert ranks(x, counts).tolist() == [[1.5, 1.5, 0, 3, 0], [2.5, 2.5, 2.5, 2.5, 0]]
    # three of the group count: ranks 1, 0 and 2 over 3
    assert paid([1, 1, NAN, 0], logps=[[-1.0], [-2.0], [-9.0], [-0.1]], beta=0.3) == pytest.approx(
        [0.9, 1, NAN, 0], nan_ok=True
    )
    assert paid([1, 1, 1, 0], logps=[[-1.0], [-2.0], [], [-0.1]], beta=0.3) == pytest.approx([0.9, 1, 1, 0])


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_sort(seed, per_token):
    source = random.Random(seed)
    rows = [[-source.expovariate(1) for _ in range(source.randint(1, 6))] for _ in range(8)]
    rewards = [1.0, 0.0] + [source.choice([0.0, 0.5, 1.0]) for _ in range(6)]
    x = [sum(row) / (len(row) if per_token else 1) for row in rows]
    order = sorted(range(8), key=x.__getitem__)
    expected = [r * (1 - 0.5 * order.index(i) / 8) for i, r in enumerate(rewards)]
    assert paid(rewards, logps=rows, beta=0.5, per_token=per_token) == pytest.approx(expected)


def test_the_advantages_are_made_of_what_is_paid():
    step = make_step()
    first = first_stage(Unlikeliness(), rollout(step), {})
    assert torch.equal(first.advantages, first.rewards - first.group_rewards.mean(dim=1))
    assert first.metrics["link/mixed"].item() == 1.0
    one_sided = replace(step, rewards=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    half = first_stage(Unlikeliness(), rollout(one_sided), {})
    assert half.metrics["link/mixed"].item() == 0.5


@pytest.mark.parametrize("beta", [-0.1, 1.5, NAN])
def test_refuses(beta):
    with pytest.raises(ValueError) as error:
        Unlikeliness(beta=beta)
    assert str(error.value) == f"beta must be in [0, 1], got {beta}"
