"""The clipped sum's x against a bisection over all values, and what it costs."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from hclm_rl.equations.clipped_sum import solve_clipped_sum
from hclm_rl.equations.flow import least_weights, sides

from .test_geometry import in_lockstep


def counting() -> tuple[list, Callable[[Tensor], Tensor]]:
    """A sum over one process, and the shapes that went through it."""
    calls: list = []
    return calls, lambda x: calls.append(x.shape) or x


def clipped(a: Tensor, x: float, floor: float) -> float:
    return (a * (1 - x * a).clamp(min=floor)).sum().item()


def values(kind: str) -> Tensor:
    source = torch.Generator().manual_seed(0)
    spread = torch.randn(500, generator=source, dtype=torch.float64)
    of_kind = {
        "wide": (8 * spread).exp(),
        "near": 1 + 1e-9 * spread.abs(),  # all in one bin of the first two histograms
        "ties": torch.tensor([0.25, 0.5, 4.0], dtype=torch.float64).repeat_interleave(100),
        "one": torch.tensor([0.3], dtype=torch.float64),
        "small": 1e-300 * spread.abs().clamp(min=1e-3),
    }
    return of_kind[kind]


@pytest.mark.parametrize("floor", [0.0, 0.25])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["wide", "near", "ties", "one"])
def test_the_sum_is_met_in_three_reductions(kind: str, share: float, floor: float):
    a = values(kind)
    whole = a.sum().item()
    target = (floor + share * (1 - floor)) * whole
    calls, total = counting()
    x = solve_clipped_sum(a, target, floor, whole, total)
    assert clipped(a, x, floor) == pytest.approx(target, rel=1e-10)
    expected = brentq(lambda x: clipped(a, x, floor) - target, 0.0, 1 / a.min().item(), xtol=1e-300, rtol=1e-13)
    assert x == pytest.approx(expected, rel=1e-8)
    assert 1 <= len(calls) <= 3 and set(calls) == {(2, 2**16)}


def test_what_cannot_be_reached_or_is_not_asked_costs_no_reduction():
    calls, total = counting()
    a = values("wide")
    whole = a.sum().item()
    assert solve_clipped_sum(a, 0.2 * whole, 0.25, whole, total) == math.inf
    assert solve_clipped_sum(a, whole, 0.25, whole, total) == 0
    nothing = torch.zeros(4, 3)
    of = sides(nothing, torch.ones(4, 3).bool(), lambda x: x)
    # no advantage at all, and a band that the net is not in: 61 all-reduces by bisection
    assert torch.equal(least_weights(nothing, of, 0.1, 0.2, total), torch.ones(4, 3))
    assert calls == []


def test_processes_that_share_the_values_find_the_x_of_one():
    a = values("wide")
    whole = a.sum().item()
    expected = solve_clipped_sum(a, 0.4 * whole, 0.1, whole, lambda x: x)
    parts = a[:100], a[100:], a[:0]

    def of_rank(part: Tensor) -> Callable[[Callable], float]:
        return lambda total: solve_clipped_sum(part, 0.4 * whole, 0.1, whole, total)

    found, reductions = in_lockstep([of_rank(part) for part in parts])
    assert len(set(found)) == 1 and found[0] == pytest.approx(expected, rel=1e-12) and reductions <= 3
