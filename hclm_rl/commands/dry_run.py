"""The doctor's dry run: a few optimiser steps of the recipe at learning rate 0, and responses that it did not see

The recipe's own terms and optimiser take part, so that the gradients are those of the steps that it would take, and
Adam's second moments those that it would divide by. Each step's gradient is kept as the optimiser got it (after
`max_grad_norm`).
"""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from ..equations.expectations import Vector
from ..recipe.config import GRPOConfig, RLOOConfig
from ..trainer.keeping import Kept, keeping_rollouts, other_rollouts
from .stored import Stored, has_room

OTHERS = 4  # generation batches of which forces and values are taken
# trained parameters; from here on gradients are kept on the disk and in bfloat16, whose rounding is random, the
# optimiser sees them afterwards, some parameters at a time, and our own passes take a few rows at once
LARGE_FROM = 20_000_000
FEW_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a dry step: the recipe's own, or what `--prompts` makes of it."""

    rows: int  # at once
    pieces: int  # of an optimiser step
    updates: int  # optimiser steps a generation batch
    group: int
    is_whole: bool  # the recipe's own

    @property
    def prompts(self) -> int:
        """Of a generation batch."""
        return max(self.rows * self.pieces * self.updates // self.group, 1)

    def notes(self) -> list[str]:
        """Where a dry step is smaller than the recipe's."""
        told = (
            f"the dry steps are of {self.prompts // self.updates} prompts, the recipe's of more: --prompts takes more"
        )
        return [] if self.is_whole else [told]


def sizes(config: GRPOConfig | RLOOConfig, most: int) -> Sizes:
    """At most so many prompts a step."""
    group, rows = config.num_generations or 1, config.per_device_train_batch_size
    pieces = config.gradient_accumulation_steps * max(config.world_size, 1)
    updates = max((config.steps_per_generation or 1) // config.gradient_accumulation_steps, 1)
    if rows * pieces <= most * group:
        return Sizes(rows=rows, pieces=pieces, updates=updates, group=group, is_whole=True)
    rows = min(rows, most * group)
    rows = max(rows - rows % group, group)
    pieces = max(most * group // rows, 1)
    return Sizes(rows=rows, pieces=pieces, updates=updates, group=group, is_whole=False)


def dry_settings(config: GRPOConfig | RLOOConfig, of: Sizes, steps: int, folder: str) -> dict[str, object]:
    """What stands in for the recipe's keys: `steps` steps that change nothing, one use of each generation batch."""
    # schedules are to be where a run begins, so the run is as long as the recipe's, and stopped
    longest = config.max_steps if config.max_steps >= steps else 100 * steps
    return {
        "output_dir": folder,
        "max_steps": longest,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",  # others divide by the rate, or ask for one above their end
        "lr_scheduler_kwargs": None,
        "logging_steps": 1,
        "per_device_train_batch_size": of.rows,
        "gradient_accumulation_steps": of.pieces,
        "steps_per_generation": of.pieces * of.updates,
        "generation_batch_size": None,
        "num_iterations": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "logging_strategy": "steps",
        "eval_samples": 0,
        "push_to_hub": False,
        "log_completions": False,
        "log_completions_hub_repo": None,
        "report_to": "none",
        "disable_tqdm": True,
        "save_final": False,
        "trace_every": None,
        "trace_steps": None,
        "resume_from_checkpoint": None,
        "watch_collapse": "off",
        "run_log": False,
    }


@dataclass(kw_only=True)
class DryRun:
    """What it leaves behind."""

    trainer: Any
    parameters: list[torch.nn.Parameter]  # those that are trained
    updates: int  # optimiser steps a generation batch
    recipe_rate: float  # the recipe's learning rate
    gradients: list[Vector] = field(default_factory=list)  # of each step, clipped
    own: list[Kept] = field(default_factory=list)  # the generation batches that they come from
    others: list[Kept] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)

    @property
    def kept_shares(self) -> list[float]:
        """What `max_grad_norm` left of each step's gradient."""
        most = self.trainer.args.max_grad_norm
        norms = [entry.get("grad_norm", 0.0) for entry in self.log]
        return [min(1.0, most / (norm + 1e-6)) if most and norm > 0 else 1.0 for norm in norms]

    @property
    def has_rewards(self) -> bool:
        """Whether the rewards of some group differed, without which there is no policy gradient."""
        return any(entry.get("reward_std", 0) != 0 for entry in self.log)

    @property
    def is_large(self) -> bool:
        """Whether the trained parameters are so many that few vectors of their length find room in memory."""
        return sum(each.numel() for each in self.parameters) > LARGE_FROM

    @property
    def is_withheld(self) -> bool:
        """Whether the optimiser takes no part in the dry steps, because it can be shown their gradients afterwards."""
        return self.is_large and is_by_parameter(optimizer_of(self)) and self.trainer.accelerator.scaler is None

    @property
    def rows_at_once(self) -> int | None:
        """In passes of the doctor's own; None: as in the recipe's."""
        return min(self.trainer.args.per_device_train_batch_size, FEW_ROWS) if self.is_large else None

    def keep(self) -> Vector:
        """The parameters' gradients as they are, which are then forgotten."""
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters)
        found = self.stored(gradients, torch.bfloat16)
        for each in self.parameters:
            each.grad = None
        return found

    def stored(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> Vector:
        """A copy of one tensor a parameter: of a large model in this type and on the disk where that has room."""
        if not self.is_large:
            return [each.to(torch.float32, copy=True) for each in tensors]
        if not has_room(sum(each.numel() for each in self.parameters), dtype):
            return [each.to(dtype, copy=True) for each in tensors]
        return Stored(tensors, dtype)


class Keeper(TrainerCallback):
    """Keeps the gradient of each step, and stops the run after the last."""

    def __init__(self, run: DryRun, steps: int) -> None:
        self.run, self.steps = run, steps

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [each.grad for each in self.run.parameters]
        self.run.gradients.append(self.run.keep())
        if not self.run.is_withheld:
            for each, grad in zip(self.run.parameters, grads, strict=True):
                each.grad = grad

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self.run.gradients) >= self.steps:
            control.should_training_stop = True


@contextmanager
def generators_put_back() -> Iterator[None]:
    """The global generators end as they began; so does what our trainers log of a dry run: nothing."""
    states = random.getstate(), numpy.random.get_state()
    ours = logging.getLogger("hclm_rl")
    level = ours.level
    ours.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        ours.setLevel(level)


def dry_run(trainer: Any, of: Sizes, steps: int, others: int, rate: float) -> DryRun:
    """`steps` is rounded up to whole generation batches."""
    parameters = [each for each in trainer.model.parameters() if each.requires_grad]
    run = DryRun(trainer=trainer, parameters=parameters, updates=of.updates, recipe_rate=rate)
    steps = -(-steps // of.updates) * of.updates
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Keeper(run, steps))
    with keeping_rollouts(trainer, run.own):
        trainer.train()
    run.log = [entry for entry in trainer.state.log_history if "entropy" in entry]
    run.others = other_rollouts(trainer, others, of.prompts, trainer.args.seed + 1)
    return run


def optimizer_of(run: DryRun) -> torch.optim.Optimizer:
    """The recipe's, without accelerate's wrapper."""
    wrapped = run.trainer.optimizer
    return getattr(wrapped, "optimizer", wrapped)


def is_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether what it does to a number depends on that number's own gradients alone."""
    return type(optimizer) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def preconditioner(run: DryRun, numbers: Sequence[int] | None = None) -> tuple[Vector | None, str]:
    """The diagonal P by which the optimiser multiplies a gradient, after what it has seen; None stands for 1.

    Adam: P = 1 / (sqrt(v / (1 - beta2^t)) + eps), and 0 where no step has had any gradient. With a sentence where the
    optimiser is none of which P can be read. `numbers`: of the parameters, where not all are asked for.
    """
    optimizer = optimizer_of(run)
    if isinstance(optimizer, torch.optim.SGD):
        return None, ""
    parameters = run.parameters if numbers is None else [run.parameters[number] for number in numbers]
    states = [optimizer.state.get(each, {}) for each in parameters]
    if not any("exp_avg_sq" in state and "step" in state for state in states):
        name = type(optimizer).__name__
        return None, f"the optimiser {name} keeps no second moments that can be read: the step is taken for plain SGD's"
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    found = []
    for each, state in zip(parameters, states, strict=True):
        if "exp_avg_sq" not in state:
            found.append(torch.zeros_like(each, dtype=torch.float32))
            continue
        group = groups[id(each)]
        seen = 1 - group["betas"][1] ** float(state["step"])
        square: Tensor = state["exp_avg_sq"].float() / seen
        found.append(torch.where(square > 0, 1 / (square.sqrt() + group["eps"]), 0))
    return found, ""


def memory_of(run: DryRun) -> Tensor:
    """The weights with which the step after the dry run takes its gradients: Adam's first moment, SGD's momentum."""
    optimizer, count = optimizer_of(run), len(run.gradients)
    group = optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.SGD):
        return torch.tensor([group["momentum"] ** (count - k) for k in range(1, count + 1)], dtype=torch.float64)
    decay = group["betas"][0] if "betas" in group else 1.0
    found = torch.tensor([decay ** (count - k) for k in range(1, count + 1)], dtype=torch.float64)
    return found / found.sum()


def restored(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    """Puts back what was copied."""
    with torch.no_grad():
        for each, value in zip(parameters, values, strict=True):
            each.copy_(value)
