"""Rows of states, some at a time: the same numbers as of all at once, and never a copy of them all."""

import pytest
import torch
from torch import Tensor

from hclm_rl import Rollout
from hclm_rl.equations import rows
from hclm_rl.equations.forces import SURROGATES, step_force
from hclm_rl.equations.geometry import factor, moments
from hclm_rl.equations.rows import injected, mean_of_responses, pieces, sums_of_responses
from hclm_rl.equations.surrogates import unit_rows
from hclm_rl.recipe.config import find_term

from ..counted import Counted

WIDTH, COUNT = 24, 4000
SIZE = COUNT * WIDTH * 4  # bytes of the states
PIECE = 100  # rows


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 100 rows: 9.6 kB of the 384 kB of the states."""
    monkeypatch.setattr(rows, "PIECE_BYTES", PIECE * WIDTH * 4)


def states() -> Tensor:
    """Rows with a large mean and variances from 1 to 24."""
    source = torch.Generator().manual_seed(0)
    return 5 + torch.randn(COUNT, WIDTH, generator=source) * torch.arange(1.0, WIDTH + 1).sqrt()


def test_pieces_are_all_rows_once():
    size = rows.PIECE_BYTES // (4 * 3584)  # at the width of a 7B model
    assert [(each.start, each.stop) for each in pieces(2 * size + 1, 3584)] == [
        (0, size),
        (size, 2 * size),
        (2 * size, 3 * size),
    ]
    assert list(pieces(0, 3584)) == []


def test_moments_in_pieces_are_those_of_all_rows(small_pieces):
    z = states()
    whole, exact = moments(z), moments(z.double())
    assert whole.count == COUNT
    torch.testing.assert_close(whole.mean.double(), exact.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.scatter.double(), exact.scatter, rtol=0, atol=1e-6 * exact.scatter.max().item())
    zc = z.double() - z.double().mean(dim=0)
    torch.testing.assert_close(exact.scatter, zc.T @ zc)


def test_moments_hold_a_few_pieces_and_no_copy_of_the_states(small_pieces):
    z = states()
    for each in ({}, {"each": unit_rows}):
        with Counted() as seen:
            moments(z, **each)
        assert seen.peak < SIZE / 8


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_the_gauges_forces_hold_a_few_pieces(surrogate, small_pieces):
    z = states()
    with Counted() as seen:
        whole = step_force(surrogate, z, lambda x: x, {})
        assert whole is not None
        strengths = whole.over(z)
        value = whole.value()
    assert seen.peak < SIZE / 4
    force = whole.force(z)
    torch.testing.assert_close(strengths.norms, force.norm(dim=1))
    torch.testing.assert_close(strengths.power, force.square().sum())
    torch.testing.assert_close(strengths.bounded, whole.at_unit_length(force, z).square().sum())
    if surrogate == "log_det":
        expected = factor(moments(z), whole.eps).leverage(z)
        torch.testing.assert_close(strengths.leverages, expected, rtol=1e-5, atol=1e-5)
    assert value.isfinite()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_step_is_decomposed_once_and_its_micro_batches_never(surrogate):
    z = states()
    with Counted() as seen:
        whole = step_force(surrogate, z, lambda x: x, {})
        assert whole is not None
        whole.value(), whole.over(z)
    assert seen.decompositions == (surrogate in ("log_det", "coding_rate", "von_neumann"))
    with Counted() as seen:
        for part in z.split(500):
            whole.force(part)
    assert seen.decompositions == 0


def test_unit_rows_are_made_for_the_surrogates_on_unit_states_alone():
    z = states()
    for surrogate in ("log_det", "diagonal", "variance", "feature_softmax"):
        whole = step_force(surrogate, z, lambda x: x, {})
        assert whole is not None
        with Counted() as seen:
            whole.force(z)
        assert seen.calls["linalg_vector_norm"] == 0


LENGTHS = torch.tensor([5, 0, 170, 1, 100, 24])  # of 300 tokens in all; a response of 170 lies in three pieces
MASK = torch.arange(170) < LENGTHS.unsqueeze(1)


def test_means_of_responses_are_those_of_a_loop(small_pieces):
    z = states()[:300]
    loop = torch.stack([part.double().mean(dim=0).float() for part in z.split(LENGTHS.tolist())])  # NaN of no token
    assert torch.equal(mean_of_responses(z, MASK), loop.nan_to_num(0.0))
    wider = torch.nn.functional.pad(MASK, (0, 7))
    assert torch.equal(mean_of_responses(z, wider), mean_of_responses(z, MASK))
    half = mean_of_responses(z.bfloat16(), MASK)
    assert half.dtype == torch.float32
    sums = [part.double().sum().item() for part in z[:, 0].split(LENGTHS.tolist())]
    torch.testing.assert_close(sums_of_responses(z[:, 0], MASK), torch.tensor(sums, dtype=torch.float64))
    assert mean_of_responses(z[:0], MASK & False).eq(0).all()


def spread(z: Tensor, mask: Tensor) -> Tensor:
    """States with NaN in the padding."""
    blank = torch.full((*mask.shape, z.size(1)), torch.nan, dtype=z.dtype)
    return blank.masked_scatter(mask.unsqueeze(2), z)


def test_an_injected_force_is_the_gradient_and_is_all_that_is_held(small_pieces):
    hidden = spread(states()[:300], MASK).requires_grad_()
    factors = torch.linspace(-1, 1, WIDTH)

    def force(z: Tensor, piece: slice) -> Tensor:
        assert len(z) <= PIECE and z.dtype == torch.float32
        return z.square() * factors

    with Counted() as seen:
        gains = injected(hidden, MASK, force)
    size = 300 * WIDTH * 4
    # the forces and the places of the tokens; beside them three copies of a third of the states
    assert seen.held < 1.4 * size and seen.peak < 3 * size
    pull = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(1))
    torch.where(MASK, gains * pull, 0).sum().backward()
    z = states()[:300]
    torch.testing.assert_close(gains[MASK], (z.square() * factors * z).sum(dim=1))
    assert (gains[~MASK] == 0).all() and hidden.grad is not None
    torch.testing.assert_close(hidden.grad[MASK], z.square() * factors * pull[MASK].unsqueeze(1))
    assert (hidden.grad[~MASK] == 0).all()


def test_a_force_that_is_worth_nothing_has_the_same_gradient():
    hidden = spread(states()[:300], MASK).bfloat16().requires_grad_()
    gains = injected(hidden, MASK, lambda z, _: 2 * z, is_worth_nothing=True)
    assert gains.eq(0).all() and gains.dtype == torch.float32
    gains.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert torch.equal(hidden.grad[MASK], 2 * hidden.detach()[MASK])
    nothing = injected(hidden, MASK & False, lambda z, _: z)
    assert nothing.eq(0).all() and nothing.requires_grad


# bytes at once, of those of the states: what a term holds beside them in its two stages
STAGE_ONE = {"log_det": 0.25, "variance": 0.25, "von_neumann": 0.25, "coding_rate": 0.4, "spectrum": 0.4}


@pytest.mark.parametrize("name", STAGE_ONE)
def test_the_first_stage_of_a_term_holds_no_copy_of_the_states(name, small_pieces):
    z, mask = states(), torch.ones(40, COUNT // 40, dtype=torch.bool)
    view = Rollout(
        ids=torch.zeros(mask.shape, dtype=torch.long),
        mask=mask,
        advantages=torch.zeros(40),
        rewards=torch.zeros(40),
        reward_parts=torch.zeros(40, 1),
        group_rewards=torch.zeros(40, 4),
        group=torch.arange(40) // 4,
        reward_scale=torch.ones(40),
        logps=torch.zeros(mask.shape),
        entropy=torch.zeros(mask.shape),
        packed=lambda: z,
    )
    with Counted() as seen:
        effect = find_term(name)().on_rollout(view, {})
    assert effect.metrics and seen.peak < STAGE_ONE[name] * SIZE


def test_states_of_a_rollout_are_those_of_its_tokens():
    z = states()[:300]
    view = Rollout(
        ids=torch.zeros(MASK.shape, dtype=torch.long),
        mask=MASK,
        advantages=torch.zeros(6),
        rewards=torch.zeros(6),
        reward_parts=torch.zeros(6, 1),
        group_rewards=torch.zeros(6, 2),
        group=torch.arange(6) // 2,
        reward_scale=torch.ones(6),
        hidden=lambda layer=-1: spread(z, MASK),
    )
    assert torch.equal(view.states(), z)
