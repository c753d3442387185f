"""The plain bonus against the card of the entropy-bonus baselines."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.entropy_bonus import EntropyBonus

from ..term_batches import both_stages, card_step, first_stage, make_step, second_stage, surrogate


@pytest.mark.parametrize("eps_high, plain, with_bonus", [(0.2, -0.533333, -0.539333), (0.28, -0.576667, -0.582667)])
def test_the_cards_example(eps_high, plain, with_bonus):
    view, batch = card_step(
        mask=[[1, 1, 1, 0]],
        logps=[[math.log(r) for r in (1.25, 1.4, 0.7, 9.0)]],
        old_logps=[[0.0] * 4],
        advantages=[[1.0, 1.0, -1.0, 1.0]],
        entropy=[[0.5, 1.0, 0.3, math.nan]],
    )
    batch = replace(batch, clip_range=(0.2, eps_high))
    term, mask = EntropyBonus(), batch.mask
    asked = second_stage(term, batch, first_stage(term, view, {}), {})
    assert asked.advantages is None
    # printed to six digits: half of the last one; c = 0.01, mean entropy 0.6
    loss = surrogate(batch, batch.advantages)[mask].mean()
    assert loss.item() == pytest.approx(plain, abs=5e-7)
    loss = loss + 0.01 * asked.losses["link"][mask].mean()
    assert loss.item() == pytest.approx(with_bonus, abs=5e-7)
    loss.backward()
    # 1.25 is inside (0.72, 1.28) only: then d/dlp = -r A / 3; the bonus reaches the entropy alone, -0.01 / 3
    gradient = [0.0, 0.0, 0.0] if eps_high == 0.2 else [-0.416667, 0.0, 0.0]
    assert batch.logps.grad[mask].tolist() == pytest.approx(gradient, abs=5e-7)
    assert batch.entropy.grad.tolist() == [pytest.approx([-0.01 / 3] * 3 + [0.0])]


def test_it_acts_on_every_token_and_on_entropy_alone():
    batch, _, asked = both_stages(EntropyBonus(), make_step())
    asked.losses["link"][batch.mask].sum().backward()
    assert torch.equal(batch.entropy.grad, -batch.mask.float())
    assert batch.logps.grad is None and batch.hidden().grad is None
    assert asked.metrics["link/affected"][batch.mask].all()


def test_the_default_strength_is_the_papers():
    assert EntropyBonus.default_coef == 0.005
