"""RepExp against its card (arXiv:2510.11686): numbers, the elliptical form by a solve of its own, and the gates."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hclm_rl import build_chain
from hclm_rl.terms.rep_exp import RepExp, sparse_projection
from hclm_rl.trainer.scoring import reference_hidden
from hclm_rl.types import Transcript

from ..term_batches import card_step, first_stage
from ..tiny import make

NAN = math.nan
H = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def group_of(states: list[list[float]], rewards: list[float], mask: list[int] | None = None):
    """One group of one-token responses whose states in the reference are these."""
    slots = [[0.0]] * len(states)
    view, _ = card_step([[m] for m in mask or [1] * len(states)], slots, slots, slots)
    values = torch.tensor(rewards, dtype=torch.float64)
    hidden = torch.tensor(states, dtype=torch.float64).unsqueeze(1)
    of_group = values.expand(len(values), -1)
    return replace(
        view, rewards=values, group_rewards=of_group, reference_hidden=lambda: hidden, hidden=lambda: -hidden
    )


def bonus(states: list[list[float]], rewards: list[float], mask: list[int] | None = None, **settings) -> list[float]:
    """b, without a projection."""
    view = group_of(states, rewards, mask)
    effect = RepExp(dimensions=None, **{"beta": 1.0, **settings}).on_rollout(view, {})
    return torch.where(view.rewards.isnan(), NAN, effect.rewards - view.rewards).tolist()


def test_the_cards_leverages():
    # printed to six digits: half of the last one
    assert bonus(H, [1, 1, 1, 0]) == pytest.approx([0.247537, 0.247537, 0.740195, 0.730535], abs=5e-7)
    found = bonus(H, [1, 1, 1, 0], form="leave_one_out")
    assert found == pytest.approx([0.328968, 0.328968, 2.849043, 2.711059], abs=5e-7)
    longer = [[3 * x for x in h] for h in H]
    assert bonus(longer, [1, 1, 1, 0]) == pytest.approx([0.249723, 0.249723, 0.748891, 0.747785], abs=5e-7)


@pytest.mark.parametrize(
    "rewards, shaped, advantages",
    [
        ([1, 1, 1, 0], [1.002475, 1.002475, 1.007402, 0.007305], [0.496699, 0.496699, 0.506583, -1.499981]),
        ([1, 1, 1, 1], None, [-0.865633, -0.865633, 0.882774, 0.848492]),
    ],
)
def test_the_cards_advantages(rewards: list, shaped: list | None, advantages: list):
    first = first_stage(RepExp(dimensions=None), group_of(H, rewards), {})
    if shaped:
        assert first.rewards.tolist() == pytest.approx(shaped, abs=5e-7)
    found = first.advantages / (first.rewards.std() + 1e-6)
    assert found.tolist() == pytest.approx(advantages, abs=1e-6)


def test_it_is_the_elliptical_form():
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = states - states.mean(dim=0)
    sigma = 0.2 * torch.eye(3, dtype=torch.float64) + p.T @ p
    expected = [float(each @ torch.linalg.solve(sigma, each)) for each in p]
    assert bonus(states.tolist(), [1.0] + [0.0] * 4, lam=0.2) == pytest.approx(expected)
    without = [float(each @ torch.linalg.solve(sigma - torch.outer(each, each), each)) for each in p]
    assert bonus(states.tolist(), [1.0] + [0.0] * 4, lam=0.2, form="leave_one_out") == pytest.approx(without)


def test_groups_are_gated():
    assert bonus(H, [0, 0, 0, 0]) == [0] * 4
    assert min(bonus(H, [0, 0, 0, 0], skips_unsolved=False)) > 0
    assert bonus(H, [1, 1, 1, 1], skips_solved=True) == [0] * 4
    assert min(bonus(H, [1, 1, 1, 0], skips_solved=True)) > 0
    assert bonus(H, [1, 1, 1, 0], right_only=True)[3] == 0 < bonus(H, [1, 1, 1, 0], right_only=True)[0]
    assert bonus(H, [0.5, 0, 0, 0]) == [0] * 4 != bonus(H, [0.5, 0, 0, 0], right_at=0.5)


def test_normalised_over_the_group():
    b = torch.tensor(bonus(H, [1, 1, 1, 0]), dtype=torch.float64)
    divided, scored = (bonus(H, [1, 1, 1, 0], normalise=name) for name in ("deviation", "z_score"))
    assert divided == pytest.approx((b / b.std()).tolist())
    assert scored == pytest.approx(((b - b.mean()) / b.std()).tolist())
    assert bonus([[1.0, 1.0]] * 4, [1, 0, 0, 0], normalise="z_score") == [0] * 4  # copies


def test_what_is_not_scored_or_has_no_token_is_not_there():
    three = bonus(H[:3], [1, 1, 0])
    assert bonus([*H[:3], [NAN, 5.0]], [1, 1, 0, 0], mask=[1, 1, 1, 0]) == pytest.approx([*three, 0])
    assert bonus(H, [1, 1, 0, NAN])[:3] == pytest.approx(three)


def test_the_policys_states_where_asked():
    assert RepExp().needs_reference_model and not RepExp().needs_hidden
    own = RepExp(features="policy")
    assert own.needs_hidden and not own.needs_reference_model and not own.needs_rescoring
    view = replace(group_of(H, [1, 1, 1, 0]), hidden=lambda: torch.zeros(4, 1, 2, dtype=torch.float64))
    assert own.on_rollout(view, {}).rewards.tolist() == [1, 1, 1, 0]


def test_the_projection_keeps_lengths_on_average():
    width, dimensions = 400, 64
    p = sparse_projection(width, dimensions, torch.Generator().manual_seed(3))
    values = p.unique().tolist()
    # s = sqrt(400) = 20: entries +-sqrt(20 / 64), one in twenty is not 0
    assert values == pytest.approx([-math.sqrt(20 / 64), 0, math.sqrt(20 / 64)])
    assert (p != 0).double().mean().item() == pytest.approx(1 / 20, abs=0.005)
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ratio = ((x @ p).square().sum(1) / x.square().sum(1)).mean()
    assert ratio.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_the_reference_is_the_model_of_the_start(has_adapter: bool, policy: str, tmp_path: Path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    more = {"peft_config": config} if has_adapter else {}
    trainer = make(
        policy, tmp_path, terms=["rep_exp"], beta=0.04, learning_rate=5.0, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, trainer=more,
    )  # fmt: skip
    trainer.train()
    assert {"rep_exp/spread", "rep_exp/bonus"} <= trainer.state.log_history[0].keys()
    prompt, ids = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[3, 4], [5, 0]])
    present = torch.tensor([[True, True], [True, False]])
    text = Transcript(prompt_ids=prompt, prompt_mask=prompt > 0, ids=ids, present=present)
    model = AutoModelForCausalLM.from_pretrained(policy, attn_implementation="eager")
    with torch.no_grad():
        mask = torch.cat([text.prompt_mask, present], dim=1).long()
        states = model.base_model(input_ids=torch.cat([prompt, ids], dim=1), attention_mask=mask).last_hidden_state
        found = reference_hidden(trainer, text)
    torch.testing.assert_close(found[present], states[:, -2:][present], atol=1e-5, rtol=0)
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_run_without_a_reference_says_so_before_anything_is_loaded(tmp_path: Path):
    sentence = "rep_exp: reads the frozen model of the KL penalty, which this run does not load: set beta above 0"
    with pytest.raises(ValueError, match=sentence):
        make(str(tmp_path / "nothing"), tmp_path, terms=["rep_exp"])


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"beta": -1.0}, "beta must be >= 0 and finite, got -1.0"),
        ({"lam": 0.0}, "lam must be positive and finite, got 0.0"),
        ({"dimensions": 0}, "dimensions must be at least 1 or None, got 0"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"rep_exp": given}])
    assert str(caught.value) == f"rep_exp: {sentence}"


@pytest.mark.parametrize("beta", [0.0, 1e-6])
def test_rloo_is_not_sent_in_a_circle(beta: float, tmp_path: Path):
    sentence = (
        "rep_exp: shapes rewards by the frozen model of the KL penalty, and RLOO .*: use GRPO, or features: policy"
    )
    with pytest.raises(ValueError, match=sentence):
        make(str(tmp_path / "nothing"), tmp_path, algorithm="rloo", terms=["rep_exp"], beta=beta)
