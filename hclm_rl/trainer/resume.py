"""How a run begins, afresh or from a checkpoint, and what a checkpoint keeps beside what transformers writes."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ..chain.state import settle
from ..watch.trace import Trace
from .checkpoints import (
    CHECKPOINT,
    ROLLOUT_NAME,
    STATE_NAME,
    newest_first,
    refuse_other_rollout,
    rollout_in_words,
    terms_state,
)
from .every_step import resume_detectors, save_detectors
from .folder import write_whole
from .reset import attach
from .run import Run

logger = logging.getLogger(__name__)


def begin_run(trainer: Any, checkpoint: str | None) -> None:
    """Leaves nothing of a training before, which may have been interrupted in the middle of a step.

    Every training is a run of its own, whose steps count from 0 or from those of its checkpoint; so do its terms.
    """
    before, device = trainer._hclm, trainer.accelerator.device
    state = terms_state(checkpoint, before.chain, device, trainer.args)
    refuse_other_rollout(checkpoint, before.rollout, trainer.args)
    if trainer.accelerator.is_main_process:
        for sentence in state.changed:
            logger.warning("%s", sentence)
        set_half_ones_aside(Path(trainer.args.output_dir))
    trace = Trace(folder=before.trace.folder, steps=before.trace.steps, every=before.trace.every)
    trainer._hclm = Run(
        chain=before.chain,
        state=state,
        trace=trace,
        reference_gives_entropy=before.reference_gives_entropy,
        watcher=before.watcher,
        rollout=before.rollout,
    )
    if trainer._hclm.is_on:
        trainer._metrics["train"].clear()
        trainer._current_train_step_time = 0.0
        trainer._step, trainer._buffered_inputs = 0, None
    attach(trainer, checkpoint)
    resume_detectors(trainer, checkpoint)
    if checkpoint is not None:
        resume_rollout(trainer, Path(checkpoint))


def set_half_ones_aside(folder: Path) -> None:
    """Renames checkpoints that a kill left unfinished.

    transformers counts them when it deletes old ones, and where it goes by their numbers it takes one of a later step
    for the newest: it would keep that and delete what this run writes.
    """
    for each in newest_first(folder):
        if not (each / STATE_NAME).exists():
            aside = each.with_name(f"incomplete-{each.name}")
            shutil.rmtree(aside, ignore_errors=True)
            each.rename(aside)
            logger.warning("%s was not finished: it is now %s, and can be removed", each, aside.name)


def is_within_a_rollout(trainer: Any, micro_batches: int) -> bool:
    """Whether updates are left to make of the generation batch at hand."""
    return micro_batches % (trainer.args.steps_per_generation * trainer.num_iterations) != 0


def rollout_file(trainer: Any, folder: Path) -> Path:
    """Where this process keeps its buffered rollout."""
    return folder / f"rollout_{trainer.accelerator.process_index}.pt"


def save_checkpoint(trainer: Any, folder: Path) -> None:
    """The terms' state, and what is left of a rollout that makes several updates; called before the rest is written."""
    folder.mkdir(parents=True, exist_ok=True)
    run, file = trainer._hclm, rollout_file(trainer, folder)
    if trainer.args.should_save:
        # of a folder that is written again, so that it counts as complete once it is
        (folder / STATE_NAME).unlink(missing_ok=True)
        if run.chain.links:
            run.state.save(folder)
        save_detectors(trainer, folder)
        (folder / ROLLOUT_NAME).unlink(missing_ok=True)
        if run.rollout is not None:
            write_whole(folder / ROLLOUT_NAME, rollout_in_words(run.rollout))
    file.unlink(missing_ok=True)
    if is_within_a_rollout(trainer, trainer._step):
        unfinished = file.with_suffix(".unfinished")
        left = {"step": trainer._step, "inputs": trainer._buffered_inputs, "shared": run.shared}
        torch.save({**left, "sampled_entropy": run.sampled_entropy}, unfinished)
        settle(unfinished, file)


def resume_rollout(trainer: Any, folder: Path) -> None:
    """The rollout that the checkpoint's step was in the middle of."""
    step = json.loads((folder / STATE_NAME).read_text())["global_step"]
    if not is_within_a_rollout(trainer, step * trainer.args.gradient_accumulation_steps):
        return
    file = rollout_file(trainer, folder)
    if not file.exists():
        logger.warning(
            "%s was written within a rollout and has no %s: the responses are generated anew, so this run is not bit "
            "for bit the one that was not interrupted",
            folder,
            file.name,
        )
        return
    left = torch.load(file, map_location=trainer.accelerator.device, weights_only=True)
    trainer._step, trainer._buffered_inputs = left["step"], left["inputs"]
    trainer._hclm.shared, trainer._hclm.sampled_entropy = left["shared"], left["sampled_entropy"]


def is_checkpoint(folder: str | None) -> bool:
    """Whether the folder is called as checkpoints are."""
    return folder is not None and CHECKPOINT.fullmatch(Path(folder).name) is not None
