"""The perplexity weight against its card (arXiv:2508.02260): numbers, a loop with Python's statistics, traps."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.perplexity_advantage import PerplexityAdvantage

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
A = 0.5 / (1 / math.sqrt(3) + 1e-4)  # rewards (1, 1, 0, 0): unbiased deviation 1 / sqrt(3); the card's 0.865875
CARD = [0.2, 0.4, 0.6, 1.8]


def group_of(log_perplexities: list[float | None], advantages: list[float]):
    """One group; every second response has a single token, None stands for one without any."""
    rows = [([1, 1], [-x - 0.05, -x + 0.05]) if i % 2 else ([1, 0], [-x, NAN]) if x is not None else ([0, 0], [NAN] * 2)
            for i, x in enumerate(log_perplexities)]  # fmt: skip
    slots = [logps for _, logps in rows]
    view, _ = card_step([mask for mask, _ in rows], slots, slots, [[0.0] * 2] * len(rows))
    return replace(view, advantages=torch.tensor(advantages, dtype=torch.float64))


def shaped(log_perplexities, advantages, **settings):
    """Stage 1's advantages and its share of outliers."""
    first = first_stage(PerplexityAdvantage(**settings), group_of(log_perplexities, advantages), {})
    return first.advantages.tolist(), first.metrics["link/outliers"].item()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.876480, 0.865875, -0.855271, -0.791642]),
        ({"alpha": 0.1}, [0.971923, 0.865875, -0.759828, -0.692700]),
        # the other variant, from the card's w = (-1.224745, 0, 1.224745, 8.573214): weights 0.877526, 1, 1.122474, 1.2
        ({"alpha": 0.1, "favours": "high"}, [0.759828, 0.865875, -0.971923, -1.039050]),
        # without the code's clamp: 1 - 0.1 * 8.573214 = 0.142679 for the outlier
        ({"alpha": 0.1, "smallest": 0.0, "largest": 9.0}, [0.971923, 0.865875, -0.759828, -0.123542]),
    ],
)
def test_the_cards_example(settings, expected):
    advantages, outliers = shaped(CARD, [A, A, -A, -A], **settings)
    # printed to six digits: half of the last one
    assert advantages == pytest.approx(expected, abs=6e-7)
    assert outliers == 0.25


def test_equal_perplexities_change_nothing():
    for advantages in ([A, A, -A, -A], [0.0] * 4):
        assert shaped([0.7] * 4, advantages, alpha=0.1)[0] == pytest.approx(advantages, rel=1e-12)
    # a deviation of 5e-7 is no spread either: divided by it, w = -1 and +1 and the weights 1.2 and 0.8
    assert shaped([0.3, 0.300001], [1.0, 1.0], alpha=1.0)[0] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_zero_advantages_stay_zero():
    assert shaped(CARD, [0.0] * 4, alpha=1.0)[0] == [0.0] * 4


def test_a_response_without_tokens_counts_nowhere_and_keeps_its_advantage():
    # (0.2, 0.4, 0.6): mean 0.4, deviation 0.163299, as on the card, whose outlier is not in K either
    advantages, outliers = shaped([None, *CARD[:3]], [2.0, A, A, -A], alpha=0.1)
    assert advantages == pytest.approx([2.0, 0.971923, 0.865875, -0.759828], abs=6e-7)
    assert outliers == 0


def test_advantages_of_tokens_are_weighted_by_their_response():
    view = replace(group_of(CARD, [A, A, -A, -A]), advantages=torch.tensor([[1.0, 2.0]] * 4, dtype=torch.float64))
    advantages = PerplexityAdvantage(alpha=0.1).on_rollout(view, {}).advantages
    for row, weight in zip(advantages.tolist(), [1.122474, 1.0, 0.877526, 0.8], strict=True):
        assert row == pytest.approx([weight, 2 * weight], abs=1.1e-6)


@pytest.mark.parametrize("group_size", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed, group_size):
    view = rollout(replace(make_step(seed, torch.float64), group_size=group_size))
    first = first_stage(PerplexityAdvantage(alpha=0.07), view, {}, group_size=group_size)
    lengths = view.mask.sum(1).tolist()
    perplexities = [-sum(row[:n]) / n for row, n in zip(view.logps.tolist(), lengths, strict=True)]
    for i, advantage in enumerate(view.advantages.tolist()):
        group = perplexities[i - i % group_size :][:group_size]
        q1, _, q3 = statistics.quantiles(group, n=4, method="inclusive")
        kept = [x for x in group if q1 - 1.5 * (q3 - q1) <= x <= q3 + 1.5 * (q3 - q1)]
        w = (perplexities[i] - statistics.fmean(kept)) / statistics.pstdev(kept)
        expected = advantage * min(max(1 - 0.07 * w, 0.8), 1.2)
        assert first.advantages[i].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"alpha": -1.0}, "alpha must be >= 0, got -1.0"),
        ({"alpha": NAN}, "alpha must be >= 0, got nan"),
        ({"smallest": 1.1}, "the weight's bounds must be 0 <= smallest <= 1 <= largest, got 1.1 and 1.2"),
        ({"largest": 0.9}, "the weight's bounds must be 0 <= smallest <= 1 <= largest, got 0.8 and 0.9"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        PerplexityAdvantage(**wrong)
    assert str(error.value) == sentence
