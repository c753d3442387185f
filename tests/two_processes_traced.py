"""Run by torch.distributed.run in test_trace.py: a traced run on two processes."""

import sys
from pathlib import Path

from accelerate import PartialState

from .cpu_processes import leave
from .tiny import make

if __name__ == "__main__":
    assert PartialState(cpu=True).num_processes == 2
    half = {"per_device_train_batch_size": 4, "trace_steps": [1], "loss_type": "dapo"}
    make(sys.argv[1], Path(sys.argv[2]), terms=["information_force"], fixed=True, **half).train()
    leave()
