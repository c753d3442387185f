"""EntroPIC against its card (arXiv:2511.15248): numbers, a loop written from the definition, and the traps."""

import math

import pytest
import torch

from hclm_rl import ProportionalIntegral, build_chain
from hclm_rl.terms.entro_pic import EntroPic

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

NAN = math.nan
P = [0.99, 0.60, 0.97, 0.20]
LOGPS = [[*map(math.log, P), NAN]]
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])


def card(old_logps=LOGPS):
    return card_step([[1, 1, 1, 1, 0]], LOGPS, old_logps, [[1.0, 1.0, -1.0, -1.0, NAN]])


def added(term: EntroPic, view, batch, alpha: float):
    """alpha times the added loss (B, T)."""
    return alpha * second_stage(term, batch, first_stage(term, view, {}), {}, coef=alpha).losses["link"]


@pytest.mark.parametrize(
    "settings, alpha, expected, gradient",
    [
        ({}, -0.018, 0.018, [-0.241, -0.25, 0.259, 0.25]),
        ({}, -0.5, 0.5, [0.0, -0.25, 0.5, 0.25]),  # N / N_high = 2: the confident success is switched off
        ({"denominator": "all"}, -0.018, 0.009, [-0.2455, -0.25, 0.2545, 0.25]),
    ],
)
@BOTH
def test_the_cards_example(settings, alpha, expected, gradient, statistics):
    # "step" looks at the sampling policy for N_high: the same tokens here
    view, batch = card()
    base = surrogate(batch, batch.advantages)
    loss = (base + added(EntroPic(**settings, statistics=statistics), view, batch, alpha))[batch.mask].mean()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    assert batch.logps.grad[batch.mask].tolist() == pytest.approx(gradient, abs=1e-12)
    assert batch.entropy.grad is None  # the entropy steers, it is not trained


@pytest.mark.parametrize("alpha", [-0.9, 0.9])
@BOTH
def test_bounded_weights_do_not_turn_round(alpha, statistics):
    # alpha N / N_high = 1.8 would weigh the two confident tokens -0.8 and 2.8; bounded they are 0 and 2
    for weights, strong in (("bounded", 1.0), ("unbounded", 1.8)):
        view, batch = card()
        term = EntroPic(weights=weights, statistics=statistics)
        loss = surrogate(batch, batch.advantages) + added(term, view, batch, alpha)
        loss[batch.mask].sum().backward()
        share = math.copysign(strong, alpha)
        # -A (1 + share) for the success at 0.99, -A (1 - share) for the failure at 0.97
        expected = [-(1 + share), -1, 1 - share, 1]
        assert batch.logps.grad[batch.mask].tolist() == pytest.approx(expected, abs=1e-12)


@BOTH
def test_no_confident_token_asks_for_nothing(statistics):
    view, batch = card_step([[1, 1]], *[[[-1.0, -2.0]]] * 2, [[1.0, -1.0]])
    loss = added(EntroPic(statistics=statistics), view, batch, 0.7)
    assert loss.tolist() == [[0.0, 0.0]]


def test_the_threshold_is_strict_and_the_current_policys():
    view, batch = card_step([[1, 1, 1]], [[math.log(0.5), -0.5, -0.9]], [[-0.9, -0.9, -0.1]], [[1.0] * 3])
    loss = added(EntroPic(threshold=0.5, statistics="micro_batch"), view, batch, 1.0)
    # exp(-0.5) = 0.61 alone is above a half now: 3 / 1, bounded to 1 / alpha = 1, times r = exp(0.4)
    assert loss[0].tolist() == pytest.approx([0.0, -math.exp(0.4), 0.0])


def test_the_ratio_is_unclipped_up_to_the_guard_against_overflow():
    view, batch = card_step([[1]], [[-0.01]], [[-3.0]], [[2.0]])
    assert added(EntroPic(statistics="micro_batch"), view, batch, 1.0).item() == pytest.approx(-2 * math.exp(2.99))
    view, batch = card_step([[1]], [[-0.01]], [[-300.0]], [[2.0]])
    assert added(EntroPic(statistics="micro_batch"), view, batch, 1.0).item() == pytest.approx(-2 * math.exp(20))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", ["bounded", "unbounded"])
@BOTH
def test_agrees_with_a_loop(seed, weights, statistics):
    step = make_step(seed, torch.float64)
    view, batch, alpha = rollout(step), token_batch(step), -0.6
    loss = added(EntroPic(threshold=0.2, weights=weights, statistics=statistics), view, batch, alpha)[batch.mask]
    tokens = batch.mask.nonzero().tolist()
    source = step.old_logps if statistics == "step" else step.logps
    high = sum(source[b, t].item() > math.log(0.2) for b, t in tokens)
    assert high > 1  # or the test would say little
    for (b, t), value in zip(tokens, loss.tolist(), strict=True):
        share = alpha * len(tokens) / high
        share = max(-1.0, min(1.0, share)) if weights == "bounded" else share
        logp, old = step.logps[b, t].item(), step.old_logps[b, t].item()
        expected = -share * math.exp(logp - old) * abs(batch.advantages[b, t].item()) if logp > math.log(0.2) else 0.0
        assert value == pytest.approx(expected, rel=1e-9)


def test_a_recipe_without_a_coef_gets_the_controller():
    for entry in ("entro_pic", EntroPic()):
        assert build_chain([entry]).links[0].coef == ProportionalIntegral(target=0.1)


@pytest.mark.parametrize("threshold", [1.0, -0.1, NAN])
def test_refuses(threshold):
    with pytest.raises(ValueError) as error:
        EntroPic(threshold=threshold)
    assert str(error.value) == f"threshold must be in [0, 1), got {threshold}"
