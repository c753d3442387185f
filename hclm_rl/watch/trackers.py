"""What the trackers of a run are told beside its log, by their own calls: before and after, and the token table.

A tracker counts where it is running: none is imported or started for it. transformers ends trackio's run with the
training, so that one is opened again for what is known only then.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .trace import FOLDER, read_trace, traced_steps

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # before the names of what was measured on held-out prompts
ROWS = 1000  # of the token table; the whole trace is W&B's artefact
STEP = "train/global_step"  # transformers' axis in W&B and trackio
Points = list[tuple[int, dict[str, float]]]  # (optimiser step, values)


def pages_of_run() -> dict[str, str]:
    """Tracker -> address of the run that is open there, of those that have one."""
    found = {}
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    if url := getattr(getattr(wandb, "run", None), "url", None):  # None offline
        found["wandb"] = str(url)
    place = getattr(getattr(trackio, "context_vars", None), "current_space_id", None)
    if place is not None and (space := place.get()):
        found["trackio"] = f"https://huggingface.co/spaces/{space}"
    return found


def points(before: dict | None, after: dict | None, first: int, last: int) -> Points:
    """The means of `before` and `after` at the steps at which they were measured."""
    found = [(first, before), (last, after)]
    return [
        (step, {f"{HELD_OUT}/{name}": mean for name, mean in each["means"].items()}) for step, each in found if each
    ]


def by_wandb(measured: Points, folder: Path) -> None:
    """Logs before and after, the last traced step as a table and all of them as an artefact."""
    import wandb  # pyright: ignore[reportMissingImports]

    run = wandb.run
    for step, values in measured:
        run.log({**values, STEP: step})
    if steps := traced_steps(folder):
        rows = read_trace(folder, steps[-1]).slice(0, ROWS).to_pydict()
        table = wandb.Table(columns=list(rows), data=[list(row) for row in zip(*rows.values(), strict=True)])
        run.log({f"{FOLDER}/tokens": table, STEP: steps[-1]})
        artefact = wandb.Artifact(f"{FOLDER}-{run.id}", type=FOLDER)
        artefact.add_dir(str(folder / FOLDER))
        run.log_artifact(artefact)


def by_trackio(measured: Points, folder: Path, place: Mapping[str, Any]) -> None:
    """`place`: what trackio.init is told of the project, the run and the Space where it is."""
    import trackio  # pyright: ignore[reportMissingImports]

    trackio.init(**place, resume="must", embed=False)
    for step, values in measured:
        trackio.log({**values, STEP: step}, step=step)
    if steps := traced_steps(folder):
        rows = read_trace(folder, steps[-1]).slice(0, ROWS).to_pandas()
        trackio.log({f"{FOLDER}/tokens": trackio.Table(dataframe=rows), STEP: steps[-1]}, step=steps[-1])
    trackio.finish()


def by_tensorboard(measured: Points, writer: Callable, folder: str) -> None:
    """TensorBoard has no tables: curves alone."""
    events = writer(log_dir=folder)
    for step, values in measured:
        for name, value in values.items():
            events.add_scalar(name, value, step)
    events.close()


class TellTrackers(TrainerCallback):
    """Remembers which trackers run, and tells them at the end what the log does not say."""

    def __init__(self) -> None:
        self.tells: dict[str, Callable[[Points, Path], None]] = {}
        self.first = 0  # the step that training begins with

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        self.first = state.global_step
        wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            self.tells["wandb"] = by_wandb
        if trackio is not None and (run := trackio.context_vars.current_run.get()) is not None:
            place = {
                "project": run.project,
                "name": run.name,
                "space_id": trackio.context_vars.current_space_id.get(),  # else it is looked for on this machine
                "bucket_id": args.trackio_bucket_id,
                "private": args.hub_private_repo,
            }
            self.tells["trackio"] = lambda measured, folder: by_trackio(measured, folder, place)

    def found(self, callbacks: list[TrainerCallback]) -> None:
        """TensorBoard's, which only transformers' own callback knows."""
        for each in callbacks:
            writer, folder = getattr(each, "_SummaryWriter", None), getattr(each, "logging_dir", None)
            if type(each).__name__ == "TensorBoardCallback" and writer is not None and folder:
                self.tells["tensorboard"] = lambda measured, _, writer=writer, folder=folder: by_tensorboard(
                    measured, writer, folder
                )

    def tell(self, measured: Points, folder: Path) -> list[str]:
        """Tells them all and says whom; one that fails says so in the log and ends no run."""
        sent = []
        for name, send in self.tells.items():
            try:
                send(measured, folder)
                sent.append(name)
            except Exception as error:  # of another library, on its way to a server
                logger.warning("%s could not be told before and after: %s", name, error)
        return sent


def tell_trackers(
    callbacks: list[TrainerCallback], folder: Path, before: Mapping | None, after: Mapping | None, last: int
) -> list[str]:
    """Through the TellTrackers among a trainer's callbacks; says which trackers were told."""
    teller = next((each for each in callbacks if isinstance(each, TellTrackers)), None)
    if teller is None:
        return []
    teller.found(callbacks)
    measured = points(dict(before) if before else None, dict(after) if after else None, teller.first, last)
    return teller.tell(measured, folder)
