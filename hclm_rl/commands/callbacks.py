"""What a run writes while it trains, and what it measures before its first step."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..watch.report.runs import read_log


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
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept if state.global_step))

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
