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


def weights_of(groups: list[list[float]], **settings: float) -> list[float]:
    """What a token of each response counts, groups of one size."""
    rewards = torch.tensor(groups, dtype=torch.float64)
    slots = [[0.5]] * rewards.numel()
    view, batch = card_step([[1]] * rewards.numel(), slots, slots, slots, slots)
    of_group = rewards.repeat_interleave(rewards.size(1), dim=0)
    view = replace(view, rewards=rewards.flatten(), group_rewards=of_group)
    term = EntropyBonus(by_difficulty=True, **settings)
    asked = second_stage(term, batch, first_stage(term, view, {}, group_size=rewards.size(1)), {})
    asked.losses["link"].sum().backward()
    return (-batch.entropy.grad).flatten().tolist()


def test_hard_prompts_have_a_larger_bonus_as_on_the_card_of_aer():
    # p = [0, 0.25, 0.75, 1]: 1 - p has the mean 0.5
    found = weights_of([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert found == pytest.approx([2] * 4 + [1.5] * 4 + [0.5] * 4 + [0] * 4)


def test_where_no_prompt_fails_and_where_none_is_scored_it_is_the_plain_bonus():
    assert weights_of([[1, 1], [1, 1]]) == [1] * 4
    assert weights_of([[math.nan, math.nan], [0, 0], [1, 1]]) == pytest.approx([1, 1, 2, 2, 0, 0])
    assert weights_of([[math.nan, math.nan]]) == [1, 1]


def test_graded_rewards_are_right_from_a_value_on(caplog: pytest.LogCaptureFixture):
    assert weights_of([[0.5, 0.2], [0.0, 0.1]], right_at=0.5) == pytest.approx([2 / 3] * 2 + [4 / 3] * 2)
    assert "right_at" not in caplog.text
    assert weights_of([[0.5, 0.2], [0.0, 0.1]]) == [1] * 4
    assert "set right_at, the reward from which a response is right" in caplog.text
