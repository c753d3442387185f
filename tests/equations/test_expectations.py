import math

import pytest
import torch

from hclm_rl.equations.expectations import inner, of_expectations, products, square_of_expectation

F64 = torch.float64


def test_products_by_hand():
    left = [[torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([0.0, 1.0]), torch.tensor([[1.0]])]]
    # P = (1, 1/2, 2): 1 + 4/2 + 2 * 9 = 21; 0 + 2/2 + 2 * 3 = 7; 1/2 + 2
    weights = [torch.tensor([1.0, 0.5]), torch.tensor([[2.0]])]
    assert products(left, left, weights).tolist() == [[21.0, 7.0], [7.0, 2.5]]
    assert products(left, [*left, left[0]], weights).tolist() == [[21.0, 7.0, 21.0], [7.0, 2.5, 7.0]]
    assert inner(left[0], left[0]) == 14.0


def test_the_square_of_an_expectation_by_hand():
    # vectors 1, 2, 6 in one dimension: (3 * 9 - (1 + 4 + 36) / 3) / 2 = (27 - 41/3) / 2 = 20/3, the mean of 2, 6, 12
    v = torch.tensor([1.0, 2.0, 6.0], dtype=F64)
    found = square_of_expectation(torch.outer(v, v))
    assert found.value == pytest.approx(20 / 3)
    # left out one at a time: 12, 6, 2; jackknife sqrt(2/3 * sum (x - 20/3)^2), squares 256/9, 4/9, 196/9
    assert found.error == pytest.approx(math.sqrt(2 / 3 * (256 + 4 + 196) / 9))
    assert square_of_expectation(torch.tensor([[4.0]], dtype=F64)).value == 4.0  # one vector: with its noise
    assert math.isnan(square_of_expectation(torch.outer(v[:2], v[:2])).error)


def test_noise_does_not_pass_for_signal():
    # 2,000 sets of 8 vectors of pure noise in 5 dimensions: the square of the mean is 5/8, the estimate 0
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2000, 8, 5, generator=g, dtype=F64)
    gram = v @ v.transpose(1, 2)
    found = [square_of_expectation(each) for each in gram]
    # the deviation of one is sqrt(2 * 5 / (8 * 7)) = .42, of the mean of 2,000 .01
    assert sum(each.value for each in found) / 2000 == pytest.approx(0, abs=0.04)
    assert gram.mean().item() == pytest.approx(5 / 8, abs=0.04)
    assert sum(each.value > 0 and each.is_told_from_0() for each in found) / 2000 < 0.1


def test_the_error_of_a_product_of_expectations():
    # rows' means 2, 4 (variance 2, over 2 rows 1), columns' means 1, 5 (variance 8, over 2 columns 4)
    between = torch.tensor([[0.0, 4.0], [2.0, 6.0]], dtype=F64)
    found = of_expectations(between)
    assert (found.value, found.error) == pytest.approx((3.0, math.sqrt(5)))
    assert of_expectations(between, of_left_alone=True).error == pytest.approx(1.0)
    assert math.isnan(of_expectations(between[:1, :1]).error)
