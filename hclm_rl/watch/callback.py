"""The detector in training: works with TRL's own trainers as with ours."""

import logging
from typing import Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .alerts import alert
from .collapse import CollapseDetector, Verdict
from .signs import number

logger = logging.getLogger("hclm_rl.watch.collapse")


class CollapseCallback(TrainerCallback):
    """Watches a run: logs `collapse/state` (docs/words.md has the numbers) and tells what gets worse.

    It tells the log, and the tracker that runs (trackio, W&B) by its own alert. Put it before callbacks that write the
    log. `action`: "warn", or "stop" to end training once the entropy has collapsed or explodes (the checkpoint callback
    still saves). To act on it, give a term the coefficient `on_collapse`.

    Metrics:
        collapse/state (number): what the entropy does: 0 healthy, 1 warning, 2 collapsing, 3 exploding, 4 collapsed.
            Healthy: 0 or 1. Else: hold the entropy's level (docs/choose.md), lower the learning rate, or stop:
            `watch_collapse: stop` does at 3 and 4
    """

    def __init__(self, detector: CollapseDetector | None = None, action: Literal["warn", "stop"] = "warn") -> None:
        if action not in ("warn", "stop"):
            raise ValueError(f'action must be "warn" or "stop", got {action!r}')
        self.detector, self.action = detector or CollapseDetector(), action
        self.state = self.detector.initial_state()
        self.verdict = Verdict(state="healthy")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A run that goes on from a checkpoint has its start in its log."""
        self.state, self.verdict = self.detector.initial_state(), Verdict(state="healthy")
        log = [{"max_steps": state.max_steps, **entry} for entry in state.log_history]
        for _, verdict, after in self.detector.read(log):
            self.verdict, self.state = verdict, after

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
        before = self.verdict
        entry = {"max_steps": state.max_steps, **logs}
        self.verdict, self.state = self.detector.update(entry, state.global_step, self.state)
        logs["collapse/state"] = self.verdict.number
        if state.log_history:  # the Trainer keeps a copy of its own
            state.log_history[-1]["collapse/state"] = self.verdict.number
        if self.verdict.severity > before.severity and state.is_world_process_zero:
            told = f"step {state.global_step}: {self.verdict.told}"
            logger.warning(told)
            if self.verdict.is_alarm:
                alert(f"entropy {self.verdict.state}", told, is_over=self.verdict.ends)
        if self.action == "stop" and self.verdict.ends:
            control.should_training_stop = True
