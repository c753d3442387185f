"""BAPO against its card (arXiv:2510.18927): the search, the loss of the new bounds, and the lag of a rollout."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.terms.bapo import Bapo

from ..term_batches import card_step, make_step, rollout, surrogate, token_batch

R = [0.5, 0.7, 0.95, 1.1, 1.5, 2.5]
A = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0]


def card(**settings):
    """The effect on the card's six tokens and a padded slot, and the batch."""
    nan = math.nan
    slots = [[0.0] * 6 + [nan]]
    _, batch = card_step([[1] * 6 + [0]], [[*map(math.log, R), nan]], slots, [[*A, nan]])
    return Bapo(**settings)(batch, {}), batch


def found(name: str, **settings) -> float:
    effect, _ = card(**settings)
    return effect.metrics[name].form(*map(float, effect.metrics[name].sums))


@pytest.mark.parametrize(
    "hi, share",
    [
        (1.2, 0.417391),
        (1.3, 0.436975),
        (1.4, 0.455285),
        (1.5, 0.472441),
        (1.6, 0.480620),
        (1.7, 0.488550),
        (1.8, 0.496241),
    ],
)
def test_the_cards_shares_on_the_way(hi: float, share: float):
    at = {"hi_min": hi, "hi_max": hi, "lo_max": 0.6}
    assert found("share", rho=0.5, **at) == pytest.approx(share, abs=5e-7)


def test_the_cards_search_in_the_papers_order():
    given = {"rho": 0.5, "step_hi": 0.1}
    assert [found(name, **given) for name in ("lower", "upper", "share")] == pytest.approx(
        [0.6, 1.9, 0.503704], abs=5e-7
    )


@pytest.mark.parametrize(
    "lo_max, hi_max, p_to_m",
    [
        (0.6, 1.2, 0.716418), (0.65, 1.2, 0.705882), (0.70, 1.2, 0.695652), (0.75, 1.2, 0.676056),
        (0.80, 1.2, 0.657534), (0.80, 2.0, 0.958904),
    ],
)  # fmt: skip
def test_the_cards_search_in_the_codes_order(lo_max: float, hi_max: float, p_to_m: float):
    # a target of 1 for P / M is a share of 1/2, which is not reached
    given = {"rho": 0.5, "first": "lo", "lo_max": lo_max, "hi_max": hi_max, "step_lo": 0.05, "step_hi": 0.05}
    assert found("lower", **given) == pytest.approx(lo_max) and found("upper", **given) == pytest.approx(hi_max)
    share = found("share", **given)
    assert share / (1 - share) == pytest.approx(p_to_m, abs=5e-7)


@pytest.mark.parametrize(
    "lo, hi, share", [(0.6, 1.2, 0.0), (0.6, 1.6, 0.352941), (0.6, 2.6, 0.592593), (0.9, 3.0, 0.661157)]
)
def test_the_cards_shares_by_gradient(lo: float, hi: float, share: float):
    at = {"lo_min": lo, "lo_max": lo, "hi_min": hi, "hi_max": hi}
    assert found("share", count="gradient", **at) == pytest.approx(share, abs=5e-7)


@pytest.mark.parametrize("lo, hi", [(0.6, 1.9), (0.9, 1.1), (0.6, 1.2)])
@pytest.mark.parametrize("clip_range", [(0.2, 0.2), (0.2, 0.28), (0.05, 1.0)])
def test_the_gradient_is_that_of_the_clip_at_the_new_bounds(lo: float, hi: float, clip_range: tuple[float, float]):
    memory = {"rollout_step": 0, "bounds": {"1": [lo, hi]}}
    _, batch = card()
    batch = replace(batch, step=1, clip_range=clip_range)
    effect = Bapo()(batch, memory)
    (surrogate(batch, effect.advantages) + effect.loss)[batch.mask].sum().backward()
    gradient = batch.logps.grad[batch.mask].tolist()
    # -min(r A, clip(r, lo, hi) A): r within the bound of its side has the gradient -r A, else none
    kept = [r <= hi if a > 0 else r >= lo for r, a in zip(R, A, strict=True)]
    assert gradient == pytest.approx([-a * r if is_kept else 0 for r, a, is_kept in zip(R, A, kept, strict=True)])


def test_bounds_are_those_of_the_same_update_of_the_rollout_before():
    term, memory = Bapo(), {}
    metrics = [{"update": 0.0, "lower": 0.6, "upper": 1.2}, {"update": 1.0, "lower": 0.7, "upper": 2.0}]
    step, seen = make_step(), []
    for start in (4, 6):
        term.on_rollout(replace(rollout(step), step=start), memory)
        for update in (0, 1):
            batch = replace(token_batch(step), step=start + update)
            effect = term(batch, memory)
            ratio = (batch.logps.detach() - batch.old_logps).exp()[batch.mask]
            a = batch.advantages[batch.mask]
            lo, hi = (0.7, 2.0) if (start, update) == (6, 1) else (0.6, 1.2)
            # clip_range 0.2: what lies between 0.8 and lo, or 1.2 and hi
            added = ((a > 0) & (ratio > 1.2) & (ratio <= hi)) | ((a < 0) & (ratio < 0.8) & (ratio >= lo))
            assert torch.equal(effect.metrics["added"][batch.mask].bool(), added)
            assert effect.metrics["update"].item() == update
            seen.append(int(added.sum()))
            term.on_step(metrics[update], memory)
    assert seen[0] == seen[1] == seen[2] != seen[3]


def test_without_wrong_tokens_the_bounds_stay():
    assert Bapo().search([0.0] * 16, [1.0] * 37) == (0.6, 1.2, 1.0)
    assert Bapo().search([0.0] * 16, [0.0] * 37) == (0.6, 1.2, 1.0)  # no token at all


def test_the_grids_reach_their_ends():
    term = Bapo()
    assert len(term.los) == 16 and term.los[-1] == pytest.approx(0.9)
    assert len(term.his) == 37 and term.his[-1] == pytest.approx(3.0)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"rho": 1.0}, "rho must be in (0, 1), got 1.0"),
        ({"lo_min": 0.95}, "0 < lo_min <= lo_max <= 1 <= hi_min <= hi_max must hold, got 0.95, 0.9, 1.2 and 3.0"),
        ({"step_hi": 0.0}, "step_hi must be positive, got 0.0"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"bapo": given}])
    assert str(caught.value) == f"bapo: {sentence}"
