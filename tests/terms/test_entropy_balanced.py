"""Entropy-balanced clipping and advantages against their card (arXiv:2510.14545): numbers, a loop, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.entropy_balanced import EntropyBalanced

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

NAN = math.nan
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])
R = [[1.0, 1.5, 0.7], [1.5, 0.7, NAN]]
A = [[1.0, 1.0, 1.0], [-1.0, -1.0, NAN]]
H = [[0.2, 2.0, 0.5], [1.4, 0.1, NAN]]


def losses(term: EntropyBalanced | None, ratios=R, advantages=A, entropy=H):
    """Token losses of PPO with the term, and -n dL/dlogp of their mean, over the tokens that count."""
    mask = [[int(not math.isnan(r)) for r in row] for row in ratios]
    logps = [[math.log(r) for r in row] for row in ratios]
    zeros = [[0.0] * len(row) for row in ratios]
    view, batch = card_step(mask, logps, zeros, advantages, entropy)
    left, added, outcome = batch.advantages, 0.0, None
    if term is not None:
        outcome = second_stage(term, batch, first_stage(term, view, {}), {})
        left, added = outcome.advantages, outcome.losses["link"]
    values = (surrogate(batch, left) + added)[batch.mask]
    values.mean().backward()
    return values.tolist(), (-len(values) * batch.logps.grad[batch.mask]).tolist(), outcome


def test_plain_clipping_is_the_cards():
    values, gradient, _ = losses(None)
    assert values == pytest.approx([-1, -1.2, -0.7, 1.5, 0.8])
    assert gradient == pytest.approx([1, 0, 0.7, -1.5, 0])


@BOTH
def test_the_clipping_rule_alone(statistics):
    values, gradient, outcome = losses(EntropyBalanced(a=0.0, statistics=statistics))
    assert values == pytest.approx([-1, -1.2, -0.7, 1.5, 0.8])
    assert sum(values) / 5 == pytest.approx(-0.12)
    assert gradient == pytest.approx([1, 1.2, 0.7, -1.5, 0])
    # its loss is 0 in value, and still the one kept token counts as affected
    assert outcome.metrics["link/affected"].tolist() == [[0, 1, 0], [0, 0, 0]]


@BOTH
def test_both_parts(statistics):
    values, gradient, outcome = losses(EntropyBalanced(statistics=statistics))
    # printed to six digits: half of the last one
    assert values == pytest.approx([-0.845118, -1.536867, -0.642403, 1.703282, 0.656735], abs=5e-7)
    assert sum(values) / 5 == pytest.approx(-0.132875, abs=5e-7)
    assert gradient == pytest.approx([0.845118, 1.536867, 0.642403, -1.703282, 0], abs=5e-7)
    shaped = outcome.advantages[torch.tensor(H).isfinite()]
    assert shaped.tolist() == pytest.approx([0.845118, 1.280723, 0.917719, -1.135521, -0.820918], abs=5e-7)


@BOTH
def test_the_advantages_alone(statistics):
    _, gradient, outcome = losses(EntropyBalanced(keeps_clipped=False, statistics=statistics))
    assert gradient == pytest.approx([0.845118, 0, 0.642403, -1.703282, 0], abs=5e-7)
    assert outcome.metrics["link/kept"].sum() == 0


def test_only_uncertain_tokens_keep_their_gradient():
    # both tokens are above the clip; z of the two is +-0.707, so the first alone is kept
    term = EntropyBalanced(a=0.0, only_uncertain=True)
    assert losses(term, [[1.5, 1.5]], [[1.0, 1.0]], [[2.0, 1.0]])[1] == pytest.approx([1.2, 0.0])


def test_the_dual_clip_bounds_value_and_gradient():
    # r = 4, A = -1: min(4, 3) = 3 without gradient; r = 2: 2 with gradient 2
    values, gradient, outcome = losses(EntropyBalanced(a=0.0), [[4.0, 2.0]], [[-1.0, -1.0]], [[1.0, 1.0]])
    assert values == pytest.approx([3.0, 2.0]) and gradient == pytest.approx([0.0, -2.0])
    assert outcome.metrics["link/stopped"].tolist() == [[1, 0]]
    values, gradient, _ = losses(EntropyBalanced(a=0.0, dual_clip=None), [[4.0]], [[-1.0]], [[1.0]])
    assert values == pytest.approx([4.0]) and gradient == pytest.approx([-4.0])


def test_decisions_follow_the_shaped_sign():
    # two tokens, z = +-0.7071; a = 2 makes 1 + a z = -0.414 for the certain one: A~ < 0, so its upper clip is none
    values, gradient, _ = losses(EntropyBalanced(a=2.0), [[1.5, 1.5]], [[1.0, 1.0]], [[2.0, 1.0]])
    uncertain, certain = 1 + math.sqrt(2), 1 - math.sqrt(2)
    assert values == pytest.approx([-1.2 * uncertain, -1.5 * certain])
    assert gradient == pytest.approx([1.2 * uncertain, 1.5 * certain])


@BOTH
def test_equal_entropies_and_a_single_token_change_nothing(statistics):
    term = EntropyBalanced(statistics=statistics)
    for entropy in ([[0.7, 0.7, 0.7]], [[0.7, NAN, NAN]]):
        ratios = [[1.0 if math.isfinite(h) else NAN for h in entropy[0]]]
        _, gradient, _ = losses(term, ratios, [[2.0, 2.0, 2.0]], entropy)
        assert gradient == pytest.approx([2.0] * len(gradient))


def by_the_card(ratio: float, shaped: float, low: float, high: float, dual: float) -> tuple[float, float]:
    """The card's B for one token: its loss, and F times A~."""
    if ratio > 1 + high and shaped > 0:
        return -shaped * (1 + high), (1 + high) * shaped
    if ratio < 1 - low and shaped < 0:
        return -shaped * (1 - low), 0.0
    if ratio > dual and shaped < 0:
        return -shaped * dual, 0.0
    return -shaped * ratio, ratio * shaped


@pytest.mark.parametrize("seed", range(5))
@BOTH
def test_agrees_with_a_loop(seed, statistics):
    step = make_step(seed, torch.float64)
    step = replace(step, logps=step.old_logps + 3 * (step.logps - step.old_logps))  # far enough for every branch
    term = EntropyBalanced(a=0.5, statistics=statistics, dual_clip=1.5)
    batch = replace(token_batch(step), clip_range=(0.2, 0.28))
    outcome = second_stage(term, batch, first_stage(term, rollout(step), {}), {})
    values = surrogate(batch, outcome.advantages) + outcome.losses["link"]
    values[batch.mask].sum().backward()
    entropy = step.old_entropy if statistics == "step" else step.entropy
    tokens = [tuple(at) for at in step.mask.nonzero().tolist()]
    mean = sum(entropy[at].item() for at in tokens) / len(tokens)
    deviation = math.sqrt(sum((entropy[at].item() - mean) ** 2 for at in tokens) / (len(tokens) - 1))
    reached = set()
    for at in tokens:
        shaped = step.advantages[at[0]].item() * (1 + 0.5 * (step.entropy[at].item() - mean) / deviation)
        ratio = math.exp(step.logps[at].item() - step.old_logps[at].item())
        value, slope = by_the_card(ratio, shaped, 0.2, 0.28, 1.5)
        assert values[at].item() == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert -batch.logps.grad[at].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
        reached.add((ratio > 1.28 and shaped > 0, slope == 0))
    assert len(reached) >= 3  # kept, stopped and plain tokens, or the test would say little


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"a": -0.1}, "a must be >= 0 and finite, got -0.1"),
        ({"a": NAN}, "a must be >= 0 and finite, got nan"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1, or None, got 1.0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        EntropyBalanced(**wrong)
    assert str(error.value) == sentence
