"""Run by torch.distributed.run in test_vllm.py: rollouts on two processes, each with an engine of its own."""

import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from tests.cpu_processes import start
from tests.rollouts.vllm_stand_in import install
from tests.two_processes import ROLLOUT, train_each


def main(policy: str, out: Path) -> None:
    given = start("terms", out)  # before PartialState is asked
    half = {"per_device_train_batch_size": 8 // PartialState().num_processes, **given}
    install(pytest.MonkeyPatch())
    runs = {name: {"rollout": ROLLOUT, "use_vllm": True, "algorithm": name} for name in ("grpo", "rloo")}
    train_each(runs, policy, out, half)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
