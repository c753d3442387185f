"""What a recipe says of the weights and their optimiser: `sigma_reparam`, `entropy_sgd`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from trl.trainer.model_config import ModelConfig

from ..equations.entropy_sgd import EntropySgd
from .named import filled, named_entry


@dataclass(frozen=True, kw_only=True)
class EntropySgdSettings:
    """The fields of EntropySgd that are a recipe's."""

    lr: float | None = None  # None: the run's learning_rate
    inner_steps: int = 20
    inner_lr: float = 0.1
    gamma: float = 1e-4
    growth: float = 1e-3
    noise: float = 1e-4
    momentum: float = 0.9

    def __post_init__(self) -> None:
        EntropySgd([nn.Parameter(torch.zeros(1))], **self.given(learning_rate=1.0, seed=0))  # says what is wrong

    def given(self, learning_rate: float, seed: int) -> dict[str, Any]:
        """The arguments of EntropySgd in a run."""
        return {**asdict(self), "lr": learning_rate if self.lr is None else self.lr, "seed": seed}


def entropy_sgd_of(entry: Mapping[str, Any] | str) -> EntropySgdSettings:
    """`entropy_sgd: {inner_steps: 5}` or the same as JSON."""
    if isinstance(entry, str):
        _, given = named_entry('{"entropy_sgd": ' + entry + "}", "entropy_sgd")
    else:
        _, given = named_entry({"entropy_sgd": entry}, "entropy_sgd")
    return filled(EntropySgdSettings, "entropy_sgd", given)


def refuse_weights(is_sigma: bool, settings: EntropySgdSettings | None, config: Any, model: ModelConfig) -> None:
    """Runs in which the two would act on part of the weights, or leave them in a state of their own."""
    keys = [key for key, on in (("sigma_reparam", is_sigma), ("entropy_sgd", settings is not None)) if on]
    if not keys:
        return
    is_sharded = bool(config.deepspeed or config.fsdp)
    if is_sharded:
        raise ValueError(f"{keys[0]} needs whole weights on each process: use DDP, not FSDP or DeepSpeed")
    if is_sigma:
        named = (
            ("use_peft", model.use_peft),
            ("load_in_4bit", model.load_in_4bit),
            ("load_in_8bit", model.load_in_8bit),
        )
        for key, value in (*named, ("use_vllm", getattr(config, "use_vllm", False))):
            if value:
                raise ValueError(f"sigma_reparam trains the weights themselves under names of its own: drop {key}")
        if str(getattr(config.save_strategy, "value", config.save_strategy)) != "no":
            raise ValueError(
                "sigma_reparam makes the weights plain again at the end of training alone, so a checkpoint on the way "
                "could not be loaded: set save_strategy to 'no' (the trained model is written at the end)"
            )
    if settings is not None and settings.inner_steps and config.max_steps % settings.inner_steps:
        raise ValueError(
            f"entropy_sgd: between two outer steps the weights only wander, so max_steps must be a multiple of "
            f"inner_steps {settings.inner_steps}, got {config.max_steps}"
        )
