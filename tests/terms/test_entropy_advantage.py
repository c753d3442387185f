"""EAR against the card of ETTRL (arXiv:2508.11356): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.entropy_advantage import EntropyAdvantage

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
A = 0.5 / (1 / math.sqrt(3) + 1e-4)  # rewards (1, 0, 1, 0): unbiased deviation 1 / sqrt(3); the card's 0.865875


def group_of(mean_entropies: list[float | None], advantages: list[float]):
    """One group of responses with two tokens, every second with one; None stands for one without any."""
    rows = [([0, 0], [NAN] * 2) if x is None else ([1, 1], [0.5 * x, 1.5 * x]) if i % 2 else ([1, 0], [x, NAN])
            for i, x in enumerate(mean_entropies)]  # fmt: skip
    slots = [entropy for _, entropy in rows]
    view, _ = card_step([mask for mask, _ in rows], slots, slots, slots, slots)
    return replace(view, advantages=torch.tensor(advantages, dtype=torch.float64))


def shaped(mean_entropies, advantages, **settings):
    """Stage 1's advantages and its share of responses with Y < 0."""
    view = group_of(mean_entropies, advantages)
    first = first_stage(EntropyAdvantage(**settings), view, {}, group_size=len(mean_entropies))
    return first.advantages.tolist(), first.metrics.get("link/negative")


def test_the_cards_example():
    after, negative = shaped([0.5, 1.0, 0.3, 0.6], [A, -A, A, -A])
    # printed to six digits: half of the last one
    assert after == pytest.approx([1.010188, -0.288625, 1.298813, -0.865875], abs=6e-7)
    assert negative == 0


def test_the_mean_of_the_weights_is_1():
    after, _ = shaped([0.5, 1.0, 0.3, 0.6], [1.0] * 4)
    assert after == pytest.approx([1.166667, 0.333333, 1.5, 1.0], abs=5e-7)
    assert sum(after) == pytest.approx(4, rel=1e-6)


def test_a_very_uncertain_response_does_not_change_sign_unless_asked():
    entropies = [0.2, 0.2, 0.2, 2.4]
    after, negative = shaped(entropies, [1.0] * 4, floor=None)
    assert after == pytest.approx([1.733333, 1.733333, 1.733333, -1.2], abs=5e-7) and negative == 0.25
    after, negative = shaped(entropies, [1.0] * 4)
    assert after == pytest.approx([1.733333, 1.733333, 1.733333, 0.0], abs=5e-7) and negative == 0.25
    assert shaped(entropies, [-1.0] * 4, floor=0.25)[0][3] == -0.25


def test_the_cards_clip():
    # one winner of eight: (G - 1) / sqrt(G) = 2.4749 less the 1e-4
    after, _ = shaped([0.5] * 8, [2.474174] + [-0.353453] * 7, form="clip")
    assert after == [2.0] + [-0.353453] * 7
    assert shaped([0.5] * 2, [-3.0, 3.0], form="clip", beta=0.5)[0] == [-0.5, 0.5]


def test_equal_entropies_change_nothing():
    for entropy in (0.0, 1e-12, 0.7):
        assert shaped([entropy] * 4, [A, -A, A, -A])[0] == pytest.approx([A, -A, A, -A], rel=1e-12)


def test_a_response_without_tokens_counts_nowhere_and_keeps_its_advantage():
    # m = (0.2 + 0.6) / 2 = 0.4: Y = 1.5 and 0.5
    assert shaped([0.2, None, 0.6], [1.0, 3.0, 1.0])[0] == pytest.approx([1.5, 3.0, 0.5], rel=1e-6)


def test_a_response_without_a_reward_counts_nowhere():
    # the card's four, and two that were left out, at 5 nats: m stays 0.6
    view = group_of([0.5, 1.0, 0.3, 0.6, 5.0, 5.0], [1.0] * 4 + [0.0] * 2)
    view = replace(view, rewards=torch.tensor([1.0, 0.0, 1.0, 0.0, math.nan, math.nan], dtype=torch.float64))
    after = EntropyAdvantage().on_rollout(view, {}).advantages.tolist()
    assert after == pytest.approx([1.166667, 0.333333, 1.5, 1.0, 0.0, 0.0], abs=5e-7)


def test_advantages_of_tokens_are_weighted_by_their_response():
    view = group_of([0.2, 0.6], [0.0] * 2)
    view = replace(view, advantages=torch.tensor([[1.0, -2.0]] * 2, dtype=torch.float64))
    after = EntropyAdvantage().on_rollout(view, {}).advantages
    torch.testing.assert_close(after, torch.tensor([[1.5, -3.0], [0.5, -1.0]], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed):
    view = rollout(make_step(seed, torch.float64))
    after = first_stage(EntropyAdvantage(floor=None), view, {}).advantages
    lengths = view.mask.sum(1).tolist()
    means = [sum(row[:n]) / n for row, n in zip(view.entropy.tolist(), lengths, strict=True)]
    for i, advantage in enumerate(view.advantages.tolist()):
        m = sum(means[i - i % 4 :][:4]) / 4
        # the 1e-8 beside m moves Y by less than 1e-8 / m
        assert after[i].item() == pytest.approx((2 - means[i] / m) * advantage, rel=1e-6)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"floor": 1.5}, "floor must be at most 1 or None, got 1.5"),
        ({"floor": NAN}, "floor must be at most 1 or None, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        EntropyAdvantage(**wrong)
    assert str(error.value) == sentence


@pytest.mark.parametrize("noise", [[-3.8e-6, 0.0, 0.0, 3.7e-6], [-4e-8, 0.0, 0.0, 0.0], [-3.8e-6, 0.0, 0.0, 0.0]])
def test_a_group_that_is_certain_up_to_float32_is_left_alone(noise):
    # what exact entropies of certain tokens come out as; over their mean the weights would be noise without bound
    assert shaped(noise, [1.4997, -0.4999, -0.4999, -0.4999])[0] == [1.4997, -0.4999, -0.4999, -0.4999]
