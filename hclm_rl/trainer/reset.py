"""ProRL, reset of the reference and the optimiser: Liu et al., 2025, arXiv:2505.24864"""

# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (the trainer is ours, declared Any as in all of this folder)

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..chain.state import settle
from ..types import Term
from .checkpoints import newest_first

logger = logging.getLogger(__name__)

RESET = "reset_reference/reset"  # in the log's history, which checkpoints keep: how many there have been
FOLDER, STEM = "reference", "step-"  # in the run's folder: the reference since that step


class ResetReference(TrainerCallback):
    """Lets a long run go on: the policy becomes the reference of the KL penalty, and the optimiser starts anew.

    A KL to the start comes to hold a long run back; so, where progress stalls, the reference becomes a copy of the
    policy (with PEFT the adapter "ref" one of the adapter that trains) and the optimiser's state is emptied. The rate
    and the data go on. It is no entropy method: after a reset the policy is free to go on collapsing, with a fresh
    leash. The first steps of Adam after it have the size of the rate in every weight: `keeps_scale`, or a lower rate.
    Terms that compare with the reference (`rep_exp`) then compare with the last reset; every KL is 0 right after it.

    For the trainers of this library: `GRPOTrainer(..., callbacks=[ResetReference(patience=3)])`, in a recipe
    `reset_reference: {patience: 3}`. Not with FSDP or DeepSpeed. Within a rollout that makes several updates the KL
    stays that to the reference which scored it. A run that is resumed has the reference of its last reset, which
    `<output_dir>/reference` keeps where the run saves checkpoints; the log has `reset_reference/count`.

    The authors reset by hand where validation stagnated or fell; the rule `patience`, `min_gain` is ours.

    Args:
        every: a reset every so many optimiser steps
        steps: a reset after these optimiser steps, counted from 1
        patience: a reset once the best of the last so many evaluations is not above the best before them; counted anew
            after each reset. The run must evaluate (`eval_strategy: steps`)
        min_gain: by how much it must be above, >= 0, in the unit of `metric`
        metric: what is compared, larger is better
        keeps_scale: keeps Adam's second moment and clears the first alone; ours
    None of them resets within the warm-up of the rate.
    """

    adds_to_log = True  # it comes before what writes the log

    def __init__(
        self,
        *,
        every: int | None = None,
        steps: Sequence[int] = (),
        patience: int | None = None,
        min_gain: float = 0.0,
        metric: str = "eval_reward",
        keeps_scale: bool = False,
    ) -> None:
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise ValueError(f"steps of reset_reference must be a list of whole numbers, got {steps!r}")
        if not isinstance(metric, str) or not isinstance(keeps_scale, bool):
            raise ValueError(
                f"metric of reset_reference must be a name and keeps_scale true or false, got {metric!r} and "
                f"{keeps_scale!r}"
            )
        for name, value in (("every", every), ("patience", patience), *(("steps", step) for step in steps)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} of reset_reference must be whole numbers of at least 1, got {value!r}")
        if every is None and not steps and patience is None:
            raise ValueError("reset_reference needs `every`, `steps` or `patience`: when it is to reset")
        if not (isinstance(min_gain, int | float) and 0 <= min_gain < math.inf):
            raise ValueError(f"min_gain of reset_reference must be a number >= 0, got {min_gain!r}")
        self.every, self.steps, self.patience = every, frozenset(steps), patience
        self.min_gain, self.metric, self.keeps_scale = min_gain, metric, keeps_scale
        self.trainer: Any = None  # this and the next are set where a training begins
        self.came_from: Path | None = None  # the folder of the checkpoint that is resumed
        self.is_training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.trainer is None:
            raise ValueError("ResetReference works with the GRPOTrainer and RLOOTrainer of hclm_rl, which are TRL's")
        refuse_reset(args)
        if early := sorted(step for step in self.steps if step <= args.get_warmup_steps(state.max_steps)):
            raise ValueError(
                f"reset_reference: steps holds {early[0]}, within the warm-up of the rate, which is over after step "
                f"{args.get_warmup_steps(state.max_steps)}"
            )
        if self.patience is not None and args.eval_strategy == "no":
            raise ValueError(
                "reset_reference: patience looks at evaluations, and this run makes none: set eval_strategy"
            )
        readers = [link.name for link in self.trainer._hclm.chain.links if reads_reference(link.term)]
        if readers and state.is_world_process_zero:
            logger.warning(
                "after a reset %s compares with the policy at that step, not at the start", ", ".join(readers)
            )
        self.is_training = True
        self._go_on(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.is_training = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        step = state.global_step
        if step in self.steps or (self.every and step % self.every == 0):
            self._reset(args, state, kwargs["optimizer"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self.is_training or self.patience is None:
            return
        found = [
            (entry["step"], entry[self.metric])
            for entry in state.log_history
            if math.isfinite(entry.get(self.metric, math.nan))
        ]
        if not found:
            self._refuse_unknown_metric(state)
        resets = resets_of(state)
        since = [step for step, _ in found if not resets or step > resets[-1]]
        if has_stalled([value for _, value in found], len(since), self.patience, self.min_gain):
            self._reset(args, state, kwargs["optimizer"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ) -> None:
        if logs is not None and self.is_training:
            logs["reset_reference/count"] = len(resets_of(state))

    def _refuse_unknown_metric(self, state: TrainerState) -> None:
        """Of several data sets one may have it, so it may be missing once."""
        evaluated = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
        if len({entry["step"] for entry in evaluated}) > 1:
            known = dict.fromkeys(name for entry in evaluated for name in entry if name.startswith("eval_"))
            raise ValueError(
                f"reset_reference: no evaluation has the metric '{self.metric}'; there are {', '.join(known)}"
            )

    def _reset(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """The policy as it is becomes the reference, once a step and not where nothing follows."""
        resets, step = resets_of(state), state.global_step
        is_early = step <= args.get_warmup_steps(state.max_steps)
        if is_early or step >= state.max_steps or (resets and resets[-1] == step):
            return
        with torch.no_grad():
            for reference, policy in pairs_of_weights(self.trainer):
                reference.copy_(policy)
        forget(optimizer, self.keeps_scale)
        state.log_history.append({"step": step, RESET: len(resets) + 1})
        if state.is_world_process_zero:
            logger.warning("step %d: the policy is the reference from here on, reset %d", step, len(resets) + 1)
            if args.save_strategy != "no":
                self._keep(Path(args.output_dir or ""), step)

    def _keep(self, output: Path, step: int) -> None:
        """Writes the reference; takes away those that no checkpoint needs any more."""
        file = file_of(output, step)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        save_file({name: each.cpu().contiguous() for name, each in weights_of_reference(self.trainer)}, unfinished)
        settle(unfinished, file)
        oldest = min((int(each.name.rpartition("-")[2]) for each in newest_first(output)), default=step)
        needed = max((each for each in kept_steps(output) if each <= oldest), default=0)
        for each in kept_steps(output):
            if each < needed:
                file_of(output, each).unlink(missing_ok=True)

    def _go_on(self, args: TrainingArguments, state: TrainerState) -> None:
        """The reference of the last reset before the checkpoint, from the folder where that lies."""
        output = Path(args.output_dir or "")
        if not (resets := resets_of(state)):
            return
        file = file_of(self.came_from or output, resets[-1])
        if not file.is_file():
            raise ValueError(
                f"the run's reference was reset at step {resets[-1]}, and '{file}', which keeps it, is not there: put "
                "it back, or resume from a checkpoint before that step"
            )
        saved = load_file(file)
        pairs = list(pairs_of_weights(self.trainer))  # makes the adapter "ref" where there is none
        with torch.no_grad():
            for name, weight in weights_of_reference(self.trainer):
                weight.copy_(saved[name])
        assert len(saved) == len(pairs)
        if self.came_from not in (None, output) and state.is_world_process_zero and args.save_strategy != "no":
            self._keep(output, resets[-1])


def reads_reference(term: Term) -> bool:
    """Whether it compares with the frozen model, by its log-probs or its states."""
    return term.needs_reference or term.needs_reference_model


def refuse_reset(args: Any) -> None:
    """Runs whose reference cannot be reset."""
    if not getattr(args, "beta", 0.0):
        raise ValueError("reset_reference has no reference to reset: set beta, the strength of the KL to it, above 0")
    if getattr(args, "sync_ref_model", False):
        raise ValueError("reset_reference beside sync_ref_model: both move the reference; keep one of the two")
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None) or is_deepspeed_zero3_enabled():
        raise ValueError(
            "reset_reference is not tested with FSDP or DeepSpeed, which keep their own copies of weights and moments: "
            "train with DDP or on one process"
        )


def has_stalled(values: Sequence[float], fresh: int, patience: int, min_gain: float) -> bool:
    """Whether the best of the last `patience` values is not above the best before them by `min_gain`.

    `fresh`: how many of the values came after the last reset.
    """
    before, last = values[:-patience], values[-patience:]
    return fresh >= patience and bool(before) and max(last) <= max(before) + min_gain


def resets_of(state: TrainerState) -> list[int]:
    """The steps of all resets of the run."""
    return [int(entry["step"]) for entry in state.log_history if RESET in entry]


def forget(optimizer: Any, keeps_scale: bool) -> None:
    """Empties the optimiser's state; with `keeps_scale` the first moment alone, and refuses one that keeps none."""
    if not keeps_scale:
        optimizer.state.clear()
        return
    for moments in optimizer.state.values():
        if not isinstance(moments, Mapping) or "exp_avg" not in moments:
            raise ValueError(
                "reset_reference with keeps_scale is for Adam and its kin, which have a first and a second moment, and "
                f"this optimiser keeps {', '.join(map(str, moments)) or 'nothing'}"
            )
        moments["exp_avg"].zero_()


def pairs_of_weights(trainer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight of the reference, the policy's); with PEFT of the adapter "ref", which is made where there is none."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(policy):
        [active] = policy.active_adapters
        if "ref" not in policy.peft_config:
            policy.add_adapter("ref", policy.peft_config[active])
        own = dict(policy.named_parameters())
        for name, weight in weights_of_reference(trainer):
            weight.requires_grad_(False)
            yield weight, own[name.replace(".ref.", f".{active}.")]
        return
    own = dict(policy.named_parameters())
    for name, weight in weights_of_reference(trainer):
        yield weight, own[name]


def weights_of_reference(trainer: Any) -> list[tuple[str, Tensor]]:
    """Its weights of any shape, by name."""
    if trainer.ref_model is not None:
        return list(trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters())
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return [(name, weight) for name, weight in policy.named_parameters() if ".ref." in name]


def file_of(output: Path, step: int) -> Path:
    """Where the reference of this step is kept."""
    return output / FOLDER / f"{STEM}{step}.safetensors"


def kept_steps(output: Path) -> list[int]:
    """Of the references that the run's folder keeps."""
    return [int(each.stem.removeprefix(STEM)) for each in (output / FOLDER).glob(f"{STEM}*.safetensors")]


def attach(trainer: Any, checkpoint: str | None) -> None:
    """Tells the trainer's callbacks of this kind whose they are, and where the run goes on from."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ResetReference):
            callback.trainer = trainer
            callback.came_from = None if checkpoint is None else Path(checkpoint).parent
