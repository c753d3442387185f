"""The callback in a script of TRL's own, and the alerts that it sends."""

import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from transformers import TrainerControl, TrainerState

from hclm_rl.watch.alerts import alert
from hclm_rl.watch.callback import CollapseCallback
from hclm_rl.watch.collapse import CollapseDetector

from ..tiny import low_words, prompts


def test_it_works_alone_with_trls_own_trainer(policy: str, tmp_path: Path):
    watch = CollapseCallback(CollapseDetector(warm_up=0))
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        logging_steps=1,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = trl.GRPOTrainer(policy, low_words, settings, train_dataset=prompts(), callbacks=[watch])
    trainer.train()
    states = [entry["collapse/state"] for entry in trainer.state.log_history if "entropy" in entry]
    assert states == [0] * 6 and watch.curve["step"] == 6 and watch.curve["reference"] > 0


class Recorder:
    """Stands in for a tracker: keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, str]] = []

    def alert(self, title: str, text: str, level: str) -> None:
        self.sent.append((title, text, level))


def trackers(monkeypatch: pytest.MonkeyPatch, is_running: bool = True) -> tuple[Recorder, Recorder]:
    of_trackio, of_wandb = Recorder(), Recorder()
    levels = SimpleNamespace(WARN="warn", ERROR="error")
    context = SimpleNamespace(current_run=SimpleNamespace(get=lambda: of_trackio if is_running else None))
    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(alert=of_trackio.alert, AlertLevel=levels, context_vars=context)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=of_wandb if is_running else None, AlertLevel=levels))
    return of_trackio, of_wandb


def test_alerts_reach_the_trackers_that_run(monkeypatch: pytest.MonkeyPatch):
    for recorder in trackers(monkeypatch):
        recorder.sent.clear()
    of_trackio, of_wandb = trackers(monkeypatch)
    assert alert("entropy collapsing", "step 5", is_over=False) == ["trackio", "wandb"]
    assert of_trackio.sent == of_wandb.sent == [("entropy collapsing", "step 5", "warn")]
    trackers(monkeypatch, is_running=False)
    assert alert("entropy collapsing", "step 5", is_over=True) == []


def test_a_tracker_that_fails_ends_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    _, of_wandb = trackers(monkeypatch)
    monkeypatch.setattr(of_wandb, "alert", lambda **_: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert alert("a", "b", is_over=True) == ["trackio"]
    assert "wandb could not send the alert" in caplog.text


def test_the_callback_alerts_once_as_it_gets_worse_and_stops_at_the_end_alone(monkeypatch: pytest.MonkeyPatch):
    of_trackio, _ = trackers(monkeypatch)
    watch, state, control = CollapseCallback(action="stop"), TrainerState(), TrainerControl()
    stopped_at = None
    for step in range(1, 200):
        state.global_step = step
        watch.on_log(None, state, control, {"entropy": math.exp(-step / 80)})
        if control.should_training_stop and stopped_at is None:
            stopped_at = watch.verdict.state
    assert [(title, level) for title, _, level in of_trackio.sent] == [
        ("entropy collapsing", "warn"),
        ("entropy collapsed", "error"),
    ]
    assert stopped_at == "collapsed"
