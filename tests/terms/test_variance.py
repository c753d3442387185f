"""The variance surrogate against its card (arXiv:2605.22940) and against autograd of the variance itself."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.variance import Variance

from ..term_batches import first_stage, make_step, rollout, token_batch
from .test_log_det import Z, injected_gradient, with_states

BOTH = pytest.mark.parametrize("form", ["trace", "diagonal"])


def test_the_cards_example():
    step, memory = with_states(Z), {}
    # tr(S) = 3.5 + 2.5; the card's ||F|| = 2.449490, printed to six digits
    assert first_stage(Variance(), rollout(step), memory).metrics["link/value"].item() == 6.0
    force = -injected_gradient(Variance(), step, memory)
    assert force.norm().item() == pytest.approx(2.449490, abs=5e-7)
    # 2 (z - (3, 3)) / 4
    expected = torch.tensor([[-1.0, -0.5], [0.0, -1.0], [-0.5, 0.5], [1.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(force, expected, atol=1e-14, rtol=0)
    assert memory == {}


def test_the_diagonal_form_of_the_cards_example():
    step, memory = with_states(Z), {"eps": 0.1}
    # S has 3.5 and 2.5 on its diagonal: 0.5 (log 3.6 + log 2.6)
    value = first_stage(Variance(form="diagonal"), rollout(step), memory).metrics["link/value"].item()
    assert value == pytest.approx(0.5 * math.log(3.6 * 2.6), rel=1e-14)
    force = -injected_gradient(Variance(form="diagonal"), step, memory)
    torch.testing.assert_close(force, (Z - 3) / Z.new_tensor([3.6, 2.6]) / 4, atol=1e-14, rtol=0)


@BOTH
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_injected_gradient_is_that_of_the_definition(form, sizes, seed):
    step = make_step(seed, torch.float64)
    step, memory = replace(step, hidden=step.old_hidden), {}
    gradient = injected_gradient(Variance(form=form), step, memory, sizes)
    z = step.hidden[step.mask].requires_grad_()
    entropy = torch.zeros((), dtype=torch.float64)
    for j in range(z.size(1)):  # one feature after the other
        mean = sum(z[:, j]) / len(z)
        variance = sum((value - mean) ** 2 for value in z[:, j]) / len(z)
        entropy = entropy + (variance if form == "trace" else 0.5 * (variance + memory["eps"]).log())
    (-entropy).backward()
    torch.testing.assert_close(gradient, z.grad, atol=1e-12, rtol=0)


def test_the_force_on_a_dying_direction_dies_with_it():
    # card, whitened data of N = 256: a direction of deviation s has the force 2 s / sqrt(N), 0.125 for s = 1
    z = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean(dim=0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 32)).T
    step = make_step(dtype=torch.float64)
    assert step.mask.sum() == 32
    for s in (1.0, 0.1, 0.01):
        states = z * torch.tensor([1.0, 1.0, 1.0, s], dtype=torch.float64)
        hidden = torch.zeros_like(step.hidden).masked_scatter(step.mask.unsqueeze(2), states)
        now = replace(step, hidden=hidden, old_hidden=hidden)
        gradient = injected_gradient(Variance(), now, {})
        assert gradient[:, 3].norm().item() == pytest.approx(2 * s / math.sqrt(32), rel=1e-12)


@BOTH
def test_later_updates_reuse_the_moments_of_the_sampling_policy(form):
    moved = Z + torch.tensor([[0.5, -0.5], [0.0, 1.0], [-2.0, 0.0], [0.25, 0.25]], dtype=torch.float64)
    gradient = injected_gradient(Variance(form=form), with_states(moved, Z), {"eps": 0.5})
    # the card's mean (3, 3); with eps = 0.5 the diagonal form divides by 4 and 3 instead of doubling
    scale = torch.tensor([2.0, 2.0] if form == "trace" else [1 / 4, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(gradient, -(moved - 3) * scale / 4, atol=1e-14, rtol=0)


def test_eps_of_the_diagonal_form_is_frozen_at_the_first_step_with_spread():
    term, memory = Variance(form="diagonal", eps_relative=1e-3), {}
    still = with_states(torch.ones(4, 2, dtype=torch.float64))
    assert first_stage(term, rollout(still), memory).shared == {} and memory == {}
    # tr(S) = 6 over two directions: 1e-3 * 3; a hundred times as much later, and eps stays
    first_stage(term, rollout(with_states(Z)), memory)
    first_stage(term, rollout(with_states(10 * Z)), memory)
    assert memory == {"eps": pytest.approx(3e-3, rel=1e-12)}


def test_half_precision_states_are_worked_on_in_float32():
    step = with_states(Z)
    step = replace(step, hidden=step.hidden.bfloat16(), old_hidden=step.old_hidden.bfloat16())  # exact for these states
    first = first_stage(Variance(), rollout(step), {})
    effect = Variance()(replace(token_batch(step), shared={k.split("/")[1]: v for k, v in first.shared.items()}), {})
    assert effect.loss.dtype == torch.float32
    # -sum_i 2 <zc_i, z_i> = -2 N tr(S) = -48, since the zc_i add up to 0
    assert effect.loss[step.mask].sum().item() == pytest.approx(-48.0, abs=1e-5)


@pytest.mark.parametrize("eps_relative", [0.0, -1.0, math.nan])
def test_refuses(eps_relative):
    with pytest.raises(ValueError) as error:
        Variance(eps_relative=eps_relative)
    assert str(error.value) == f"eps_relative must be positive, got {eps_relative}"
