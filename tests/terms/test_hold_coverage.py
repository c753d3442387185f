"""Hold coverage: its law by hand, its two parts as the terms that they are, and the run that is resumed."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hclm_rl.terms.hold_coverage import LEAST, MOST, RATE, START, HoldCoverage
from hclm_rl.terms.max_rl import MaxRl
from hclm_rl.terms.right_anchor import RightAnchor

from ..term_batches import first_stage, make_step, reading, rollout, second_stage, token_batch
from ..tiny import largest_difference, make, weights_of


def test_the_strength_by_hand():
    term, memory = HoldCoverage(), {}
    first_stage(term, rollout(make_step()), memory)
    # groups of four: one find in four is lost at -log(3/4) = .287682 nats
    assert memory["budget"] == pytest.approx(0.287682, abs=1e-6) and memory["strength"] == START
    path = [START]
    for nats in (0.787682, 0.287682, 0.0, 1.287682):
        term.on_step({"nats": nats, "lost": 0.5}, memory)
        path.append(memory["strength"])
    # by RATE of .5, 0, -.287682 (but not below LEAST) and 1 nats
    by_hand = [START, START + 0.5 * RATE, START + 0.5 * RATE]
    by_hand += [max(by_hand[-1] - 0.287682 * RATE, LEAST)]
    by_hand += [by_hand[-1] + RATE]
    assert path == pytest.approx(by_hand, abs=1e-6)
    for _ in range(1000):
        term.on_step({"nats": 9.0}, memory)
    assert memory["strength"] == MOST
    for _ in range(1000):
        term.on_step({"nats": 0.0}, memory)
    assert memory["strength"] == LEAST
    term.on_step({}, memory)  # a step without a replay says nothing
    assert memory["strength"] == LEAST


def test_without_a_budget_the_strength_never_falls():
    term, memory = HoldCoverage(budget="none"), {}
    first_stage(term, rollout(make_step()), memory)
    for nats in (0.5, 0.0, 0.1):
        term.on_step({"nats": nats}, memory)
    assert memory["budget"] == 0 and memory["strength"] == pytest.approx(START + 0.6 * RATE)


def test_its_parts_are_max_rl_and_the_anchor():
    before, step = make_step(20, torch.float64), make_step(0, torch.float64)
    memory: dict = {}
    first_stage(HoldCoverage(), replace(rollout(before), step=2), memory)
    memory["strength"] = 0.7
    first = first_stage(HoldCoverage(), rollout(step), memory)
    assert torch.equal(first.advantages, first_stage(MaxRl(), rollout(step), {}).advantages)
    assert first.metrics["link/strength"] == pytest.approx(0.7)
    alone: dict = {}
    first_stage(RightAnchor(source="any"), replace(rollout(before), step=2), alone)
    anchored = first_stage(RightAnchor(source="any"), rollout(step), alone)
    assert torch.equal(first.columns["link/replay"], anchored.columns["link/replay"])
    batch = replace(token_batch(step), score=lambda text, scorer="policy": (reading(text, step.head), None))
    asked = second_stage(HoldCoverage(), batch, first, memory).losses["link"]
    held = second_stage(RightAnchor(), batch, replace(anchored, advantages=first.advantages), alone).losses["link"]
    assert held.sum() > 0
    torch.testing.assert_close(asked, 0.7 * held)


def test_the_strength_goes_into_checkpoints(policy: str, tmp_path: Path):
    settings = {
        "terms": [{"hold_coverage": {"right_at": 0.5}}],
        "optim": "adamw_torch",
        "learning_rate": 5e-2,
        "max_steps": 6,
    }
    whole = make(policy, tmp_path / "whole", **settings, save_strategy="steps", save_steps=4)
    whole.train()
    memory = whole._hclm.state.memory["hold_coverage"]
    assert memory["strength"] != START and len(memory["right_prompt"]) > 0
    resumed = make(policy, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert resumed._hclm.state.memory["hold_coverage"]["strength"] == memory["strength"]
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0


def test_rewards_below_0_are_refused():
    view = rollout(replace(make_step(), rewards=torch.tensor([1.0, -1, -1, -1, 1, 1, 0, 0])))
    with pytest.raises(ValueError, match=r"hold_coverage divides by a group's mean reward.* 3 responses have less"):
        HoldCoverage().on_rollout(view, {})


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"share": 0.0}, "share must be in (0, 1], got 0.0"),
        ({"right_at": math.nan}, "right_at must be a finite reward or None, got nan"),
        ({"most_gb": 2.0}, "most_gb must be above 0 and at most this machine's 1.0, got 2.0"),
    ],
)
def test_refuses(wrong, sentence, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**9))
    with pytest.raises(ValueError) as error:
        HoldCoverage(**{"most_gb": 1.0, **wrong})
    assert str(error.value) == sentence
