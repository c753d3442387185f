"""The log-det surrogate against its card (arXiv:2605.22940) and against autograd of the entropy itself."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hclm_rl.terms.log_det import LogDet

from ..term_batches import Step, first_stage, make_step, rollout, second_stage, token_batch

Z = torch.tensor([[1.0, 2], [3, 1], [2, 4], [6, 5]], dtype=torch.float64)
FORCE = [[-0.136959, -0.003970], [0.138944, -0.285828], [-0.172688, 0.212386], [0.170703, 0.077412]]


def with_states(z: Tensor, old_z: Tensor | None = None) -> Step:
    """A step whose tokens that count have the states z, in order, and NaN in the padding."""
    step = make_step(dtype=torch.float64)
    mask = torch.zeros_like(step.mask)
    mask[:2, :2] = True
    blank = torch.full((*mask.shape, z.size(1)), math.nan, dtype=z.dtype)
    put = [blank.masked_scatter(mask.unsqueeze(2), states) for states in (z, z if old_z is None else old_z)]
    return replace(step, mask=mask, hidden=put[0], old_hidden=put[1])


def injected_gradient(term: LogDet, step: Step, memory: dict, sizes: tuple[int, ...] = (8,)) -> Tensor:
    """d loss / dZ of the tokens that count, the loss averaged over the whole step, in one or more micro-batches."""
    first = first_stage(term, rollout(step), memory)
    gradients = []
    for rows in torch.arange(8).split(list(sizes)):
        batch = token_batch(step, rows)
        loss = second_stage(term, batch, first, memory, rows).losses["link"]
        (torch.where(batch.mask, loss, 0).sum() / step.mask.sum()).backward()
        gradients.append(batch.hidden().grad[batch.mask])
    return torch.cat(gradients)


def entropy_of(z: Tensor, eps: float) -> Tensor:
    """H = 0.5 logdet(S + eps I), as the card writes it."""
    zc = z - z.mean(dim=0)
    return 0.5 * torch.logdet(zc.T @ zc / len(z) + eps * torch.eye(z.size(1), dtype=z.dtype))


def test_the_cards_example():
    step, memory = with_states(Z), {"eps": 0.1}
    assert first_stage(LogDet(), rollout(step), memory).metrics["link/value"].item() == pytest.approx(
        0.920076, abs=5e-7
    )
    # descent on -H climbs H: the gradient is minus the force, printed to six digits
    force = -injected_gradient(LogDet(), step, memory)
    torch.testing.assert_close(force, torch.tensor(FORCE, dtype=torch.float64), atol=5e-7, rtol=0)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_injected_gradient_is_that_of_the_entropy(sizes, seed):
    step = make_step(seed, torch.float64)
    step, memory = replace(step, hidden=step.old_hidden), {}
    z = step.hidden[step.mask].requires_grad_()
    gradient = injected_gradient(LogDet(), step, memory, sizes)
    (-entropy_of(z, memory["eps"])).backward()
    torch.testing.assert_close(gradient, z.grad, atol=1e-10, rtol=0)


def test_eps_is_measured_at_the_first_step_with_spread_and_kept():
    memory: dict = {}
    still = with_states(torch.ones(4, 2, dtype=torch.float64))
    assert first_stage(LogDet(), rollout(still), memory).shared == {} and memory == {}
    first_stage(LogDet(eps_relative=1e-3), rollout(with_states(Z)), memory)
    # tr(S) = 6 over two directions: 1e-3 * 3
    assert memory == {"eps": pytest.approx(3e-3, rel=1e-12)}
    second = first_stage(LogDet(eps_relative=1e-3), rollout(with_states(10 * Z)), memory)
    assert memory == {"eps": pytest.approx(3e-3, rel=1e-12)}
    # the entropy of the second step is taken with the eps of the first: S grew a hundredfold, eps did not
    assert second.metrics["link/value"].item() == pytest.approx(entropy_of(10 * Z, 3e-3).item(), rel=1e-12)


def test_later_updates_reuse_mean_and_covariance_of_the_sampling_policy():
    moved = Z + torch.tensor([[0.5, -0.5], [0.0, 1.0], [-2.0, 0.0], [0.25, 0.25]], dtype=torch.float64)
    memory = {"eps": 0.1}
    gradient = injected_gradient(LogDet(), with_states(moved, Z), memory)
    # the card's mean (3, 3) and S = [[3.5, 1.75], [1.75, 2.5]]; A = (S + 0.1 I)^-1
    a = torch.linalg.inv(torch.tensor([[3.6, 1.75], [1.75, 2.6]], dtype=torch.float64))
    torch.testing.assert_close(gradient, -(moved - 3) @ a / 4, atol=1e-12, rtol=0)


def test_removing_the_radial_part_leaves_nothing_to_gain_from_longer_states():
    step, zc = with_states(Z), Z - 3
    force = -injected_gradient(LogDet(), step, {"eps": 0.1})
    # <F, Zc> = dof, from the card
    assert (force * zc).sum().item() == pytest.approx(1.901548, abs=5e-7)
    for sizes in ((8,), (1, 7)):  # the two responses with tokens together and apart
        kept = -injected_gradient(LogDet(removes_radial=True), step, {"eps": 0.1}, sizes)
        assert abs((kept * zc).sum().item()) < 1e-14
        # only a multiple of Zc was taken out: dof / ||Zc||^2, with ||Zc||^2 = 4 tr(S) = 24
        torch.testing.assert_close(kept, force - zc * (force * zc).sum() / 24, atol=1e-14, rtol=0)


def test_half_precision_states_are_worked_on_in_float32():
    step = with_states(Z)
    step = replace(step, hidden=step.hidden.bfloat16(), old_hidden=step.old_hidden.bfloat16())  # exact for these states
    memory = {"eps": 0.1}
    first = first_stage(LogDet(), rollout(step), memory)
    batch = token_batch(step)
    loss = second_stage(LogDet(), batch, first, memory).losses["link"]
    assert loss.dtype == torch.float32
    # -N <F_i, z_i> summed = -N (dof + sum <F_i, mu>) = -4 * 1.901548, since the forces add up to 0
    assert loss[batch.mask].sum().item() == pytest.approx(-4 * 1.901548, abs=1e-5)


@pytest.mark.parametrize("eps_relative", [0.0, -1.0, math.nan])
def test_refuses(eps_relative):
    with pytest.raises(ValueError) as error:
        LogDet(eps_relative=eps_relative)
    assert str(error.value) == f"eps_relative must be positive, got {eps_relative}"
