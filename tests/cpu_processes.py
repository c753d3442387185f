"""DDP, FSDP2 and ZeRO between CPU processes.

accelerate turns FSDP and DeepSpeed on for accelerators alone; torch's FSDP2 and DeepSpeed themselves run on gloo. What
is put in place here is that choice and no more: sharding, gathering and reduction are the libraries' own.
"""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate import state as accelerates
from accelerate.utils import DistributedType

from hclm_rl.commands.launch import SECONDS_TO_LET_GO

from .tiny import weights_of

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
AUTO = dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")
ZERO = {
    "stage3_param_persistence_threshold": 0,  # else parameters as small as those of a tiny policy stay whole
    "stage3_gather_16bit_weights_on_model_save": True,
}


def run_by_two(module: str, *arguments: str, processes: int = 2) -> None:
    """Runs `python -m module arguments` on two processes (or so many) on gloo, to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", module]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run([*command, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> None:
    """The last call of each process: gloo's threads abort one that ends while the other still talks to it."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    time.sleep(SECONDS_TO_LET_GO)


def start(kind: str, folder: Path) -> dict[str, Any]:
    """Before any trainer, by each process of "ddp", "fsdp2", "zero2" or "zero3"; gives the settings that runs need.

    "terms" is "ddp" on as many processes as were started.
    """
    gc.freeze()  # every training starts with a collection, see conftest.py
    if kind.startswith("zero"):
        stage = int(kind[-1])
        config = AUTO | {"zero_optimization": {"stage": stage, **ZERO}, "zero_allow_untested_optimizer": True}
        (file := folder / f"deepspeed_{os.environ['RANK']}.json").write_text(json.dumps(config))
        os.environ |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
            "DS_ACCELERATOR": "cpu",
        }
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate would not start DeepSpeed
        cpu = torch.device("cpu")
        PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]
        PartialState.set_device = lambda self: setattr(self, "device", cpu)  # type: ignore[method-assign]
        assert PartialState().num_processes == 2
        return {"use_cpu": False}
    if kind == "fsdp2":
        shipped = yaml.safe_load(RECIPE.read_text())["fsdp_config"]
        os.environ |= {"ACCELERATE_USE_FSDP": "true"} | {key.upper(): str(value) for key, value in shipped.items()}
        stock = accelerates.AcceleratorState.__init__

        def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
            stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            if fsdp_plugin is not None:
                self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
                PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                if self._mixed_precision != "no":
                    fsdp_plugin.set_mixed_precision(self._mixed_precision)

        accelerates.AcceleratorState.__init__ = init  # type: ignore[method-assign]
    assert PartialState(cpu=True).num_processes == (int(os.environ["WORLD_SIZE"]) if kind == "terms" else 2)
    return {}


def whole_weights(trainer: Any, kind: str) -> dict[str, torch.Tensor]:
    """The weights, gathered: by all processes alike. AssertionError where none was sharded as `kind` should."""
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    if kind == "fsdp2":
        assert all(isinstance(value, torch.distributed.tensor.DTensor) for value in named.values())
        return {name: value.full_tensor().detach().clone() for name, value in named.items()}
    if kind == "zero3":
        import deepspeed

        assert all(value.numel() == 0 for value in named.values())
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {name: value.detach().clone() for name, value in named.items()}
    assert trainer.accelerator.distributed_type == ("DEEPSPEED" if kind == "zero2" else "MULTI_CPU")
    return weights_of(trainer)
