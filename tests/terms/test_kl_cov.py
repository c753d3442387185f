"""KL-Cov against its card (arXiv:2505.22617): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.kl_cov import KlCov

from ..term_batches import card_step, first_stage, make_step, second_stage, surrogate, token_batch
from .test_clip_cov import CARD, NAN

UNCLIPPED = (1e9, 1e9)  # the card's loss has no clipping


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_the_cards_example(statistics):
    view, batch = card_step(**CARD)
    batch = replace(batch, clip_range=UNCLIPPED)
    term = KlCov(ratio=0.2, statistics=statistics)
    outcome = second_stage(term, batch, first_stage(term, view, {}), {})
    assert outcome.advantages is None
    plain = surrogate(batch, batch.advantages)[batch.mask]
    losses = plain + outcome.losses["link"][batch.mask]
    # printed to six digits: half of the last one
    expected = torch.tensor([-1.5, -3.338311, -1.657756, 0.670409, 0.5], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=5e-7, rtol=0)
    assert plain.mean().item() == pytest.approx(-1.125132, abs=5e-7)
    assert losses.mean().item() == pytest.approx(-1.065132, abs=5e-7)
    losses.mean().backward()
    expected = torch.tensor([-0.3, -0.667662, -0.331551, -0.125918, 0.1], dtype=torch.float64)
    torch.testing.assert_close(batch.logps.grad[batch.mask], expected, atol=5e-7, rtol=0)
    assert outcome.metrics["link/selected"][batch.mask].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_on_policy_it_is_exactly_nothing(statistics):
    term, gradients = KlCov(ratio=1.0, statistics=statistics), []
    for is_on in (False, True):
        view, batch = card_step(**{**CARD, "old_logps": CARD["logps"]})
        loss = surrogate(batch, batch.advantages)[batch.mask].mean()
        if is_on:
            outcome = second_stage(term, batch, first_stage(term, view, {}), {})
            loss = loss + outcome.losses["link"][batch.mask].mean()
            assert outcome.metrics["link/affected"].sum() == 0
        loss.backward()
        gradients.append(batch.logps.grad[batch.mask])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("ratio, selected", [(1e-4, 1), (0.25, 1), (0.5, 2), (0.74, 2), (1.0, 4)])
def test_the_number_is_a_floor_and_at_least_one_and_ties_do_not_add_to_it(ratio, selected):
    # cov = A logp = 2 for all four: a threshold would take them all, the card takes K
    logps = [[2.0, -2.0, 2.0, -2.0, NAN]]
    view, batch = card_step([[1, 1, 1, 1, 0]], logps, logps, [[1.0, -1.0, 1.0, -1.0, NAN]])
    for statistics in ("step", "micro_batch"):
        term = KlCov(ratio=ratio, statistics=statistics)
        outcome = second_stage(term, batch, first_stage(term, view, {}), {})
        assert outcome.metrics["link/selected"][batch.mask].sum() == selected


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_padding_never_ranks_first(statistics):
    # two tokens, cov = (1 - 0)(-3 + 2) = -1 and (-1 - 0)(-1 + 2) = -1; a zero in the padding would have cov 0 > -1
    view, batch = card_step([[1, 1, 0]], [[-3.0, -1.0, 0.0]], [[-3.5, -1.5, -9.0]], [[1.0, -1.0, 0.0]])
    term = KlCov(ratio=1.0, statistics=statistics)
    loss = second_stage(term, batch, first_stage(term, view, {}), {}).losses["link"]
    assert loss.tolist() == [[0.5, 0.5, 0.0]]


def test_the_pull_has_the_same_size_however_far_a_token_moved():
    view, batch = card_step([[1, 1]], [[-1.0, -2.0]], [[-1.1, -7.0]], [[1.0, -1.0]])
    term = KlCov(ratio=1.0, beta=0.3)
    second_stage(term, batch, first_stage(term, view, {}), {}).losses["link"].sum().backward()
    # both log-probs rose, so both are pulled down by beta
    torch.testing.assert_close(batch.logps.grad, torch.full((1, 2), 0.3, dtype=torch.float64))


def by_the_card(batch, ratio: float, beta: float) -> dict[tuple[int, int], float]:
    """The penalty of the selected tokens, by the card's steps 2 to 4."""
    tokens = [(b, t) for b, row in enumerate(batch.mask.tolist()) for t, counts in enumerate(row) if counts]
    mean_a = sum(batch.advantages[at].item() for at in tokens) / len(tokens)
    mean_logp = sum(batch.logps[at].item() for at in tokens) / len(tokens)

    def cov(at: tuple[int, int]) -> float:
        return (batch.advantages[at].item() - mean_a) * (batch.logps[at].item() - mean_logp)

    selected = sorted(tokens, key=cov, reverse=True)[: max(1, math.floor(ratio * len(tokens)))]
    return {at: beta * abs(batch.logps[at].item() - batch.old_logps[at].item()) for at in selected}


@pytest.mark.parametrize("seed", range(5))
def test_a_micro_batch_agrees_with_a_loop(seed):
    batch = token_batch(make_step(seed, torch.float64), slice(2, 6))
    loss = KlCov(ratio=0.3, beta=0.7, statistics="micro_batch")(batch, {}).loss
    expected = by_the_card(batch, 0.3, 0.7)
    assert {tuple(at): loss[tuple(at)].item() for at in loss.nonzero().tolist()} == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"ratio": 20.0}, "ratio is a fraction in (0, 1], not a percentage, got 20.0"),
        ({"beta": -1.0}, "beta must be >= 0, got -1.0"),
        ({"beta": NAN}, "beta must be >= 0, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        KlCov(**wrong)
    assert str(error.value) == sentence


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_of_equal_ones_the_first_are_taken_whatever_the_padding(statistics):
    # log p = 0 and equal rewards: all covariances are 0
    for padding in range(6):
        row = [0.0] * 4 + [NAN] * padding
        view, batch = card_step([[1] * 4 + [0] * padding] * 2, [row] * 2, [row] * 2, [[1.0] * 4 + [NAN] * padding] * 2)
        term = KlCov(ratio=0.4, statistics=statistics)
        chosen = second_stage(term, batch, first_stage(term, view, {}), {}).metrics["link/selected"]
        assert chosen.nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
