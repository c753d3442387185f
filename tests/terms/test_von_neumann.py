"""The von Neumann entropy against its card (arXiv:2304.01434) and against autograd where that is finite."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.von_neumann import VonNeumann

from ..term_batches import first_stage, make_step, mean_over, rollout, second_stage, token_batch
from .test_log_det import Z, injected_gradient, with_states

FORCE = [[-0.118758, 0.059379], [0.045853, -0.137559], [-0.059379, 0.029689], [0.011087, -0.013304]]


def value_of(step) -> float:
    return first_stage(VonNeumann(), rollout(step), {}).metrics["link/value"].item()


def test_the_cards_example():
    step = with_states(Z)
    assert value_of(step) == pytest.approx(0.327500, abs=5e-7)
    # descent on -H climbs H: the gradient is minus the force, printed to six digits
    force = -injected_gradient(VonNeumann(), step, {})
    torch.testing.assert_close(force, torch.tensor(FORCE, dtype=torch.float64), atol=5e-7, rtol=0)


def test_an_empty_direction_gives_no_force_and_no_nan():
    # the card's branch: shares 2/3, 1/3 and 0; here with a fourth row that keeps them, (2, 1, 0) / 3 of 6 rows
    states = torch.tensor([[1, 0, 0], [2, 0, 0], [0, 1, 0]], dtype=torch.float64)
    step = with_states(torch.cat([states, torch.zeros(1, 3).double()]))
    mask = step.mask.clone()
    mask[1, 1] = False  # three tokens
    step = replace(step, mask=mask)
    assert value_of(step) == pytest.approx(0.636514, abs=5e-7)
    assert torch.equal(injected_gradient(VonNeumann(), step, {}), torch.zeros(3, 3, dtype=torch.float64))


def reference(z):
    """-sum l log l of the rows' directions."""
    u = torch.stack([row / row.square().sum().sqrt() for row in z])
    lam = torch.linalg.eigvalsh(sum(torch.outer(row, row) for row in u) / len(u))
    return -sum(share * share.log() for share in lam)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_injected_gradient_is_that_of_the_definition(sizes, seed):
    step = make_step(seed, torch.float64)
    step = replace(step, hidden=step.old_hidden)
    gradient = injected_gradient(VonNeumann(), step, {}, sizes)
    z = step.hidden[step.mask].requires_grad_()
    entropy = reference(z)
    (-entropy).backward()
    torch.testing.assert_close(gradient, z.grad, atol=1e-10, rtol=0)
    assert value_of(step) == pytest.approx(entropy.item(), rel=1e-12)


def test_longer_states_win_nothing():
    step = make_step(1, torch.float64)
    longer = replace(step, hidden=3 * step.hidden, old_hidden=3 * step.old_hidden)
    assert value_of(longer) == pytest.approx(value_of(step), rel=1e-12)
    gradient = injected_gradient(VonNeumann(), step, {})
    torch.testing.assert_close(injected_gradient(VonNeumann(), longer, {}), gradient / 3, atol=1e-14, rtol=0)
    assert (gradient * step.hidden[step.mask]).sum(dim=1).abs().max() < 1e-14


def test_the_loss_is_worth_minus_the_entropy():
    step, memory = with_states(Z), {}
    first = first_stage(VonNeumann(), rollout(step), memory)
    loss = second_stage(VonNeumann(), token_batch(step), first, memory).losses["link"]
    assert mean_over(step.mask, loss).item() == pytest.approx(-0.327500, abs=5e-7)


def test_later_updates_reuse_the_spectrum_of_the_sampling_policy():
    # at the sampling policy C = diag(3, 1) / 4; the moved states point along (3, 4) / 5 with lengths 5 and 10
    old = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=torch.float64)
    moved = torch.tensor([[3, 4], [6, 8], [3, 4], [3, 4]], dtype=torch.float64)
    force = -injected_gradient(VonNeumann(), with_states(moved, old), {})
    # -2 u log C / 4 = (0.3 log 4/3, 0.4 log 4); along (4, -3) / 5, orthogonal to u: 0.24 log(4/3) - 0.24 log 4
    # = -0.24 log 3, so the force is -0.24 log 3 (0.8, -0.6) / 5: towards the second direction, the poorer one
    expected = -0.24 * math.log(3) / 5 * torch.tensor([0.8, -0.6], dtype=torch.float64)
    expected = torch.stack([expected, expected / 2, expected, expected])
    torch.testing.assert_close(force, expected, atol=1e-14, rtol=0)


def test_the_floor_bounds_what_an_empty_direction_pulls():
    # C = diag(1, 0); a state that has moved to (1, 1) / sqrt 2 sees -2 log(floor) u_2 / 4, half of it orthogonal to u
    old = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(4, 2)
    moved = torch.tensor([[1.0, 1.0]], dtype=torch.float64).expand(4, 2)
    for floor in (1e-12, 1e-2):
        force = -injected_gradient(VonNeumann(floor=floor), with_states(moved, old), {})
        # (0, -log(floor) / 2 / sqrt 2) loses its part along (1, 1) / sqrt 2, then is divided by ||z|| = sqrt 2
        push = -math.log(floor) / 8
        expected = torch.tensor([[-push, push]], dtype=torch.float64).expand(4, 2)
        torch.testing.assert_close(force, expected, atol=1e-13, rtol=0)


def test_half_precision_states_are_worked_on_in_float32():
    step = with_states(Z)
    step = replace(step, hidden=step.hidden.bfloat16(), old_hidden=step.old_hidden.bfloat16())  # exact for these states
    first = first_stage(VonNeumann(), rollout(step), {})
    loss = second_stage(VonNeumann(), token_batch(step), first, {}).losses["link"]
    assert loss.dtype == torch.float32
    assert mean_over(step.mask, loss).item() == pytest.approx(-0.327500, abs=1e-6)


@pytest.mark.parametrize("floor", [0.0, 1.0, math.nan])
def test_refuses(floor):
    with pytest.raises(ValueError) as error:
        VonNeumann(floor=floor)
    assert str(error.value) == f"floor must be in (0, 1), got {floor}"


def test_the_floor_is_the_forces_and_not_the_entropys():
    step = make_step(dtype=torch.float64)
    values = [
        first_stage(VonNeumann(floor=floor), rollout(step), {}).metrics["link/value"].item() for floor in (1e-12, 0.5)
    ]
    u = torch.nn.functional.normalize(step.old_hidden[step.mask], dim=1)
    lam = torch.linalg.eigvalsh(u.T @ u / len(u)).clamp(min=1e-300)
    assert values == pytest.approx([-(lam * lam.log()).sum().item()] * 2, rel=1e-9)
