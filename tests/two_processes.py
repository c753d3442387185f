"""Run by torch.distributed.run in test_trainer_invariance.py: trains every case on two processes, writes weights."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file

from .tiny import LOSSES, WITH_TOOLS, make, weights_of


def main(policy: str, out: Path, cases: dict[str, dict]) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    half = {"per_device_train_batch_size": 4}
    runs = {term: {"terms": [{term: given}], "loss_type": "dapo"} for term, given in cases.items()}
    runs = {term: run | {"fixed": "turns" if term in WITH_TOOLS else True} for term, run in runs.items()}
    runs["remembers"] = {"terms": ["tests.own_terms.Remembers"], "fixed": True, "loss_type": "dapo"}
    for loss in LOSSES:  # sampled, each process with its own seed
        off_policy = {"num_iterations": 2, "beta": 0.04, "loss_type": loss}
        runs[f"stock {loss}"] = {"ours": False, **off_policy}
        runs[f"empty {loss}"] = off_policy
        runs[f"zero {loss}"] = {"terms": [{term: {"coef": 0.0}} for term in cases], **off_policy}
    for name, run in runs.items():
        trainer = make(policy, out / name, **half, **run)
        trainer.train()
        if state.is_main_process:
            save_file(weights_of(trainer), out / f"{name}.safetensors")
            if name == "information_force":
                (out / "metrics.json").write_text(json.dumps(trainer.state.log_history[0]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
