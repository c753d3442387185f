"""The detector in training: works with TRL's own trainers as with ours."""

import logging
from collections.abc import Callable
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .alerts import alert
from .collapse import CollapseDetector, Verdict
from .signs import number

logger = logging.getLogger("hclm_rl.watch.collapse")

ENOUGH = 40  # entries without which a fall that slows down is seen late (docs/results.md)


class CollapseCallback(TrainerCallback):
    """Watches a run: logs `collapse/state` (docs/words.md has the numbers) and tells what gets worse.

    It tells the log, and the tracker that runs (trackio, W&B) by its own alert. Put it before callbacks that write the
    log. `action`: "warn", or "stop" to end training once the entropy has collapsed or explodes (the checkpoint callback
    still saves). To act on it, give a term the coefficient `on_collapse`.

    In the trainers of hclm_rl the detector sees every optimiser step, whatever `logging_steps` is; in others the log
    entries alone, so log every step there.

    Metrics:
        collapse/state (number): what the entropy does: 0 healthy, 1 warning, 2 collapsing, 3 exploding, 4 collapsed.
            Healthy: 0 or 1. Else: hold the entropy's level (docs/choose.md), lower the learning rate, or stop:
            `watch_collapse: stop` does at 3 and 4
    """

    def __init__(self, detector: CollapseDetector | None = None, action: Literal["warn", "stop"] = "warn") -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f'action must be "warn" or "stop", got {action!r}')
        self.detector, self.action = detector or CollapseDetector(), action
        self.curve = self.detector.initial_state()
        self.verdict = Verdict(state="healthy")
        # of hclm_rl's trainers: what was measured since the last call; and what their checkpoint holds of this
        self.measured: Callable[[], dict[str, float]] | None = None
        self.resumed: dict[str, Any] | None = None
        self.waiting: tuple[int, dict[str, float]] | None = None  # a step that may get a log entry, or not

    def kept(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"curve": self.curve, "waiting": self.waiting}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A run that goes on from a checkpoint has its start there, or in its log."""
        self.curve, self.verdict, self.waiting = self.detector.initial_state(), Verdict(state="healthy"), None
        if self.resumed is not None:
            self.curve, waiting = self.resumed["curve"], self.resumed["waiting"]
            self.waiting = None if waiting is None else (waiting[0], waiting[1])
            self.verdict = self.detector.update({}, state.global_step, self.curve)[0]
            return
        entries = state.max_steps // max(state.logging_steps, 1)
        if self.measured is None and state.logging_steps > 1 and entries < ENOUGH and state.is_world_process_zero:
            logger.warning(
                "with logging_steps %d a collapse may be told after it has come: the detector sees %d entries of this "
                "run, and needs some %d for a fall that slows down; set logging_steps: 1",
                *(state.logging_steps, entries, ENOUGH),
            )
        log = [{"max_steps": state.max_steps, **entry} for entry in state.log_history]
        for _, verdict, after in self.detector.read(log):
            self.verdict, self.curve = verdict, after

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A step without a log entry is seen one step later."""
        if self.measured is None:
            return
        if self.waiting is not None:
            self.see(*self.waiting, state, control)
        found = self.measured()
        self.waiting = (state.global_step, found) if "entropy" in found else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ) -> None:
        if logs is None or number(logs.get("entropy")) is None:
            return
        entry = dict(logs)
        if self.waiting is not None and self.waiting[0] == state.global_step:
            entry.pop("reward", None)  # of all steps since the last entry
            entry |= self.waiting[1]
            self.waiting = None
        self.see(state.global_step, entry, state, control)
        logs["collapse/state"] = self.verdict.number
        if state.log_history:  # the Trainer keeps a copy of its own
            state.log_history[-1]["collapse/state"] = self.verdict.number

    def see(self, step: int, entry: dict, state: TrainerState, control: TrainerControl) -> None:
        """The verdict after one more step; tells what got worse, and stops the run if that is asked for."""
        before = self.verdict
        self.verdict, self.curve = self.detector.update({"max_steps": state.max_steps, **entry}, step, self.curve)
        if self.verdict.severity > before.severity and state.is_world_process_zero:
            told = f"step {step}: {self.verdict.told}"
            logger.warning(told)
            if self.verdict.is_alarm:
                alert(f"entropy {self.verdict.state}", told, is_over=self.verdict.ends)
        if self.action == "stop" and self.verdict.ends:
            control.should_training_stop = True
