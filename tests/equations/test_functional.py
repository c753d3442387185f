import math
import time

import numpy as np
import pytest
import torch

from hclm_rl.equations.functional import (
    covariance_contributions,
    kth_largest,
    masked_mean,
    quantile,
    quantile_baseline,
    row_quantile,
    row_values_at,
)

NAN = math.nan


def test_masked_mean_and_its_gradient_ignore_nan_in_the_padding():
    x = torch.tensor([[1.0, NAN], [3.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    mean = masked_mean(x, mask)
    mean.backward()
    assert mean.item() == 2.0
    assert x.grad is not None and x.grad.tolist() == [[0.5, 0.0], [0.5, 0.0]]


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.tensor([NAN]), torch.tensor([False])).item() == 0.0


def test_kth_largest_counts_ties():
    values = torch.tensor([3.0, 1.0, 2.0, 3.0])
    assert [kth_largest(values, k).item() for k in (1, 2, 3, 4)] == [3.0, 3.0, 2.0, 1.0]


def test_quantile_of_the_forking_tokens_card():
    entropies = torch.tensor([0.1, 1.2, 0.3, 0.05, 0.9, 0.2])
    # position 0.8 * 5 = 4 of the sorted six: 0.9, no interpolation
    assert quantile(entropies, 0.8).item() == pytest.approx(0.9)
    # position 0.5 * 5 = 2.5: between 0.2 and 0.3
    assert quantile(entropies, 0.5).item() == pytest.approx(0.25)


@pytest.mark.parametrize("level", [0.0, 0.05, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 101])
def test_quantile_agrees_with_numpy(level, count):
    values = np.random.default_rng(0).normal(size=count)
    assert quantile(torch.tensor(values), level).item() == pytest.approx(np.quantile(values, level), abs=1e-14)


@pytest.mark.slow
def test_order_statistics_above_two_to_the_24():
    count = 2**24 + 11
    values = torch.zeros(count)
    values[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:5]] = 1.0
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.5)
    began = time.perf_counter()
    # exactly five ones: the fifth largest is one, the sixth is zero
    assert (kth_largest(values, 5).item(), kth_largest(values, 6).item()) == (1.0, 0.0)
    # 0-based positions M - 6 (the last zero), half way, and M - 5 (the first one); float32 cannot tell them apart
    assert quantile(values, (count - 6) / (count - 1)).item() == pytest.approx(0.0, abs=1e-8)
    assert quantile(values, (count - 5.5) / (count - 1)).item() == pytest.approx(0.5, abs=1e-8)
    assert quantile(values, (count - 5) / (count - 1)).item() == pytest.approx(1.0, abs=1e-8)
    print(f"five order statistics of 2**24 + 11 values: {time.perf_counter() - began:.2f} s")


ROWS = torch.tensor([[3.0, NAN, 1.0, 2.0, 5.0], [7.0, 4.0, NAN, NAN, NAN], [NAN] * 5])
COUNTED = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0] * 5]).bool()


def test_a_rows_own_quantile():
    # 1, 2, 3 at place 0.75 * 2 = 1.5, half way from 2 to 3; 4, 7 at 0.75; nothing at all
    assert row_quantile(ROWS, COUNTED, 0.75).tolist() == [2.5, 6.25, pytest.approx(NAN, nan_ok=True)]
    assert row_quantile(ROWS, COUNTED, 0.0).tolist()[:2] == [1.0, 4.0]
    assert row_quantile(ROWS, COUNTED, 1.0).tolist()[:2] == [3.0, 7.0]


def test_a_rows_value_at_a_place_is_no_further_than_its_last():
    at = torch.tensor([1.25, 1.0, 0.0], dtype=torch.float64)
    assert row_values_at(ROWS, COUNTED, at).tolist() == [2.25, 7.0, pytest.approx(NAN, nan_ok=True)]
    assert row_values_at(ROWS, COUNTED, at + 2).tolist()[:2] == [3.0, 7.0]


@pytest.mark.parametrize("level", [0.0, 0.05, 0.37, 0.8, 1.0])
def test_a_rows_own_quantile_agrees_with_numpy(level):
    source = torch.Generator().manual_seed(0)
    values, mask = torch.randn(9, 20, generator=source).double(), torch.rand(9, 20, generator=source) < 0.6
    expected = [np.quantile(row[kept].numpy(), level) for row, kept in zip(values, mask, strict=True)]
    assert row_quantile(values, mask, level).tolist() == pytest.approx(expected, abs=1e-14)


CARD_LOGPS = torch.tensor([[-0.1, -2.0, -0.5], [-3.0, -0.2, NAN]], dtype=torch.float64)
CARD_ADVANTAGES = torch.tensor([[1.5, 1.5, 1.5], [-0.5, -0.5, NAN]], dtype=torch.float64)
CARD_MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_covariance_contributions_of_the_clip_cov_card():
    cov = covariance_contributions(CARD_LOGPS.clone().requires_grad_(), CARD_ADVANTAGES, CARD_MASK)
    expected = torch.tensor([[0.848, -0.672, 0.528], [2.208, -1.152, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(cov, expected, atol=1e-12, rtol=0)
    assert not cov.requires_grad


def test_covariance_contributions_about_given_means():
    # the means of the step, not of these rows: (1.5 - 1)(-0.1 + 1) = 0.45, (1.5 - 1)(-2 + 1) = -0.5, ...
    expected = torch.tensor([[0.45, -0.5, 0.25], [3.0, -1.2, 0.0]], dtype=torch.float64)
    cov = covariance_contributions(CARD_LOGPS, CARD_ADVANTAGES, CARD_MASK, -1.0, 1.0)
    torch.testing.assert_close(cov, expected, atol=1e-12, rtol=0)
    column = torch.ones(2, 1, dtype=torch.float64)
    cov = covariance_contributions(CARD_LOGPS, CARD_ADVANTAGES, CARD_MASK, -column, column)
    torch.testing.assert_close(cov, expected, atol=1e-12, rtol=0)


def test_quantile_baseline_of_the_qae_card():
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    assert quantile_baseline(rewards, 0.4).tolist() == [0.0, 0.0, 1.0]
    five_of_eight = torch.tensor([[1.0] * 5 + [0.0] * 3])
    assert quantile_baseline(five_of_eight, 0.4).item() == quantile_baseline(five_of_eight, 0.6).item() == 1.0
    # interpolated: positions 0.4 * 3 = 1.2 (between 0 and 1) and 0.4 * 7 = 2.8 (between the last 0 and the first 1)
    assert quantile_baseline(rewards[1:2], 0.4, interpolate=True).item() == pytest.approx(0.2)
    assert quantile_baseline(five_of_eight, 0.4, interpolate=True).item() == pytest.approx(0.8)


def test_quantile_baseline_survives_a_floating_ceiling():
    # 0.28 * 25 = 7 exactly, so the baseline is the 7th smallest; in floating point the product is 7.000000000000001
    assert quantile_baseline(torch.arange(1.0, 26.0).unsqueeze(0), 0.28).item() == 7.0


def test_quantile_baseline_leaves_unscored_responses_out():
    rewards = torch.tensor([[NAN, 1, 0, 1], [NAN, NAN, NAN, 2], [NAN] * 4])
    # of (0, 1, 1): index ceil(1.2) - 1 = 1, so 1; with the NaN counted as a fourth it would be index 1 of four
    # K = 0.3: index ceil(0.9) - 1 = 0, so 0 (counted as four: ceil(1.2) - 1 = 1, so 1)
    assert quantile_baseline(rewards, 0.4)[:2].tolist() == [1.0, 2.0]
    assert quantile_baseline(rewards, 0.3)[:2].tolist() == [0.0, 2.0]
    # interpolated: position 0.3 * 2 = 0.6 between 0 and 1
    interpolated = quantile_baseline(rewards, 0.3, interpolate=True)
    assert interpolated[:2].tolist() == pytest.approx([0.6, 2.0])
    assert quantile_baseline(rewards, 0.4)[2].isnan() and interpolated[2].isnan()
