"""How a rollout sits in TRL's trainers: budgets, seeds, masks, resume, and what is refused."""

from pathlib import Path

import pytest

from tests.tiny import make

ROLLOUT = {"cure": {"branches": 3, "top": 2, "least_characters": 1}}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_rollout_trains(algorithm: str, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, algorithm=algorithm, rollout=ROLLOUT, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert float(entry["grad_norm"]) > 0
        # what is not drawn was taken over from an original, and CURE leaves that out of the loss
        drawn, returned = entry["rollout/tokens_drawn"], entry["rollout/tokens_returned"]
        assert drawn < returned and entry["rollout/share_trained"] == pytest.approx(drawn / returned)
