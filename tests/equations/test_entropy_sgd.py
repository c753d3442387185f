"""Entropy-SGD: the card's three inner steps, a resumed run, SGD without inner steps, what is refused."""

import pytest
import torch
from torch import nn

from hclm_rl.equations.entropy_sgd import EntropySgd

CARD = {"lr": 0.5, "inner_steps": 3, "inner_lr": 0.1, "gamma": 0.5, "growth": 0.0, "noise": 0.0, "momentum": 0.0}


def walk(x: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The weight after each step down 2 x^2."""
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        (2 * x.square()).sum().backward()
        optimizer.step()
        seen.append(x.sum().item())
    return seen


def test_the_inner_steps_and_the_outer_one_of_the_card():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = EntropySgd([x], **CARD)
    assert walk(x, optimizer, 2) == pytest.approx([0.6, 0.38])
    assert optimizer.state[x]["mean"].item() == pytest.approx(0.77)
    # x' = .259 and mean .64225; then 1 - .5 (1 - .64225)
    assert walk(x, optimizer, 1) == pytest.approx([0.821125])
    # all of it again, in proportion, from the new anchor
    assert walk(x, optimizer, 3) == pytest.approx([0.6 * 0.821125, 0.38 * 0.821125, 0.821125**2])


def test_nesterov_momentum_and_the_growth_of_gamma():
    x = nn.Parameter(torch.tensor([1.0]))
    optimizer = EntropySgd([x], **{**CARD, "inner_steps": 1, "momentum": 0.9, "growth": 1.0})
    # x' = .6, mean .9, slope .1; with momentum .1 + .9 * .1 = .19: 1 - .095
    assert walk(x, optimizer, 1) == pytest.approx([0.905])
    # x' = .905 - .1 * 3.62 = .543 (gamma moves nothing at the anchor), mean .8145, slope .0905;
    # speed .9 * .1 + .0905 = .1805, slope .0905 + .9 * .1805 = .25295: .905 - .126475
    assert walk(x, optimizer, 1) == pytest.approx([0.778525])
    two = nn.Parameter(torch.tensor([1.0]))
    optimizer = EntropySgd([two], **{**CARD, "inner_steps": 2, "growth": 1.0})
    walk(two, optimizer, 2)
    start = two.item()
    # gamma 1 now: x' = .6 start, then .6 - .1 (4 * .6 + 1 * (.6 - 1)) = .4 of start
    assert walk(two, optimizer, 1) == pytest.approx([0.6 * start])
    optimizer.zero_grad()
    (2 * two.square()).sum().backward()
    optimizer.step()
    mean = 0.75 * (0.75 + 0.25 * 0.6) + 0.25 * 0.4
    assert two.item() == pytest.approx(start * (1 - 0.5 * (1 - mean)))


def test_without_inner_steps_it_is_torchs_sgd():
    ours, theirs = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([1.0, 2.0]))
    mine = walk(ours, EntropySgd([ours], lr=0.05, inner_steps=0, momentum=0.9), 5)
    assert mine == pytest.approx(walk(theirs, torch.optim.SGD([theirs], lr=0.05, momentum=0.9, nesterov=True), 5))


def test_the_noise_is_the_steps_own_and_a_resumed_run_goes_on():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    settings = {**CARD, "noise": 0.1, "seed": 3}
    x = nn.Parameter(torch.ones(4))
    whole = walk(x, EntropySgd([x], **settings), 7)
    assert torch.equal(torch.random.get_rng_state(), before)
    y = nn.Parameter(torch.ones(4))
    first = EntropySgd([y], **settings)
    start = walk(y, first, 4)
    second = EntropySgd([y], **settings)
    second.load_state_dict(first.state_dict())
    assert start + walk(y, second, 3) == whole
    z = nn.Parameter(torch.ones(4))
    assert walk(z, EntropySgd([z], **{**settings, "seed": 4}), 7) != whole


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"lr": 0.0}, r"lr and inner_lr must be more than 0 and finite, got 0\.0 and 0\.1"),
        ({"inner_steps": -1}, r"inner_steps must be at least 0, got -1"),
        ({"noise": -0.1}, r"noise must be at least 0 and finite, got -0\.1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
    ],
)
def test_what_is_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        EntropySgd([nn.Parameter(torch.ones(1))], **{**CARD, **wrong})
