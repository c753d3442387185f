"""The softmax baseline against its card (arXiv:2605.22940): numbers, saturation, and its blindness."""

from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.feature_softmax import FeatureSoftmax

from ..term_batches import first_stage, make_step, mean_over, rollout, second_stage, token_batch
from .test_log_det import Z, injected_gradient, with_states

U = torch.tensor(
    [1.471467, -0.078460, -1.671424, 0.649736, -0.746864, -1.012229, 0.510254, 0.877520], dtype=torch.float64
)


def entropies(step):
    """Loss and metric of the tokens that count."""
    term = FeatureSoftmax()
    batch = token_batch(step)
    outcome = second_stage(term, batch, first_stage(term, rollout(step), {}), {})
    return outcome.losses["link"][batch.mask].detach(), outcome.metrics["link/value"][batch.mask]


def test_the_cards_example():
    loss, value = entropies(with_states(Z))
    # printed to six digits
    assert value.mean().item() == pytest.approx(0.473768, abs=5e-7)
    assert torch.equal(loss, -value)
    force = -injected_gradient(FeatureSoftmax(), with_states(Z), {})
    assert force.norm().item() == pytest.approx(0.143832, abs=5e-7)
    # by hand for the first row: p = (1, e) / (1 + e) = (0.268941, 0.731059) and log p_2 - log p_1 = 1, so
    # log p_1 + H = -p_2 and F_1 = p_1 p_2 / 4 = 0.049153, the opposite in feature 2
    assert force[0].tolist() == pytest.approx([0.049153, -0.049153], abs=5e-7)


@pytest.mark.parametrize(
    ("s", "norm", "digits"),  # half of the last digit that the card prints, or that of its direction u times s
    [
        (0.001, 3.534714e-4, 1e-6),
        (0.1, 0.034477, 2e-5),
        (1.0, 0.273838, 2e-6),
        (2.0, 0.450527, 2e-6),
        (8.0, 0.066945, 2e-5),
        (32.0, 1.497e-7, 4e-4),
    ],
)
def test_the_force_vanishes_at_both_ends(s, norm, digits):
    # four equal rows: each has a quarter of the single row's force, so together half of its norm
    force = injected_gradient(FeatureSoftmax(), with_states(s * U.expand(4, 8)), {})
    assert 2 * force.norm().item() == pytest.approx(norm, rel=digits)


def test_a_collapse_goes_unseen():
    spread = torch.stack([U, U.roll(1), U.roll(3), U.flip(0)])  # the same features in other places: as flat as before
    entropy, collapsed = (entropies(with_states(z))[1].mean() for z in (spread, U.expand(4, 8)))
    assert collapsed.item() == pytest.approx(entropy.item(), rel=1e-14)
    force, blind = (injected_gradient(FeatureSoftmax(), with_states(z), {}).norm() for z in (spread, U.expand(4, 8)))
    assert blind.item() == pytest.approx(force.item(), rel=1e-14) and blind > 0.1


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 6, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_definition_at_the_current_states(sizes, seed):
    step = make_step(seed, torch.float64)
    gradient = injected_gradient(FeatureSoftmax(), step, {}, sizes)
    z = step.hidden[step.mask].requires_grad_()
    entropy = torch.zeros((), dtype=torch.float64)
    for row in z:
        p = row.exp() / row.exp().sum()
        entropy = entropy - sum(share * share.log() for share in p) / len(z)
    (-entropy).backward()
    torch.testing.assert_close(gradient, z.grad, atol=1e-12, rtol=0)
    assert mean_over(step.mask, token_loss(step)).item() == pytest.approx(-entropy.item(), rel=1e-12)


def token_loss(step):
    return FeatureSoftmax()(token_batch(step), {}).loss.detach()


def test_a_peaked_state_stays_finite():
    # p = (1, 0) exactly in float32: H = 0 and no force, not 0 log 0
    step = with_states(torch.tensor([[500.0, -500.0]]).expand(4, 2))
    assert entropies(step)[1].tolist() == [0.0] * 4
    assert not injected_gradient(FeatureSoftmax(), step, {}).any()


def test_half_precision_states_are_worked_on_in_float32():
    step = with_states(Z)
    loss, _ = entropies(replace(step, hidden=step.hidden.bfloat16()))  # exact for these states
    assert loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(-0.473768, abs=1e-6)
