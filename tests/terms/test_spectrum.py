"""Ranks, decay and diffusion entropy against their cards (arXiv:2509.23024, arXiv:2312.04823)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hclm_rl.terms.spectrum import Spectrum

from ..term_batches import Step, first_stage, make_step, rollout
from .test_log_det import Z, with_states

RANKS = {"effective_rank": 1.641713, "rank_me": 1.624122, "participation_ratio": 1.461929}


def said(term: Spectrum, step: Step, memory: dict | None = None, number: int = 0) -> dict[str, float]:
    """Its metrics at the optimiser step `number`."""
    view = replace(rollout(step), step=number)
    metrics = first_stage(term, view, {} if memory is None else memory).metrics
    return {name.removeprefix("link/"): value.item() for name, value in metrics.items()}


def test_the_cards_ranks():
    metrics = said(Spectrum(), with_states(Z))
    assert {name: metrics[name] for name in RANKS} == pytest.approx(RANKS, abs=5e-7)  # printed to six digits
    assert "alpha" not in metrics  # four rows have no hundred directions


def test_the_last_token_of_each_response_whatever_the_padding():
    # the card's rows last, behind others; a response without tokens and slots that do not count after the last
    step = make_step(dtype=torch.float64)
    mask = torch.zeros_like(step.mask)
    hidden = torch.full((*mask.shape, 2), math.nan, dtype=torch.float64)
    for i, (first, last) in enumerate([(0, 5), (1, 3), (2, 2), (0, 4)]):
        mask[i, first : last + 1] = True
        hidden[i, first : last + 1] = 17.0 * i
        hidden[i, last] = Z[i]
    metrics = said(Spectrum(rows="last"), replace(step, mask=mask, old_hidden=hidden))
    assert {name: metrics[name] for name in RANKS} == pytest.approx(RANKS, abs=5e-7)


def of_variances(variances: Tensor) -> Step:
    """2 D rows +-sqrt(D lam_j) e_j: the covariance is exactly diag(lam)."""
    width = len(variances)
    half = torch.diag((width * variances).sqrt())
    step = make_step(dtype=torch.float64)
    slots = math.ceil(2 * width / 8)
    mask = (torch.arange(8 * slots) < 2 * width).view(8, slots)
    blank = torch.full((8, slots, width), math.nan, dtype=torch.float64)
    hidden = blank.masked_scatter(mask.unsqueeze(2), torch.cat([half, -half]))
    names = ("ids", "old_logps", "old_entropy")
    filler = {name: getattr(step, name).new_zeros(8, slots) for name in names}
    return replace(step, mask=mask, old_hidden=hidden, **filler)


def test_the_cards_decay():
    lam = torch.tensor([4, 2, 1.5, 0.8, 0.6, 0.45, 0.2, 0.1], dtype=torch.float64)
    metrics = said(Spectrum(first_rank=2, last_rank=6), of_variances(lam))
    assert metrics["alpha"] == pytest.approx(1.358702, abs=5e-7)
    assert 0.9 < metrics["alpha_r2"] < 1


def test_the_papers_window():
    # a power law with exponent 1 in ranks 12 to 100, with other ones outside: only the window counts
    ranks = torch.arange(1, 131, dtype=torch.float64)
    lam = torch.where(ranks < 12, 3.0, torch.where(ranks > 100, 1e-4, 1 / ranks))
    metrics = said(Spectrum(), of_variances(lam))
    assert metrics["alpha"] == pytest.approx(1.0, abs=1e-9) and metrics["alpha_r2"] == pytest.approx(1.0, abs=1e-9)


def test_directions_without_rows_do_not_count_in_single_precision():
    # two orthogonal rows of unit length in 200 dimensions: uncentred singular values 1, 1, so RankMe 2. Rounding of
    # 1e-8 in 198 more eigenvalues would add 1e-4 each by its root
    hidden = torch.zeros(4, 200)
    hidden[:2] = torch.randn(200, generator=torch.Generator().manual_seed(0))
    hidden[2:] = torch.randn(200, generator=torch.Generator().manual_seed(1))
    hidden[2:] -= hidden[0] * (hidden[2:] @ hidden[0]).unsqueeze(1) / hidden[0].square().sum()
    hidden = 30 * torch.nn.functional.normalize(hidden)
    metrics = said(Spectrum(), with_states(hidden))
    # four rows leave room for four values; the two of rounding are below 1e-3 of the others, each -p log p under 4e-3
    assert metrics["rank_me"] == pytest.approx(2.0, abs=0.02)


def test_it_speaks_every_so_many_steps():
    memory, spoken = {}, []
    for number in (0, 1, 2, 3, 4, 7, 8, 11):
        if said(Spectrum(spectrum_every=3), with_states(Z), memory, number):
            spoken.append(number)
    assert spoken == [0, 3, 7, 11]


def unit_states(angles: list[float]) -> Step:
    """Eight responses of one token, on the unit circle."""
    step = make_step(dtype=torch.float64)
    mask = torch.zeros_like(step.mask)
    mask[:, 0] = True
    hidden = torch.full((*mask.shape, 2), math.nan, dtype=torch.float64)
    hidden[:, 0] = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
    return replace(step, mask=mask, old_hidden=hidden)


def test_diffusion_entropy_of_two_modes():
    # two prompts, each answered in one way, in opposite directions: distances 0 (12 pairs) and 2 (16 pairs), median 2
    memory: dict = {}
    metrics = said(Spectrum(), unit_states([0.0] * 4 + [math.pi] * 4), memory)
    assert memory["bandwidth"] == pytest.approx(2.0, rel=1e-12)
    # G has blocks of ones and of g = exp(-4 / 8): eigenvalues of K 1 and (1 - g) / (1 + g), the rest 0
    other = (1 - math.exp(-0.5)) / (1 + math.exp(-0.5))
    p = [1 / (1 + other), other / (1 + other)]
    assert metrics["diffusion_entropy"] == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-9)
    assert metrics["diffusion_entropy_within"] == pytest.approx(0.0, abs=1e-12)
    # four of the eight are split 4 : 0, 3 : 1 or 2 : 2; what is split has the entropy of its own two eigenvalues
    assert 0.3 < metrics["diffusion_information"] < metrics["diffusion_entropy"] + 0.1
    # the power 3 of the operator, not of the distances
    p = [1 / (1 + other**3), other**3 / (1 + other**3)]
    entropy = said(Spectrum(diffusion_time=3.0), unit_states([0.0] * 4 + [math.pi] * 4))["diffusion_entropy"]
    assert entropy == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-9)


def test_the_bandwidth_is_the_mean_of_the_two_middle_distances():
    # four responses at 0, 0.3, 0.9, 2.0 on the circle, and four the same as the first: 2 sin(d / 2) of the differences
    memory: dict = {}
    said(Spectrum(most_responses=4), unit_states([0.0, 0.3, 0.9, 2.0] + [0.0] * 4), memory)
    distances = sorted(2 * math.sin(d / 2) for d in (0.3, 0.9, 2.0, 0.6, 1.7, 1.1))
    assert memory["bandwidth"] == pytest.approx((distances[2] + distances[3]) / 2, rel=1e-12)


def test_the_bandwidth_is_frozen_so_that_a_contraction_shows():
    memory, term = {}, Spectrum(spectrum_every=1)
    angles = [0.3 * i for i in range(8)]
    wide = said(term, unit_states(angles), memory)["diffusion_entropy"]
    frozen = dict(memory)
    narrow = said(term, unit_states([a / 100 for a in angles]), memory, number=4)["diffusion_entropy"]
    assert memory["bandwidth"] == frozen["bandwidth"]
    assert wide > 0.5 and narrow < 0.01


def test_a_first_step_of_equal_states_leaves_the_bandwidth_open():
    memory: dict = {}
    assert "diffusion_entropy" not in said(Spectrum(), unit_states([0.5] * 8), memory)
    assert "bandwidth" not in memory


def test_diffusion_entropy_within_prompts_leaves_single_responses_out():
    # prompt 0: four responses in two opposite modes, prompt 1: one response, the others have no tokens
    step = unit_states([0.0, 0.0, math.pi, math.pi, 1.0, 1.0, 1.0, 1.0])
    mask = step.mask.clone()
    mask[5:] = False
    memory = {"bandwidth": 1.0}
    metrics = said(Spectrum(), replace(step, mask=mask), memory)
    other = (1 - math.exp(-2)) / (1 + math.exp(-2))  # g = exp(-4 / 2)
    p = [1 / (1 + other), other / (1 + other)]
    assert metrics["diffusion_entropy_within"] == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-9)


def test_prompts_answered_alike_share_no_diffusion_information():
    same, apart = (
        said(Spectrum(), unit_states(angles))["diffusion_information"]
        for angles in ([0.0, 0.0, math.pi, math.pi] * 2, [0.0] * 4 + [math.pi] * 4)
    )
    assert abs(same) < 0.1 < 0.3 < apart


def test_more_responses_than_wanted_are_cut():
    # the first two are alike, whatever the others are
    step = unit_states([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert said(Spectrum(most_responses=2), step, {"bandwidth": 1.0})["diffusion_entropy"] == pytest.approx(
        0, abs=1e-12
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"spectrum_every": 0}, "spectrum_every must be at least 1, got 0"),
        ({"first_rank": 0}, "ranks must be 1 <= first_rank < last_rank, got 0 and 100"),
        ({"last_rank": 12}, "ranks must be 1 <= first_rank < last_rank, got 12 and 12"),
        ({"diffusion_time": 0.0}, "diffusion_time must be positive, got 0.0"),
        ({"most_responses": 1}, "most_responses must be at least 2, got 1"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Spectrum(**wrong)
    assert str(error.value) == sentence
