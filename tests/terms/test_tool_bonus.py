"""The fading tool reward against its card (arXiv:2509.22601)."""

from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.tool_bonus import ToolBonus

from ..term_batches import make_step, rollout


def test_the_cards_example():
    # three calls at step 50 of 200: 0.3 mu, mu = (cos(pi / 4) + 1) / 2; printed to six digits
    effect = ToolBonus(fade=200).on_rollout(rollout_of_calls(3, 50), {})
    assert effect.metrics["mu"].item() == pytest.approx(0.853553, abs=5e-7)
    assert effect.rewards.item() - 1.0 == pytest.approx(0.256066, abs=5e-7)


def rollout_of_calls(calls: int, step: int):
    """One response of reward 1 whose turns of one token lie around `calls` answers of one token."""
    made = make_step(dtype=torch.float64)
    mask = torch.tensor([[t % 2 == 0 for t in range(2 * calls + 1)]])
    blank = torch.zeros(mask.shape, dtype=torch.float64)
    view = rollout(made, slice(0, 1))
    return replace(view, ids=mask.long(), mask=mask, step=step, logps=blank, entropy=blank, ref_logps=None)


def test_it_is_capped_and_fades_out():
    assert ToolBonus().on_rollout(rollout_of_calls(25, 0), {}).rewards.item() == pytest.approx(2.0)
    assert ToolBonus().on_rollout(rollout_of_calls(25, 100), {}).rewards.item() == pytest.approx(1.0)
    assert ToolBonus().on_rollout(rollout_of_calls(25, 1000), {}).rewards.item() == pytest.approx(1.0)
    assert ToolBonus().on_rollout(rollout_of_calls(0, 0), {}).rewards.item() == 1.0


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"each": -0.1}, "each must be >= 0 and finite, got -0.1"),
        ({"largest": float("inf")}, "largest must be >= 0 and finite, got inf"),
        ({"fade": 0}, "fade must be at least 1, or None for a bonus that stays, got 0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        ToolBonus(**wrong)
    assert str(error.value) == sentence


def test_calls_are_those_of_the_messages_where_there_are_messages():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "ask"}}]}
    texts = [[call, {"role": "tool", "content": "lower"}, call]]  # the last one was not answered any more
    view = replace(rollout_of_calls(0, 0), texts=texts)
    assert ToolBonus().on_rollout(view, {}).metrics["calls"] == 2


def test_without_a_fade_the_bonus_stays():
    for step in (0, 50, 1000):
        effect = ToolBonus(fade=None).on_rollout(rollout_of_calls(3, step), {})
        assert effect.rewards.item() == pytest.approx(1.3) and effect.metrics["mu"] == 1


@pytest.mark.parametrize(
    "reward, calls, largest, paid",
    [
        (1.0, 1, 1.0, 0.853553),  # one call is as good as ten
        (1.0, 3, 1.0, 0.853553),
        (1.0, 3, 0.5, 0.426777),
        (1.0, 0, 1.0, 0.0),
        (0.0, 3, 1.0, 0.256066),
        (-1.0, 3, 1.0, 0.256066),
    ],
)
def test_a_right_answer_with_a_call_earns_the_whole_bonus(reward, calls, largest, paid):
    # the authors' reward for Qwen3 at step 50 of 200, mu = 0.853553: all of mu above 0, 0.1 a call elsewhere
    view = replace(rollout_of_calls(calls, 50), rewards=torch.tensor([reward], dtype=torch.float64))
    effect = ToolBonus(fade=200, largest=largest, right_answers="whole").on_rollout(view, {})
    assert effect.rewards.item() - reward == pytest.approx(paid, abs=5e-7)


def test_an_unscored_response_stays_unscored():
    view = replace(rollout_of_calls(3, 0), rewards=torch.tensor([float("nan")], dtype=torch.float64))
    assert ToolBonus(right_answers="whole").on_rollout(view, {}).rewards.isnan().all()
