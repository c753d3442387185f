"""The coding rate against its card (arXiv:2006.08558) and against autograd of the definition."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.coding_rate import CodingRate

from ..term_batches import Step, first_stage, make_step, mean_over, rollout, second_stage, token_batch
from .test_log_det import Z, injected_gradient, with_states

BOTH = pytest.mark.parametrize("rows", ["responses", "tokens"])
NAN = math.nan
# the card's unit rows and dR/dU, before the projection
UNIT = torch.tensor([[0.447214, 0.894427], [0.948683, 0.316228], [0.447214, 0.894427], [0.768221, 0.640184]]).double()
ON_UNIT = torch.tensor(
    [[-0.005112, 0.290229], [0.379120, -0.092370], [-0.005112, 0.290229], [0.212267, 0.097207]]
).double()


def one_token_each() -> Step:
    """The card's rows, one response each, which is also one token each."""
    step = make_step(dtype=torch.float64)
    mask = torch.zeros_like(step.mask)
    mask[:4, 0] = True
    hidden = torch.full((*mask.shape, 2), NAN, dtype=torch.float64).masked_scatter(mask.unsqueeze(2), Z)
    return replace(step, mask=mask, hidden=hidden, old_hidden=hidden)


@BOTH
def test_the_cards_example(rows):
    step = one_token_each()
    assert value_of(CodingRate(rows=rows), step) == pytest.approx(0.932358, abs=5e-7)
    force = -injected_gradient(CodingRate(rows=rows), step, {})
    # the card's dR/dU through the normalisation: its part along u goes, the rest is divided by the length
    along = (ON_UNIT * UNIT).sum(dim=1, keepdim=True)
    expected = (ON_UNIT - UNIT * along) / Z.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(force, expected, atol=1e-6, rtol=0)  # from products of numbers of six decimals


def value_of(term: CodingRate, step: Step) -> float:
    return first_stage(term, rollout(step), {}).metrics["link/value"].item()


def test_the_distortion_is_the_square_already():
    # squaring 0.5 again is the card's trap
    assert value_of(CodingRate(distortion=0.25), one_token_each()) == pytest.approx(1.347867, abs=5e-7)


def test_the_rate_within_prompts():
    # the card's classes {0, 1} and {2, 3} as prompts; the other responses have no tokens
    prompts = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    first = first_stage(CodingRate(), rollout(one_token_each(), group=prompts), {})
    assert first.metrics["link/within"].item() == pytest.approx(0.919065, abs=5e-7)
    # the reduction R - R_c of the card
    assert (first.metrics["link/value"] - first.metrics["link/within"]).item() == pytest.approx(0.013293, abs=5e-7)
    # all responses to one prompt: R_c = R
    first = first_stage(CodingRate(), rollout(one_token_each()), {})
    assert first.metrics["link/within"].item() == pytest.approx(0.932358, abs=5e-7)


def reference(rows: list[torch.Tensor], distortion: float) -> torch.Tensor:
    """0.5 logdet(I + D / (n e2) U^T U), as the card writes it."""
    u = torch.stack([row / row.square().sum().sqrt() for row in rows])
    eye = torch.eye(u.size(1), dtype=u.dtype)
    return 0.5 * torch.logdet(eye + u.size(1) / (len(u) * distortion) * u.T @ u)


@BOTH
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 6, 1)])
@pytest.mark.parametrize(("seed", "distortion"), [(0, 0.5), (1, 0.5), (2, 0.01)])
def test_the_injected_gradient_is_that_of_the_definition(rows, sizes, seed, distortion):
    step = make_step(seed, torch.float64)
    step = replace(step, hidden=step.old_hidden, mask=step.mask & (torch.arange(8) != 3).unsqueeze(1))
    term = CodingRate(rows=rows, distortion=distortion)
    gradient = injected_gradient(term, step, {}, sizes)
    hidden = step.hidden.clone().requires_grad_()
    tokens = [[hidden[i, t] for t in range(6) if step.mask[i, t]] for i in range(8)]
    if rows == "responses":
        vectors = [sum(of_one) / len(of_one) for of_one in tokens if of_one]
        assert len(vectors) == 7  # the response without tokens is no row
    else:
        vectors = [state for of_one in tokens for state in of_one]
    rate = reference(vectors, distortion)
    (-rate).backward()
    torch.testing.assert_close(gradient, hidden.grad[step.mask], atol=1e-10, rtol=0)
    assert value_of(term, step) == pytest.approx(rate.item(), rel=1e-12)


@BOTH
def test_the_loss_is_worth_minus_the_rate(rows):
    step, term = one_token_each(), CodingRate(rows=rows)
    first = first_stage(term, rollout(step), {})
    loss = second_stage(term, token_batch(step), first, {}).losses["link"]
    assert mean_over(step.mask, loss).item() == pytest.approx(-0.932358, abs=5e-7)
    assert not loss[~step.mask].any()


def test_later_updates_reuse_the_covariance_of_the_sampling_policy():
    # at the sampling policy C = diag(3, 1) / 4, and C + e2/D I = diag(1, 1/2) for e2 = 0.5, D = 2
    old = torch.tensor([[1, 0], [1, 0], [1, 0], [0, 1]], dtype=torch.float64)
    moved = torch.tensor([[3, 4], [6, 8], [3, 4], [3, 4]], dtype=torch.float64)
    force = -injected_gradient(CodingRate(rows="tokens"), with_states(moved, old), {})
    # u (C + e2/D I)^-1 / 4 = (0.6, 1.6) / 4 = (0.15, 0.4); along (4, -3) / 5, orthogonal to u: 0.12 - 0.24 = -0.12,
    # divided by the lengths 5 and 10
    expected = -0.12 / 5 * torch.tensor([0.8, -0.6], dtype=torch.float64)
    torch.testing.assert_close(force, torch.stack([expected, expected / 2, expected, expected]), atol=1e-14, rtol=0)


def test_a_response_counts_once_however_long():
    # the mean of two equal states is that state: R of the rows (1, 2) and (2, 4) twice over, against each once
    twice = with_states(torch.tensor([[1, 2], [1, 2], [3, 1], [3, 1]], dtype=torch.float64))
    mask = twice.mask.clone()
    mask[0, 1] = False
    once = replace(twice, mask=mask)
    assert value_of(CodingRate(), once) == pytest.approx(value_of(CodingRate(), twice), rel=1e-14)
    assert value_of(CodingRate(rows="tokens"), once) != pytest.approx(value_of(CodingRate(), once), rel=1e-3)


@BOTH
def test_half_precision_states_are_worked_on_in_float32(rows):
    step, term = one_token_each(), CodingRate(rows=rows)
    step = replace(step, hidden=step.hidden.bfloat16(), old_hidden=step.old_hidden.bfloat16())  # exact for these states
    loss = second_stage(term, token_batch(step), first_stage(term, rollout(step), {}), {}).losses["link"]
    assert loss.dtype == torch.float32
    assert mean_over(step.mask, loss).item() == pytest.approx(-0.932358, abs=1e-6)


@pytest.mark.parametrize("distortion", [0.0, -0.5, NAN])
def test_refuses(distortion):
    with pytest.raises(ValueError) as error:
        CodingRate(distortion=distortion)
    assert str(error.value) == f"distortion must be positive, got {distortion}"
