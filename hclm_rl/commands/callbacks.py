"""What a run writes while it trains, and what it measures before its first step."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..chain.state import settle
from ..watch.report.runs import RECIPE_NAME, SUMMARY_NAME, read_log
from ..watch.secrets import hide_in_yaml


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; whoever is killed leaves the old one or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    settle(unfinished, path)


class FolderOpener(TrainerCallback):
    """Takes the summary of a run before out of the folder and puts this one's recipe in, without its tokens and keys,
    once training is to begin.

    By then the run has been built and its checkpoint loaded: a run that is refused leaves the folder as it was.
    """

    def __init__(self, folder: Path, recipe: Path | None) -> None:
        self.folder, self.recipe = folder, recipe

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            (self.folder / SUMMARY_NAME).unlink(missing_ok=True)
            if self.recipe and self.recipe.resolve() != (self.folder / RECIPE_NAME).resolve():
                write_whole(self.folder / RECIPE_NAME, hide_in_yaml(self.recipe.read_text(encoding="utf-8")))


class LogWriter(TrainerCallback):
    """Writes one JSON object per logged step, each line at once, so that a run can be watched and survives a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            # a resumed run repeats the steps after its checkpoint
            kept = [entry for entry in read_log(self.path)[0] if entry["step"] <= state.global_step]
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept if state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            with self.path.open("a") as file:
                file.write(json.dumps(entry, default=float) + "\n")


class MeasureAtStart(TrainerCallback):
    """Measures once: as a callback when the model is wrapped for training, unless a run is resumed."""

    def __init__(self, measure: Callable[[], dict | None]) -> None:
        self.measure, self.found, self.seconds = measure, None, 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self.found = self.measure()
        self.seconds = time.perf_counter() - start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.global_step:
            self()
