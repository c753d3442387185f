"""The position bonus against its card (arXiv:2508.02260): numbers, a loop from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.position_advantage import PositionAdvantage

from ..term_batches import card_step, first_stage, make_step, second_stage, token_batch

NAN = math.nan


def shaped(mask: list[list[int]], advantages: list[list[float]], step: int = 0, **settings):
    """Advantages after both stages."""
    slots = [[0.0] * len(row) for row in mask]
    view, batch = card_step(mask, slots, slots, advantages)
    term, batch = PositionAdvantage(**settings), replace(batch, step=step)
    outcome = second_stage(term, batch, first_stage(term, view, {}), {})
    return (batch.advantages if outcome.advantages is None else outcome.advantages).tolist()


CARD = [
    [1.000055, 1.002298, 1.050000, 1.097702],
    [-0.100055, -0.102298, -0.150000, -0.150000],
    [0.0] * 4,
]


def test_the_cards_example():
    after = shaped([[1] * 4 + [0]] * 3, [[a] * 4 + [NAN] for a in (1.0, -0.1, 0.0)])
    for row, expected in zip(after, CARD, strict=True):
        # printed to six digits: half of the last one
        assert row[:4] == pytest.approx(expected, abs=5e-7)
        assert math.isnan(row[4])  # the padding keeps what it had


def test_a_tools_tokens_take_no_place():
    # the four response tokens stand where the card's do; the length is theirs alone
    after = shaped([[1, 0, 1, 0, 0, 1, 1]], [[1.0] * 7])[0]
    assert [after[t] for t in (0, 2, 5, 6)] == pytest.approx(CARD[0], abs=5e-7)
    assert [after[t] for t in (1, 3, 4)] == [1.0] * 3


def test_no_token_changes_sign_or_grows_beyond_the_cap():
    # gamma sigmoid(0) = 5 at the middle of three tokens' slots, far above the cap of 0.3 |A|
    after = shaped([[1] * 2], [[0.5, -0.5]], gamma=10.0, k=1e-9, cap=0.3)[0]
    assert after == pytest.approx([0.65, -0.65], rel=1e-12)


@pytest.mark.parametrize("step, acts", [(199, False), (200, True), (298, True), (299, False)])
def test_the_window_of_steps(step, acts):
    after = shaped([[1] * 4], [[1.0] * 4], step=step, start_step=200, end_step=299)[0]
    assert after == (pytest.approx(CARD[0], abs=5e-7) if acts else [1.0] * 4)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed):
    batch = token_batch(make_step(seed, torch.float64))
    after = PositionAdvantage(gamma=0.2, k=7.0)(batch, {}).advantages
    for b, row in enumerate(batch.mask.tolist()):
        for t in range(sum(row)):
            a = batch.advantages[b, t].item()
            bonus = min(0.2 / (1 + math.exp(-7 * (t / sum(row) - 0.5))), 0.5 * abs(a))
            assert after[b, t].item() == pytest.approx(a + math.copysign(bonus, a) if a else 0.0, rel=1e-12)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"gamma": -0.1}, "gamma must be >= 0, got -0.1"),
        ({"k": 0.0}, "k must be positive, got 0.0"),
        ({"cap": NAN}, "cap must be >= 0, got nan"),
        ({"start_step": -1}, "the steps must be 0 <= start_step < end_step, got -1 and None"),
        ({"start_step": 5, "end_step": 5}, "the steps must be 0 <= start_step < end_step, got 5 and 5"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        PositionAdvantage(**wrong)
    assert str(error.value) == sentence
