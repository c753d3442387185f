"""Clip-Cov against its card (arXiv:2505.22617): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.clip_cov import ClipCov

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

NAN = math.nan
CARD = {
    "mask": [[1, 1, 1], [1, 1, 0]],
    "logps": [[-0.1, -2.0, -0.5], [-3.0, -0.2, NAN]],
    "old_logps": [[-0.1, -2.8, -0.6], [-2.7, -0.2, NAN]],
    "advantages": [[1.5, 1.5, 1.5], [-0.5, -0.5, NAN]],
}


def shaped(term: ClipCov, view, batch):
    """Advantages and metrics after both stages."""
    first = first_stage(term, view, {})
    outcome = second_stage(term, batch, first, {})
    return outcome.advantages, {**first.metrics, **outcome.metrics}


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_the_cards_example(statistics):
    # "step" looks at the sampling policy: mean old log-prob -1.28, so cov = 0.8 * 1.18, 0.8 * -1.52, 0.8 * 0.68,
    # -1.2 * -1.42 = 1.704, -1.2 * 1.08: token (2, 1) again, the only one in (1, 5)
    view, batch = card_step(**CARD)
    batch = replace(batch, clip_range=(1.0, 1.0))
    advantages, metrics = shaped(ClipCov(statistics=statistics), view, batch)
    losses = surrogate(batch, advantages)[batch.mask]
    # printed to six digits: half of the last one
    expected = torch.tensor([-1.5, -3.0, -1.657756, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, atol=5e-7, rtol=0)
    loss = losses.mean()
    assert loss.item() == pytest.approx(-1.131551, abs=5e-7)
    loss.backward()
    expected = torch.tensor([-0.3, 0.0, -0.331551, 0.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(batch.logps.grad[batch.mask], expected, atol=5e-7, rtol=0)
    # one candidate and one changed token among five
    assert metrics["link/candidates"].item() == pytest.approx(0.2)
    assert metrics["link/affected"][batch.mask].tolist() == [0, 0, 0, 1, 0]


def test_without_the_term_the_cards_loss_is_another():
    _, batch = card_step(**CARD)
    batch = replace(batch, clip_range=(1.0, 1.0))
    assert surrogate(batch, batch.advantages)[batch.mask].mean().item() == pytest.approx(-1.057469, abs=5e-7)


def test_a_token_that_ppo_clips_is_not_eligible_in_a_micro_batch():
    # mean log p = -1 and mean A = 0, so cov = A (log p + 1) = 2, -0.5, 0.5, 1: only the first lies strictly in (1, 5)
    card = {"mask": [[1, 1, 1, 1]], "logps": [[1.0, -1.5, -1.5, -2.0]], "advantages": [[1.0, 1.0, -1.0, -1.0]]}
    # r = e^0.5 = 1.65 > 1.2 with A > 0: PPO clips it, so nothing is left to drop
    view, batch = card_step(**card, old_logps=[[0.5, -1.5, -1.5, -2.0]])
    advantages, metrics = shaped(ClipCov(statistics="micro_batch", ratio=1.0), view, batch)
    assert torch.equal(advantages, batch.advantages) and metrics["link/candidates"].item() == 0
    # at r = 1 it is eligible
    view, batch = card_step(**card, old_logps=card["logps"])
    advantages, _ = shaped(ClipCov(statistics="micro_batch", ratio=1.0), view, batch)
    assert advantages.tolist() == [[0.0, 1.0, -1.0, -1.0]]


def test_bounds_are_strict():
    # mean logp = 0 and mean A = 0: cov = A logp = 1, 1, 5, 5 and 2, 2: only those between the bounds fall
    logps = [[1.0, -1.0, 5.0, -5.0, 2.0, -2.0]]
    view, batch = card_step([[1] * 6], logps, logps, [[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]])
    for statistics in ("step", "micro_batch"):
        advantages, _ = shaped(ClipCov(statistics=statistics, ratio=1.0), view, batch)
        assert advantages.tolist() == [[1.0, -1.0, 1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("ratio, dropped", [(2e-4, 1), (0.5, 2), (0.75, 3), (0.74, 2), (1.0, 4)])
def test_the_quota_is_a_floor_and_at_least_one(ratio, dropped):
    # four tokens, all of them candidates: cov = A logp = 2
    logps = [[2.0, -2.0, 2.0, -2.0]]
    view, batch = card_step([[1] * 4], logps, logps, [[1.0, -1.0, 1.0, -1.0]])
    for statistics in ("step", "micro_batch"):
        advantages, _ = shaped(ClipCov(statistics=statistics, ratio=ratio), view, batch)
        assert (advantages == 0).sum() == dropped


def test_the_draw_is_uniform_and_without_replacement():
    logps = [[2.0, -2.0, 2.0, -2.0]]
    view, _ = card_step([[1] * 4], logps, logps, [[1.0, -1.0, 1.0, -1.0]])
    hits = torch.zeros(4)
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        is_dropped = ClipCov(ratio=0.5).on_rollout(replace(view, generator=generator), {}).columns["is_dropped"]
        assert is_dropped.sum() == 2
        hits += is_dropped[0]
    # each of four falls in half of 400 draws: 200, standard deviation sqrt(400 / 4) = 10; four deviations
    assert ((hits - 200).abs() < 40).all()


def by_the_card(batch, lower: float, upper: float) -> list[tuple[int, int]]:
    """The candidates of the card's steps 1 to 5, token by token."""
    tokens = [(b, t) for b, row in enumerate(batch.mask.tolist()) for t, counts in enumerate(row) if counts]
    mean_a = sum(batch.advantages[at].item() for at in tokens) / len(tokens)
    mean_logp = sum(batch.logps[at].item() for at in tokens) / len(tokens)
    candidates = []
    for at in tokens:
        a, logp = batch.advantages[at].item(), batch.logps[at].item()
        r = math.exp(logp - batch.old_logps[at].item())
        clipped_r = min(max(r, 1 - batch.clip_range[0]), 1 + batch.clip_range[1])
        is_clipped = -a * clipped_r > -a * r
        if not is_clipped and lower < (a - mean_a) * (logp - mean_logp) < upper:
            candidates.append(at)
    return candidates


@pytest.mark.parametrize("seed", range(5))
def test_a_micro_batch_agrees_with_a_loop(seed):
    step = make_step(seed, torch.float64)
    batch = token_batch(step, slice(2, 6))
    expected = by_the_card(batch, 0.3, 5.0)
    assert len(expected) > 1  # or the test would say little
    everything = ClipCov(statistics="micro_batch", lower=0.3, ratio=1.0)(batch, {})
    assert [tuple(at) for at in (everything.advantages != batch.advantages).nonzero().tolist()] == expected
    assert everything.metrics["candidates"].item() == pytest.approx(len(expected) / batch.mask.sum().item())
    one = ClipCov(statistics="micro_batch", lower=0.3)(batch, {}).advantages != batch.advantages
    assert one.sum() == 1 and tuple(one.nonzero()[0].tolist()) in expected


def test_a_step_draws_once_over_all_its_rows():
    # 0.1 of the 32 tokens of all rows are 3.2, so 3; drawn row by row it would be at least one in each of the 8
    view = rollout(make_step())
    assert view.mask.sum() == 32
    is_dropped = ClipCov(ratio=0.1, lower=-100.0, upper=100.0).on_rollout(view, {}).columns["is_dropped"]
    assert is_dropped.sum() == 3 and not (is_dropped & ~view.mask).any()


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"ratio": 0.0}, "ratio must be in (0, 1], got 0.0"),
        ({"ratio": 1.5}, "ratio must be in (0, 1], got 1.5"),
        ({"lower": 5.0, "upper": 1.0}, "lower must be below upper, got 5.0 and 1.0"),
        ({"lower": NAN}, "lower must be below upper, got nan and 5.0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        ClipCov(**wrong)
    assert str(error.value) == sentence
