import math

import pytest
import torch

from hclm_rl.equations.flow import (
    discriminator,
    entropy_influence,
    least_weights,
    mean_discriminator,
    sides,
    uniform_weights,
)


def entropy_of(logits: torch.Tensor) -> torch.Tensor:
    logps = logits.log_softmax(dim=-1)
    return -(logps.exp() * logps).sum(dim=-1)


def influence_of(logps: torch.Tensor, tokens: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """(N, V) log-probs, one token a response."""
    entropy, own = -(logps.exp() * logps).sum(dim=-1), logps.gather(1, tokens.unsqueeze(1))
    mask = torch.ones(len(tokens), 1, dtype=torch.bool)
    mean = mean_discriminator(logps).unsqueeze(1)
    return entropy_influence(own, entropy.unsqueeze(1), mean, advantages.unsqueeze(1), mask).squeeze(1)


def test_influence_on_the_card_of_steer():
    # exact first-order change for p = (0.6, 0.25, 0.1, 0.05), A = r = 1, each token in turn (methods card STEER)
    logps = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64).log().expand(4, 4)
    e = influence_of(logps, torch.arange(4), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(
        e, torch.tensor([-0.165024, 0.236644, 0.275296, 0.246480], dtype=torch.float64), rtol=0, atol=6e-7
    )


@pytest.mark.parametrize("seed", range(3))
def test_influence_is_the_derivative_along_the_policy_gradient(seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    tokens = torch.randint(7, (5,), generator=generator)
    advantages = torch.randn(5, dtype=torch.float64, generator=generator)

    def objective(x: torch.Tensor) -> torch.Tensor:
        return (advantages * x.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)).sum()

    step = torch.autograd.functional.jacobian(objective, logits)
    _, expected = torch.autograd.functional.jvp(entropy_of, logits, step)
    e = influence_of(logits.log_softmax(dim=-1), tokens, advantages)
    torch.testing.assert_close(e, expected, rtol=0, atol=1e-10)


def test_influence_averages_to_zero_over_the_policy():
    # E_a[S_a - sum_v p_v S_v] = 0: with equal advantages an on-policy batch neither burns nor raises entropy
    logps = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().expand(3, 3)
    e = influence_of(logps, torch.arange(3), torch.ones(3, dtype=torch.float64))
    assert (logps[0].exp() * e).sum().item() == pytest.approx(0, abs=1e-15)


def test_a_uniform_and_a_certain_policy_have_no_first_order_change():
    uniform, certain = torch.full((2,), -math.log(2)), torch.tensor([0.0, -200.0])
    for logps in (uniform, certain):
        assert influence_of(logps.expand(2, 2), torch.arange(2), torch.ones(2)).abs().max().item() < 1e-7
    assert discriminator(torch.tensor(0.0), torch.tensor(0.0)).item() == 0


INFLUENCE = torch.tensor([[-4.0, -1.0], [2.0, 1.0]], dtype=torch.float64)
MASK = torch.ones(2, 2, dtype=torch.bool)


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def net(weights: torch.Tensor) -> float:
    return (weights * INFLUENCE).mean().item()


def test_uniform_weights_meet_the_edge_of_the_band():
    of = sides(INFLUENCE, MASK, alone)
    assert (of.raising.item(), of.burning.item(), of.count.item(), of.net.item()) == (3.0, -5.0, 4.0, -0.5)
    assert uniform_weights(of, -1.0, 1.0) == (1.0, 1.0)
    # 3/4 - w 5/4 = 0 at w = 0.6
    assert uniform_weights(of, 0.0, 1.0) == pytest.approx((1.0, 0.6))
    # w 3/4 - 5/4 = -1 at w = 1/3
    assert uniform_weights(of, -2.0, -1.0) == pytest.approx((1 / 3, 1.0))
    # at most 3/4 and at least -5/4 can be had
    assert uniform_weights(of, 0.9, 1.0) == (1.0, 0.0)
    assert uniform_weights(of, -2.0, -1.5) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"low must not be above high, got 1\.0 and 0\.0"):
        uniform_weights(of, 1.0, 0.0)


def test_least_weights_by_lagrange():
    of = sides(INFLUENCE, MASK, alone)
    # minimise (1-a)^2 + (1-b)^2 with -4a - b + 3 = 0: 1-a = 4x, 1-b = x, so -5 + 17x + 3 = 0 and x = 2/17
    weights = least_weights(INFLUENCE, of, 0.0, 1.0, alone)
    torch.testing.assert_close(
        weights, torch.tensor([[1 - 8 / 17, 1 - 2 / 17], [1, 1]], dtype=torch.float64), rtol=0, atol=1e-9
    )
    # towards 0.6 the first weight is at 0: -b + 3 = 2.4 gives b = 0.6
    weights = least_weights(INFLUENCE, of, 0.6, 1.0, alone)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.6], [1, 1]], dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(least_weights(INFLUENCE, of, -1.0, 1.0, alone), torch.ones(2, 2, dtype=torch.float64))
    above = least_weights(INFLUENCE, of, -2.0, -1.0, alone)
    assert net(above) == pytest.approx(-1) and torch.equal(above[0], torch.ones(2, dtype=torch.float64))
    beyond = least_weights(INFLUENCE, of, 0.9, 1.0, alone, floor=0.25)
    assert beyond.tolist() == [[0.25, 0.25], [1.0, 1.0]]


def test_least_weights_are_nearer_to_one_than_uniform_ones():
    of = sides(INFLUENCE, MASK, alone)
    _, down = uniform_weights(of, 0.0, 1.0)
    uniform = torch.where(INFLUENCE < 0, down, 1.0)
    least = least_weights(INFLUENCE, of, 0.0, 1.0, alone)
    assert net(uniform) == pytest.approx(0, abs=1e-7) and net(least) == pytest.approx(0, abs=1e-7)
    assert ((1 - least) ** 2).sum() < ((1 - uniform) ** 2).sum()
