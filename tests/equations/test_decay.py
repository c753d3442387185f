"""The gate of the decay to the start, by its card and on sequences of gradients."""

import math

import pytest
import torch

from hclm_rl.equations.decay import pulled_back, signal


def test_the_cards_worked_example():
    # kappa = (1 - .9) / (1 + .9) = .052632; (.5 - kappa) / (1 - kappa) = .472222
    found = signal(torch.tensor([0.05, 0.5, 1.0]).sqrt(), torch.ones(3), beta1=0.9)
    assert found.tolist() == pytest.approx([0.0, 0.472222, 1.0], abs=1e-6)


def test_gradients_that_agree_are_free_and_noise_is_not():
    def moments(gradients: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999):
        m = v = torch.zeros(gradients.size(1), dtype=torch.float64)
        for g in gradients:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
        n = len(gradients)
        return m / (1 - beta1**n), v / (1 - beta2**n)

    steady = moments(torch.full((50, 1), 0.3, dtype=torch.float64))
    assert signal(*steady, beta1=0.9).item() == pytest.approx(1.0, abs=1e-12)
    noise = torch.randn(3000, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m, v = moments(noise)
    # of independent gradients the mean of m^2 / v is kappa; a mean of 4000, whose deviation is sqrt 2 kappa
    kappa = 0.1 / 1.9
    assert (m.square() / v).mean().item() == pytest.approx(kappa, abs=4 * math.sqrt(2) * kappa / math.sqrt(4000))


def test_where_no_gradient_ever_came_there_is_no_signal():
    assert signal(torch.zeros(2), torch.zeros(2), beta1=0.9).tolist() == [0.0, 0.0]


def test_the_pull():
    theta, start = torch.tensor([3.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    # 3 - .1 * 2, a signal of 1 is free, what has not moved stays
    found = pulled_back(theta, start, 0.1, torch.tensor([0.0, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([2.8, 3.0, 1.0])
    assert pulled_back(theta, start, 0.1, 0.5).tolist() == pytest.approx([2.9, 2.9, 1.0])
