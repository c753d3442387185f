"""EM-RL against its card (arXiv:2505.15134): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.em_rl import EmRl

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
LOGPS = [[-0.2, -0.1, -0.3], [-0.5, -0.9, -0.1], [-0.05, -0.05], [-1.2, -0.4, -0.2, -0.1]]
H = [[0.3, 0.2, 0.4], [0.8, 1.0, 0.2], [0.1, 0.1], [1.1, 0.6, 0.3, 0.2]]


def one_group(**changes):
    """The card's four responses to one prompt; the verifier's advantages are none of them."""
    padded = [[*row, *[NAN] * (5 - len(row))] for row in LOGPS]
    entropy = [[*row, *[NAN] * (5 - len(row))] for row in H]
    mask = [[1] * len(row) + [0] * (5 - len(row)) for row in LOGPS]
    view, _ = card_step(mask, padded, padded, padded, entropy)
    verified = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    return replace(view, advantages=verified, **changes)


@pytest.mark.parametrize(
    "settings, mean, expected",
    [
        ({"reward": "sequence"}, -4.1 / 4, [0.566667, -0.633333, 1.233333, -1.166667]),
        ({}, -5.3 / 4, [0.566667, -0.900000, 1.500000, -1.166667]),
        ({"reduction": "mean"}, -1.616667 / 4, [0.138889, -0.350000, 0.405556, -0.194444]),
    ],
)
def test_the_cards_example(settings, mean, expected):
    effect = EmRl(**settings).on_rollout(one_group(), {})
    # printed to six digits: half of the last one
    assert effect.advantages.tolist() == pytest.approx(expected, abs=5e-7)
    assert effect.metrics["reward"].item() == pytest.approx(mean, rel=1e-6)
    assert effect.rewards is None


def test_the_coefficient_leads_from_the_verifier_to_certainty():
    view = one_group()
    assert first_stage(EmRl(), view, {}, coef=0.0).advantages is None
    half = first_stage(EmRl(), view, {}, coef=0.5).advantages.tolist()
    # half of the verifier's 1, -1, 0.5, -0.5 and half of the card's
    assert half == pytest.approx([0.783333, -0.95, 1.0, -0.833333], abs=5e-7)


def test_no_reward_is_read():
    unscored = one_group(rewards=torch.full((4,), NAN), group_rewards=torch.full((4, 4), NAN))
    assert torch.equal(EmRl().on_rollout(unscored, {}).advantages, EmRl().on_rollout(one_group(), {}).advantages)


def test_the_shorter_of_two_equally_certain_responses_wins_the_sum_and_draws_the_mean():
    view, _ = card_step([[1, 1], [1, 0]], *[[[0.0, 0.0]] * 2] * 3, [[0.5, 0.5], [0.5, 0.5]])
    assert EmRl().on_rollout(view, {}).advantages.tolist() == [-0.5, 0.5]
    assert EmRl(reduction="mean").on_rollout(view, {}).advantages.tolist() == [0.0, 0.0]


def test_a_response_alone_has_nothing_to_be_compared_with():
    view, _ = card_step([[1, 1]], *[[[-0.5, -0.5]]] * 4)
    assert EmRl().on_rollout(view, {}).advantages.tolist() == [0.0]


@pytest.mark.parametrize("reward", ["token", "sequence"])
def test_a_response_without_tokens_is_no_example_of_certainty(reward):
    # the card's first three responses and a truncated one that is masked: sums .9, 2.0, .2 nats; -.6, -1.5, -.1
    view = one_group()
    view = replace(view, mask=view.mask & torch.tensor([[True], [True], [True], [False]]))
    r = {"token": [-0.9, -2.0, -0.2], "sequence": [-0.6, -1.5, -0.1]}[reward]
    expected = [value - (sum(r) - value) / 2 for value in r]
    assert EmRl(reward=reward).on_rollout(view, {}).advantages.tolist() == pytest.approx([*expected, 0.0], abs=1e-9)


def test_of_two_responses_without_tokens_but_one_nothing_is_left_to_compare():
    view, _ = card_step([[1, 1], [0, 0]], *[[[-0.5, -0.5]] * 2] * 4)
    assert EmRl().on_rollout(view, {}).advantages.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reward", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_agrees_with_a_loop(seed, reward, reduction):
    step = make_step(seed, torch.float64)
    source = -step.old_entropy if reward == "token" else step.old_logps
    rewards = []
    for row, n in zip(source.tolist(), step.mask.sum(1).tolist(), strict=True):
        rewards.append(sum(row[:n]) / (n if reduction == "mean" else 1))
    advantages = EmRl(reward=reward, reduction=reduction).on_rollout(rollout(step), {}).advantages
    for i, own in enumerate(rewards):  # two groups of four
        others = [rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        assert advantages[i].item() == pytest.approx(own - sum(others) / 3, rel=1e-9)


def test_the_rewards_of_rent():
    # r = -0.3, -2/3, -0.1, -0.55, their mean -0.404167; squared distances 0.010851, 0.068906, 0.092517, 0.021267,
    # together 0.193542: deviation sqrt(0.193542 / 3) = 0.253996, plus 1e-6
    effect = EmRl(reduction="mean", scale="group").on_rollout(one_group(), {})
    assert effect.advantages.tolist() == pytest.approx([0.410111, -1.033478, 1.197524, -0.574156], abs=5e-6)


def test_the_deviation_is_that_of_the_responses_with_tokens():
    # r = -0.3, -2/3, -0.1 and a masked one: mean -0.355556, distances 0.055556, -0.311111, 0.255556, deviation 0.287389
    view = one_group()
    view = replace(view, mask=view.mask & torch.tensor([[True], [True], [True], [False]]))
    advantages = EmRl(reduction="mean", scale="group").on_rollout(view, {}).advantages.tolist()
    assert advantages == pytest.approx([0.193311, -1.082543, 0.889231, 0.0], abs=5e-6)
    # one alone, and equal ones, are none the wiser
    view = replace(view, mask=view.mask & torch.tensor([[True], [False], [False], [False]]))
    assert EmRl(reduction="mean", scale="group").on_rollout(view, {}).advantages.tolist() == [0.0] * 4
