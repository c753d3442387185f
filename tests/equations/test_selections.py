"""Selections by hand: ties, no token, one token, all and next to none of them, NaN where nothing counts."""

import math

import pytest
import torch

from hclm_rl.equations.selections import (
    above_own_quantile,
    below_quantile,
    between,
    drawn,
    drawn_places,
    largest,
    quantile_threshold,
    quota,
    smallest,
)

NAN = math.nan
# seven that count, two of them equal, in a batch of two rows whose other slots hold NaN
SCORE = torch.tensor([[0.5, 2.0, NAN, 1.0, 2.0], [-1.0, NAN, 3.0, 0.0, NAN]])
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 0]]).bool()
NOTHING = torch.zeros_like(MASK)
ONE = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()  # the score 1.0
EACH = [
    lambda score, mask: largest(score, mask, 2),
    lambda score, mask: largest(score, mask, 2, "kept"),
    lambda score, mask: smallest(score, mask, 2),
    lambda score, mask: between(score, mask, -math.inf, math.inf),
    lambda score, mask: drawn(mask, 2, torch.Generator().manual_seed(0)),
    lambda score, mask: below_quantile(score, mask, 0.5),
    lambda score, mask: above_own_quantile(score, mask, 0.0),
    lambda score, mask: above_own_quantile(score, mask, 0.0, "order"),
]


def chosen(selection: torch.Tensor, score: torch.Tensor = SCORE) -> list[float]:
    """The scores of what was chosen, in the order of the tokens."""
    return score[selection].tolist()


@pytest.mark.parametrize(
    "share, down, up", [(1.0, 25, 25), (0.28, 7, 7), (0.5, 12, 13), (0.04, 1, 1), (0.041, 1, 2), (0.0, 1, 1)]
)
def test_a_quota_of_25(share, down, up):
    # 0.28 * 25 is 7.000000000000001: rounded up it stays 7; 0.5 * 25 = 12.5; 0.041 * 25 = 1.025
    mask = torch.ones(5, 5).bool()
    assert (quota(share, mask), quota(share, mask, "up")) == (down, up)


def test_a_quota_counts_what_the_mask_allows_and_is_at_least_one():
    assert quota(0.5, MASK) == 3 and quota(0.5, MASK, "up") == 4  # of seven
    assert quota(1.0, NOTHING) == quota(1.0, NOTHING, "up") == 1
    assert quota(0.29, torch.ones(100).bool()) == 28  # 28.999999999999996, cut as int() in the authors' code cuts it


def test_the_largest():
    assert chosen(largest(SCORE, MASK, 1)) == [3.0]
    assert chosen(largest(SCORE, MASK, 3)) == [2.0, 2.0, 3.0]
    assert largest(SCORE, MASK, 7).equal(MASK) and largest(SCORE, MASK, 8).equal(MASK)
    assert not largest(SCORE, MASK, 0).any() and not largest(SCORE, MASK, 0, "kept").any()


def test_of_equal_ones_the_first_or_all():
    # the second largest is 2.0, twice
    assert largest(SCORE, MASK, 2).nonzero().tolist() == [[0, 1], [1, 2]]
    assert largest(SCORE, MASK, 2, "kept").nonzero().tolist() == [[0, 1], [0, 4], [1, 2]]
    level = torch.ones_like(SCORE)
    assert largest(level, MASK, 2).nonzero().tolist() == [[0, 0], [0, 1]]
    assert smallest(level, MASK, 2).nonzero().tolist() == [[0, 0], [0, 1]]
    assert largest(level, MASK, 2, "kept").equal(MASK)
    assert largest(SCORE, MASK, 7, "kept").equal(MASK) and largest(SCORE, MASK, 8, "kept").equal(MASK)


def test_minus_infinity_under_the_mask_goes_before_what_is_off_it():
    score = torch.tensor([NAN, -math.inf, 1.0, 9.0])
    mask = torch.tensor([False, True, True, False])
    assert largest(score, mask, 2).equal(mask) and largest(score, mask, 3, "kept").equal(mask)


def test_which_of_equal_ones_does_not_hang_on_the_padding():
    score = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).repeat(40, 1)
    mask = torch.ones_like(score).bool()
    wide, wide_mask = (torch.nn.functional.pad(x, (0, 50)) for x in (score, mask))
    for select in (largest, smallest):
        assert select(wide, wide_mask, 17)[:, :3].equal(select(score, mask, 17))


def test_the_smallest():
    assert chosen(smallest(SCORE, MASK, 3)) == [0.5, -1.0, 0.0]


def test_bounds_are_strict():
    assert chosen(between(SCORE, MASK, 0.0, 2.0)) == [0.5, 1.0]
    assert chosen(between(SCORE, MASK, -math.inf, 1.0)) == [0.5, -1.0, 0.0]
    assert not between(SCORE, MASK, 1.0, 1.0).any()


def test_a_draw_is_the_first_of_a_permutation_of_what_is_allowed():
    # the flat places that count; a run repeats only if the generator is asked exactly once, for all of them
    places = torch.tensor([0, 1, 3, 4, 5, 7, 8])[torch.randperm(7, generator=torch.Generator().manual_seed(5))]
    source = torch.Generator().manual_seed(5)
    assert drawn_places(MASK, 3, source).equal(places[:3])
    whole = torch.Generator().manual_seed(5)
    torch.randperm(7, generator=whole)
    assert source.get_state().equal(whole.get_state())
    assert drawn(MASK, 3, torch.Generator().manual_seed(5)).flatten().nonzero().squeeze(1).equal(places[:3].sort()[0])


def test_a_draw_of_more_than_there_is_takes_all():
    assert drawn(MASK, 9, torch.Generator()).equal(MASK) and not drawn(MASK, 0, torch.Generator()).any()


def test_a_draw_is_even():
    source, counts = torch.Generator().manual_seed(0), torch.zeros(MASK.shape)
    for _ in range(700):
        counts += drawn(MASK, 2, source)
    # each of seven with 2/7 in 700 draws: 200, deviation sqrt(700 * 2/7 * 5/7) = 12; within four of them
    assert counts[~MASK].sum() == 0 and (counts[MASK] - 200).abs().max() < 48


def test_threshold_ignores_the_padding_and_keeps_nothing_of_nothing():
    x = torch.tensor([[0.1, 1.2, 0.3, 0.05], [0.9, 0.2, NAN, 9.0]], requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    threshold = quantile_threshold(x, mask, 0.8)
    assert threshold.item() == pytest.approx(0.9) and not threshold.requires_grad
    assert quantile_threshold(x, torch.zeros_like(mask), 0.8).item() == math.inf


def test_below_the_quantile_of_all():
    # -1, 0, 0.5, 1, 2, 2, 3 at place 0.5 * 6 = 3: 1.0, itself left out; at 0.75 * 6 = 4.5 between the two 2.0
    assert chosen(below_quantile(SCORE, MASK, 0.5)) == [0.5, -1.0, 0.0]
    assert chosen(below_quantile(SCORE, MASK, 0.75)) == [0.5, 1.0, -1.0, 0.0]
    assert not below_quantile(SCORE, MASK, 0.0).any()
    assert not below_quantile(torch.ones_like(SCORE), MASK, 1.0).any()


def test_above_the_responses_own_quantile():
    # 0.5, 1, 2, 2 at place 0.5 * 3 = 1.5: 1.5; -1, 0, 3 at 1: 0
    assert chosen(above_own_quantile(SCORE, MASK, 0.5)) == [2.0, 2.0, 3.0]
    # at 0.8 * 3 = 2.4 between the two 2.0, and equal to them; at 1.6 between 0 and 3: 1.8
    assert chosen(above_own_quantile(SCORE, MASK, 0.8)) == [3.0]
    assert chosen(above_own_quantile(SCORE, MASK, 0.0)) == [2.0, 1.0, 2.0, 3.0, 0.0]
    assert not above_own_quantile(SCORE, MASK, 1.0).any()


def test_above_the_score_at_the_responses_own_place():
    # place 0.5 * 4 = 2: 2.0; floor(0.5 * 3) = 1: 0
    assert chosen(above_own_quantile(SCORE, MASK, 0.5, "order")) == [3.0]
    # place floor(0.25 * 4) = 1: 1.0; floor(0.25 * 3) = 0: -1
    assert chosen(above_own_quantile(SCORE, MASK, 0.25, "order")) == [2.0, 2.0, 3.0, 0.0]
    assert not above_own_quantile(SCORE, MASK, 1.0, "order").any()
    # the place of 1 - 0.3 of ten is 7, where 0.7 * 10 is 7 but (1 - 0.9) * 10 is 0.9999999999999998: it is 1
    row, whole = torch.arange(10.0).unsqueeze(0), torch.ones(1, 10).bool()
    assert above_own_quantile(row, whole, 1 - 0.3, "order").sum() == 2
    assert above_own_quantile(row, whole, 1 - 0.9, "order").sum() == 8


@pytest.mark.parametrize("select", EACH)
def test_nothing_is_chosen_of_nothing_and_nothing_off_the_mask(select):
    score, mask = SCORE.clone().requires_grad_(), MASK.clone()
    assert not select(score, NOTHING).any()
    for allowed in (ONE, mask):
        selection = select(score, allowed)
        assert selection.dtype == torch.bool and not selection[~allowed].any()
    assert mask.equal(MASK)


def test_one_token_is_the_largest_but_above_no_quantile():
    for level in (0.0, 0.5, 1.0):
        assert not above_own_quantile(SCORE, ONE, level).any() and not below_quantile(SCORE, ONE, level).any()
    assert largest(SCORE, ONE, 1).equal(ONE) and smallest(SCORE, ONE, 1).equal(ONE)
    assert drawn(ONE, 1, torch.Generator()).equal(ONE)


def test_a_row_of_scores_is_enough():
    score = torch.tensor([2.0, NAN, 1.0, 3.0])
    mask = torch.tensor([True, False, True, True])
    assert largest(score, mask, 2).tolist() == [True, False, False, True]
    assert drawn_places(mask, 3, torch.Generator()).sort()[0].tolist() == [0, 2, 3]
