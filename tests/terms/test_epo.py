"""EPO against its card (arXiv:2509.22576): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.epo import Epo, penalty_weight, released_penalty_weight

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, token_batch

NAN = math.nan
H = [[0.3, 1.0, 1.8], [0.6, 2.0, NAN]]
PAPER = {"kappa_l": 0.5, "kappa_r": 1.5}


def history(mean: float, steps: int = 3) -> dict:
    """What earlier steps left."""
    return {"entropy_sum": mean * steps, "steps": steps}


def added_loss(term: Epo, mask, entropy, memory: dict):
    """lambda times the mean over tokens, its gradient at the entropies, and the metrics; step 30 of 150."""
    view, batch = card_step(mask, entropy, entropy, [[0.0] * len(row) for row in mask], entropy)
    batch = replace(batch, step=30, progress=0.2)
    outcome = second_stage(term, batch, first_stage(term, view, memory), memory)
    loss = term.default_coef * outcome.losses["link"][batch.mask].mean()
    loss.backward()
    assert batch.logps.grad is None and batch.hidden().grad is None and outcome.advantages is None
    assert (batch.entropy.grad[~batch.mask] == 0).all()
    return loss.item(), batch.entropy.grad[batch.mask].tolist(), outcome.metrics


def test_the_cards_example():
    memory = history(1.0)
    loss, gradient, metrics = added_loss(Epo(**PAPER), [[1, 1, 1], [1, 1, 0]], H, memory)
    # printed to nine digits, the gradient to six of 1e3 times it: half of the last one
    assert loss == pytest.approx(-0.001139558, abs=5e-10)
    assert gradient == pytest.approx([-0.188353e-3, -0.166667e-3, -0.144980e-3, -0.25e-3, -0.217470e-3], abs=5e-10)
    assert metrics["link/beta"].item() == pytest.approx(1.301194, abs=5e-7)
    assert metrics["link/outside"][0].tolist() == [1, 0, 1] and metrics["link/outside"][1, :2].tolist() == [0, 1]
    # this step's token mean, 5.7 / 5, joins the history for the next one
    assert memory == {"entropy_sum": pytest.approx(4.14), "steps": 4}


def test_the_indicator_trains_a_plain_bonus():
    term = Epo(**PAPER, penalty="indicator")
    loss, gradient, _ = added_loss(term, [[1, 1, 1], [1, 1, 0]], H, history(1.0))
    assert loss == pytest.approx(-0.001090764, abs=5e-10)
    assert gradient == pytest.approx([-0.5e-3 / 3] * 3 + [-0.25e-3] * 2, rel=1e-6)
    # the band's edge is inside
    at_the_edges, _, metrics = added_loss(term, [[1, 1]], [[0.5, 1.5]], history(1.0))
    assert at_the_edges == pytest.approx(-0.001, rel=1e-6) and metrics["link/outside"].sum() == 0


def test_without_a_history_it_is_a_plain_bonus():
    memory: dict = {}
    loss, gradient, metrics = added_loss(Epo(**PAPER), [[1, 1, 1], [1, 1, 0]], H, memory)
    # L_H = (3.1 / 3 + 1.3) / 2 = 1.166667
    assert loss == pytest.approx(-0.001 * (3.1 / 3 + 1.3) / 2, rel=1e-6)
    assert gradient == pytest.approx([-0.5e-3 / 3] * 3 + [-0.25e-3] * 2, rel=1e-6)
    assert set(metrics) == {"link/affected"} and memory["steps"] == 1


def test_turns_count_alike_whatever_their_length():
    # the first response: a turn of two tokens, a tool's token, a turn of one; the second: three tokens at once.
    # 1 / (2 responses * 2 turns * 2 tokens) = 1/8, twice, then 1/4; and 1 / (2 * 3) = 1/6
    mask, entropy = [[1, 1, 0, 1], [0, 1, 1, 1]], [[1.0, 2.0, NAN, 4.0], [9.0, 1.0, 2.0, 3.0]]
    loss, gradient, _ = added_loss(Epo(), mask, entropy, {})
    assert gradient == pytest.approx([-0.125e-3] * 2 + [-0.25e-3] + [-1e-3 / 6] * 3, rel=1e-6)
    # ((1.5 + 4) / 2 + 2) / 2
    assert loss == pytest.approx(-2.375e-3, rel=1e-6)
    _, gradient, _ = added_loss(Epo(average="tokens"), mask, entropy, {})
    assert gradient == pytest.approx([-1e-3 / 6] * 6, rel=1e-6)


def test_a_response_without_tokens_is_no_response():
    loss, _, _ = added_loss(Epo(), [[1, 1], [0, 0]], [[1.0, 3.0], [NAN, NAN]], {})
    assert loss == pytest.approx(-2e-3, rel=1e-6)


@pytest.mark.parametrize("alpha, net", [(0.1, -1 + 0.1301194), (0.0, -1.0), (1.0, 0.301194)])
def test_above_the_band_the_bonus_is_damped_and_turns_only_for_a_large_alpha(alpha, net):
    _, gradient, _ = added_loss(Epo(alpha=alpha), [[1]], [[2.5]], history(1.0))
    assert gradient == pytest.approx([net * 1e-3], abs=5e-10)


def test_the_reference_is_the_mean_of_all_earlier_steps():
    memory, term, seen = {}, Epo(), []
    for value in (1.0, 3.0, 8.0, 0.0):
        view, _ = card_step([[1, 1, 0]], *[[[value, value, NAN]]] * 4)
        seen.append(first_stage(term, view, memory).metrics.get("link/reference"))
    # nothing, 1, (1 + 3) / 2, (1 + 3 + 8) / 3
    assert seen == [None, 1.0, 2.0, 4.0]
    empty, _ = card_step([[0]], *[[[NAN]]] * 4)
    before = dict(memory)
    assert first_stage(term, empty, memory).metrics["link/reference"] == 3.0 and memory == before


def test_the_weight_of_the_penalty():
    assert penalty_weight(0, 0.0, 3.0) == 2
    assert penalty_weight(30, 30 / 150, 3.0) == pytest.approx(1.301194, abs=5e-7)
    # K = 125: half of it is 62, and step 62 is one decay of e^-gamma
    assert penalty_weight(62, 62 / 125, 3.0) == pytest.approx(1 + math.exp(-3), rel=1e-12)
    assert penalty_weight(125, 1.0, 3.0) == pytest.approx(1.0024, abs=5e-5)


def test_the_released_weight_of_the_penalty():
    term = Epo(**PAPER, schedule="code")
    _, _, metrics = added_loss(term, [[1, 1, 1], [1, 1, 0]], H, history(1.0))
    # step 30: 1 - 0.2 (1 - e^-0.8) = 0.889866
    assert metrics["link/beta"].item() == pytest.approx(0.889866, abs=5e-7)
    assert released_penalty_weight(0) == 1
    # the jump at the middle: 1 - 0.2 (1 - e^-2) = 0.827067, then 0.8 e^(-3 / 75) = 0.768632 one step later
    assert released_penalty_weight(75) == pytest.approx(0.827067, abs=5e-7)
    assert released_penalty_weight(76) == pytest.approx(0.768632, abs=5e-7)
    # 0.8 e^-3 = 0.0398297 at the last of the 150 steps, and ever after: the code clamps its step count
    assert released_penalty_weight(150) == pytest.approx(0.0398297, abs=5e-8)
    assert released_penalty_weight(151) == released_penalty_weight(1000) == released_penalty_weight(150)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed):
    step = make_step(seed, torch.float64)
    term, memory = Epo(alpha=0.3, kappa_l=0.8, kappa_r=1.2, gamma=1.0), history(0.9, steps=2)
    batch = token_batch(step)
    outcome = second_stage(term, batch, first_stage(term, rollout(step), memory), memory)
    beta, rows = 1 + math.exp(-1.0 * 3 / 3), []  # step 3 of 6, as the batch says
    for row, n in zip(batch.entropy.tolist(), batch.mask.sum(1).tolist(), strict=True):
        penalty = [0.3 * (max(0.0, 0.72 - h) + max(0.0, h - 1.08)) for h in row[:n]]
        rows.append(sum(row[:n]) / n - beta * sum(penalty) / n)
    assert outcome.losses["link"][batch.mask].mean().item() == pytest.approx(-sum(rows) / 8, rel=1e-6)
    assert 0 < outcome.metrics["link/outside"][batch.mask].mean() < 1  # or the test would say little


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"kappa_l": -0.1}, "the band must be 0 <= kappa_l < kappa_r, got -0.1 and 2.0"),
        ({"kappa_r": 0.0}, "the band must be 0 <= kappa_l < kappa_r, got 0.0 and 0.0"),
        ({"gamma": NAN}, "gamma must be >= 0, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Epo(**wrong)
    assert str(error.value) == sentence
