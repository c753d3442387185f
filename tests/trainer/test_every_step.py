"""The detector sees every optimiser step, however seldom the run logs, and after it is resumed."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import trl

from hclm_rl import CollapseCallback, CollapseDetector
from hclm_rl.trainer.every_step import NAME

from ..tiny import PAIRS, low_words, make, prompts

# two steps a rollout in two micro-batches each, and weights that move
WAY: dict[str, Any] = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4,
    "learning_rate": 1e-2, "max_steps": 6,
}  # fmt: skip


def watched(policy: str, folder: Path, **settings: Any) -> tuple[Any, CollapseCallback]:
    watch = CollapseCallback(CollapseDetector(warm_up=0))
    return make(policy, folder, trainer={"callbacks": [watch]}, **{**WAY, **settings}), watch


@pytest.mark.parametrize("algorithm", PAIRS)
def test_what_it_has_seen_is_the_same_however_seldom_the_run_logs(algorithm: str, policy: str, tmp_path: Path):
    curves = {}
    for every in (1, 3, 5):
        trainer, watch = watched(policy, tmp_path / str(every), logging_steps=every, algorithm=algorithm)
        trainer.train()
        if watch.waiting is not None:  # a step without a log entry is seen one later
            entry = {"max_steps": 6, **watch.waiting[1]}
            watch.curve = watch.detector.update(entry, watch.waiting[0], watch.curve)[1]
        curves[every] = watch.curve
        if every == 1:
            log = [each["entropy"] for each in trainer.state.log_history if "entropy" in each]
            assert watch.curve["entropy"][0] == pytest.approx(log, abs=1e-6) and len(set(log)) == 6
    assert curves[1] == curves[3] == curves[5] and len(curves[1]["reward"][0]) == 3  # a rollout for two steps


def test_it_goes_on_from_a_checkpoint_between_two_log_entries(policy: str, tmp_path: Path):
    saving: dict[str, Any] = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer, whole = watched(policy, tmp_path / "whole", **saving)
    trainer.train()
    for step in (3, 4, 5):
        trainer, resumed = watched(policy, tmp_path / "resumed", logging_steps=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert resumed.curve == whole.curve and resumed.verdict.state == whole.verdict.state
    # a damaged file, or none, leaves it the log: entries of steps 3 and 6, and what came between after the resumption
    for text in ("[{", None):
        file = tmp_path / "whole/checkpoint-4" / NAME
        file.unlink() if text is None else file.write_text(text)
        trainer, resumed = watched(policy, tmp_path / "resumed", logging_steps=3)
        trainer.train(resume_from_checkpoint=str(file.parent))
        assert resumed.curve["step"] == 6 and len(resumed.curve["entropy"][0]) == 3
    trainer.train()  # a training of its own
    assert len(resumed.curve["entropy"][0]) == 6


def test_a_run_stops_between_two_log_entries(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update = CollapseDetector.update

    def fallen(self: CollapseDetector, logs: dict, step: int, state: dict) -> Any:
        return update(self, {**logs, "entropy": math.exp(-0.5 * step)}, step, state)

    monkeypatch.setattr(CollapseDetector, "update", fallen)
    watch = CollapseCallback(CollapseDetector(memory=1, warm_up=0), action="stop")
    trainer = make(policy, tmp_path, trainer={"callbacks": [watch]}, max_steps=12, logging_steps=20)
    trainer.train()
    assert watch.verdict.state == "collapsed" and trainer.state.global_step < 12


def test_in_trls_own_trainer_it_sees_the_log_and_says_so(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    watch = CollapseCallback()
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=4, logging_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=4, report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="hclm_rl.watch.collapse"):
        trl.GRPOTrainer(policy, low_words, args, train_dataset=prompts(), callbacks=[watch]).train()
        assert watch.curve["step"] == 4 and watch.measured is None
        assert caplog.messages == [
            "with logging_steps 2 a collapse may be told after it has come: the detector sees 2 entries of this run, "
            "and needs some 40 for a fall that slows down; set logging_steps: 1"
        ]
        caplog.clear()
        args.logging_steps = 1
        trl.GRPOTrainer(policy, low_words, args, train_dataset=prompts(), callbacks=[watch]).train()
        watched(policy, tmp_path / "ours", logging_steps=2)[0].train()
    assert caplog.messages == []


def test_what_it_has_seen_is_json(policy: str, tmp_path: Path):
    trainer, watch = watched(policy, tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    [kept] = json.loads((tmp_path / "checkpoint-6" / NAME).read_text())
    assert kept["curve"] == watch.curve
