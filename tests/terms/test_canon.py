"""CANON against its card (arXiv:2509.23962): numbers, a loop written from the definition, and the traps."""

import math
import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.canon import Canon

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
METRIC, REWARDS = [0.2, 0.9, 0.5, 0.4], [1.0, 0.0, 1.0, 1.0]


def group_of(rewards: list[float], entropies=None, lengths=None, step: int = 0):
    """Stage 1's view of one group; the mean entropies and the lengths of its responses."""
    lengths = lengths or [1 + i % 2 for i in range(len(rewards))]
    entropies = entropies or [0.0] * len(rewards)
    width = max(lengths) + 1
    slots = [[h * (0.5 + k) if n == 2 else h for k in range(n)] + [NAN] * (width - n)
             for h, n in zip(entropies, lengths, strict=True)]  # fmt: skip
    view, _ = card_step([[1] * n + [0] * (width - n) for n in lengths], slots, slots, slots, slots)
    values = torch.tensor(rewards, dtype=torch.float64)
    groups = values.expand(len(rewards), -1)
    return replace(view, advantages=torch.zeros_like(values), rewards=values, group_rewards=groups, step=step)


def advantages_of(rewards, entropies=None, lengths=None, **settings) -> list[float]:
    view = group_of(rewards, entropies, lengths)
    return first_stage(Canon(**settings), view, {}, group_size=len(rewards)).advantages.tolist()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"mu": 1.0}, [0.5, -1.0, 0.0, 0.5]),
        ({"mu": 0.0}, [0.0, -0.5, 0.5, 0.0]),
        ({"mu": 0.5}, [0.25, -0.75, 0.25, 0.25]),
        ({"mu": 0.5, "alpha": 0.9, "favoured": "high"}, [0.275, -0.75, 0.2, 0.275]),
        ({"mu": 1.0, "alpha": 0.9, "favoured": "low"}, [0.4, -0.9, 0.1, 0.4]),
        ({"mu": 1.0, "alpha": 0.9}, [0.4, -0.9, 0.1, 0.4]),  # the code's half for entropy
        ({}, [0.5, -1.0, 0.0, 0.5]),
        # + to HIGH, the second and the third, whichever half has alpha
        ({"offset": 0.25}, [0.25, -0.75, 0.25, 0.25]),
        ({"offset": 0.25, "favoured": "high"}, [0.25, -0.75, 0.25, 0.25]),
        ({"offset": 0.25, "mu": 0.0}, [0.0, -0.5, 0.5, 0.0]),  # intra has none
    ],
)
def test_the_cards_example(settings, expected):
    assert advantages_of(REWARDS, METRIC, **settings) == pytest.approx(expected, abs=1e-12)


def test_the_cards_odd_group():
    after = advantages_of([1, 0, 1, 1, 0], [0.2, 0.9, 0.5, 0.4, 0.7], mu=0.5)
    # printed to six digits: half of the last one; R - mean R would be 0.4 and -0.6
    assert after == pytest.approx([0.333333, -0.666667, 0.333333, 0.333333, -0.666667], abs=5e-7)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("cosine_inter_first", [0.033333, 1.000000, 1.000000, 0.700000, 0.400925, 1.000000, 0.400925]),
        ("cosine_intra_first", [0.980000, 0.400000, 0.400000, 0.700000, 0.999075, 0.400000, 0.999075]),
    ],
)
def test_the_cards_cosines(schedule, expected):
    mus = []
    for step in (0, 29, 30, 50, 69, 70, 149):
        first = first_stage(Canon(schedule=schedule), group_of(REWARDS, METRIC, step=step), {})
        mus.append(first.metrics["link/mu"].item())
    assert mus == pytest.approx(expected, abs=5e-7)


def test_mu_follows_the_accuracy_of_the_whole_step():
    # the rewards of make_step are 1, 0, 0.5, 0 | 1, 1, 0.25, 0: 3.75 / 8
    for schedule, mu in (("accuracy_inter_first", 1 - 3.75 / 8), ("accuracy_intra_first", 3.75 / 8)):
        first = first_stage(Canon(schedule=schedule), rollout(make_step(dtype=torch.float64)), {})
        assert first.metrics["link/mu"].item() == mu
    # unscored responses do not count; beyond [0, 1] it is cut
    view = group_of([1.0, NAN, 1.0, 0.25], METRIC)
    assert first_stage(Canon(schedule="accuracy_intra_first"), view, {}).metrics["link/mu"].item() == 0.75
    view = group_of([-1.0, -1.0, 0.0, 1.0], METRIC)
    assert first_stage(Canon(schedule="accuracy_intra_first"), view, {}).metrics["link/mu"].item() == 0


def test_length_splits_by_tokens_and_favours_the_long_half():
    # LOW = the first and the third (2 and 1 tokens), HIGH = the others; alpha 0.5 on HIGH, mu 1:
    # LOW: 1 - 0.5 * 0.5 = 0.75, 0 - 0.25; HIGH: 0.5 * 1 - 0.5, 0 - 0.5
    after = advantages_of([1, 1, 0, 0], lengths=[2, 5, 1, 3], metric="length", alpha=0.5)
    assert after == [0.75, 0.0, -0.25, -0.5]
    # the offset goes to the long half as it goes to the uncertain one: + to the second and the fourth
    after = advantages_of([1, 1, 0, 0], lengths=[2, 5, 1, 3], metric="length", alpha=0.5, offset=0.125)
    assert after == [0.625, 0.125, -0.375, -0.375]


def test_ties_go_to_the_earlier_response():
    # all at the limit: LOW = the first two
    assert advantages_of([1, 0, 0, 0], lengths=[3] * 4, metric="length") == [1.0, 0.0, -0.5, -0.5]
    assert advantages_of([0, 0, 0, 1], lengths=[3] * 4, metric="length") == [-0.5, -0.5, 0.0, 1.0]


def test_a_unanimous_group_gets_nothing():
    for mu in (0.0, 0.5, 1.0):
        assert advantages_of([1.0] * 4, METRIC, mu=mu) == [0.0] * 4


@pytest.mark.parametrize("metric", ["length", "entropy"])
def test_a_response_without_tokens_is_in_neither_half(metric):
    # five right and wrong responses; the last was cut at the limit and is masked: the halves are the other four's
    lengths, entropies = [2, 1, 2, 2, 2], [0.2, 0.9, 0.5, 0.4, 0.1]
    alone = group_of([1, 0, 1, 1], entropies[:4], lengths[:4])
    five = group_of([1, 0, 1, 1, 0], entropies, lengths)
    five = replace(five, mask=five.mask & torch.tensor([[True]] * 4 + [[False]]))
    expected = first_stage(Canon(metric=metric, mu=0.7), alone, {}, group_size=4).advantages.tolist()
    shaped = first_stage(Canon(metric=metric, mu=0.7), five, {}, group_size=5).advantages.tolist()
    assert shaped == pytest.approx([*expected, 0.0], abs=1e-12)


def test_unscored_responses_leave_their_group():
    # of the scored 0.2, 0.5, 0.4 the lowest one is LOW: inter 1 - 0.5, 0 - 1, 1 - 1
    assert advantages_of([1.0, NAN, 0.0, 1.0], METRIC) == [0.5, 0.0, -1.0, 0.0]
    # one scored response has nothing to be compared with
    assert advantages_of([1.0, NAN, NAN, NAN], METRIC) == [0.0] * 4


def test_the_gap_between_the_halves_is_logged():
    first = first_stage(Canon(), group_of(REWARDS, METRIC), {})
    assert first.metrics["link/high_minus_low"].item() == -0.5


def test_the_base_algorithms_advantages_are_replaced():
    view = replace(group_of(REWARDS, METRIC), advantages=torch.full((4,), 7.0, dtype=torch.float64))
    assert first_stage(Canon(mu=0.5), view, {}).advantages.tolist() == [0.25, -0.75, 0.25, 0.25]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu, alpha, favoured", [(1.0, 1.0, "low"), (0.3, 0.9, "high"), (0.7, 0.5, "low")])
def test_agrees_with_a_loop(seed, mu, alpha, favoured):
    source = random.Random(seed)
    size = source.choice([4, 5, 9, 16])
    rewards = [source.choice([0.0, 0.5, 1.0]) for _ in range(size)]
    metric = [source.random() for _ in range(size)]
    order = sorted(range(size), key=lambda i: metric[i])
    low, high = order[: size // 2], order[size // 2 :]
    plus = {"low": low, "high": high}[favoured]
    expected = []
    for i in range(size):
        own, opposite = (low, high) if i in low else (high, low)
        mean_own, mean_opposite = (sum(rewards[j] for j in half) / len(half) for half in (own, opposite))
        inter = alpha * rewards[i] - mean_opposite if i in plus else rewards[i] - alpha * mean_opposite
        expected.append(mu * inter + (1 - mu) * (rewards[i] - mean_own))
    after = advantages_of(rewards, metric, mu=mu, alpha=alpha, favoured=favoured)
    assert after == pytest.approx(expected, abs=1e-12)


def test_refuses_a_group_without_halves():
    with pytest.raises(ValueError, match="num_generations must be at least 4, got 3"):
        Canon().on_rollout(group_of([1.0, 0.0, 1.0], [0.1, 0.2, 0.3]), {})


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"mu": 1.5}, "mu must be in [0, 1], got 1.5"),
        ({"alpha": 0.0}, "alpha must be in (0, 1], got 0.0"),
        ({"offset": NAN}, "offset must be finite, got nan"),
        (
            {"warmup": 150},
            "the cosine needs cycles >= 1 and warmup >= 0 with a step for each cycle left in total, got cycles 3, "
            "warmup 150, total 150",
        ),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Canon(**wrong)
    assert str(error.value) == sentence
