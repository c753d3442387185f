"""Run by torch.distributed.run in test_training.py: evaluates on two processes, writes the metrics."""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from tests.cpu_processes import leave
from tests.tiny import make, prompts


def metrics(policy: str, out: Path, responses_at_once: int) -> dict[str, float]:
    """Of five prompts, four responses each: no whole number of batches on two processes."""
    trainer = make(
        policy,
        out,
        fixed=True,
        trainer={"eval_dataset": prompts(5)},
        per_device_eval_batch_size=responses_at_once,
        eval_pass_at_k=True,
        eval_pass_threshold=0.5,
    )
    return trainer.evaluate()


def main(policy: str, out: Path) -> None:
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    found = metrics(policy, out, 4)
    if state.is_main_process:
        (out / "metrics.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
