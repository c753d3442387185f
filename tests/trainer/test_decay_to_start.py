"""The decay to the start in training: by a loop over one step, resumed, with TRL's own trainer, and what it refuses."""

import math
from pathlib import Path

import pytest
import torch

from hclm_rl.trainer.decay_to_start import DecayToStart

from ..tiny import largest_difference, make, weights_of

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "fixed": True, "weight_decay": 0.0}


def trained(policy: str, out: Path, decay: DecayToStart | None = None, **changes):
    callbacks = [decay] if decay else []
    trainer = make(policy, out, trainer={"callbacks": callbacks}, **{**ADAM, **changes})
    start = weights_of(trainer)
    trainer.train()
    return trainer, start, weights_of(trainer)


def test_the_first_step_by_hand(policy: str, tmp_path: Path):
    _, start, plain = trained(policy, tmp_path / "plain", max_steps=1)
    _, _, gated = trained(policy, tmp_path / "gated", DecayToStart(10.0), max_steps=1)
    trainer, _, ungated = trained(policy, tmp_path / "ungated", DecayToStart(10.0, gate=False), max_steps=1)
    # after one step m^2 = v where there was a gradient, so all of it is signal and nothing decays
    assert largest_difference(plain, gated) < 1e-7
    # without the gate a tenth of the way goes: lr 1e-2 times 10
    for name, value in ungated.items():
        torch.testing.assert_close(value, start[name] + 0.9 * (plain[name] - start[name]), atol=1e-7, rtol=0)
    logged = trainer.state.log_history[0]
    moved = torch.cat([(ungated[name] - start[name]).flatten() for name in start]).norm().item()
    assert logged["decay_to_start/distance"] == pytest.approx(moved, rel=1e-5)
    assert logged["decay_to_start/snr"] == 0


def test_the_gate_holds_less_than_the_decay_of_all(policy: str, tmp_path: Path):
    def far(decay: DecayToStart | None, name: str) -> float:
        _, start, end = trained(policy, tmp_path / name, decay, max_steps=6)
        return math.sqrt(sum((end[x] - start[x]).square().sum().item() for x in start))

    free, gated, all_alike = far(None, "free"), far(DecayToStart(30.0), "gated"), far(DecayToStart(30.0, False), "all")
    assert all_alike < 0.9 * gated < 0.9 * free


@pytest.mark.parametrize("ours", [True, False])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(ours: bool, policy: str, tmp_path: Path):
    def run(out: Path, resume: str | None = None, **changes):
        decay = DecayToStart(20.0)
        trainer = make(policy, out, ours=ours, trainer={"callbacks": [decay]}, **{**ADAM, "max_steps": 4, **changes})
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=2)
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole/checkpoint-2"))
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0
    late = make(policy, tmp_path / "late", ours=ours, **{**ADAM, "max_steps": 4})
    late.add_callback(DecayToStart())
    with pytest.raises(ValueError, match="give it to the trainer as one of `callbacks`"):
        late.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))


def test_an_optimiser_without_moments_is_refused(policy: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match="reads Adam's two moments, which optim sgd does not keep: set optim to adamw_torch"
    ):
        trained(policy, tmp_path / "sgd", DecayToStart(), optim="sgd")
    trained(policy, tmp_path / "ungated", DecayToStart(gate=False), optim="sgd", max_steps=1)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate: float):
    with pytest.raises(ValueError, match=f"rate must be a positive number, got {rate}"):
        DecayToStart(rate)
