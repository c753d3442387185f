"""What a trainer alone leaves in its folder, as a recipe would: the log, what was run, nothing of a run before."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import trl

import hclm_rl
from hclm_rl.trainer.folder import LogWriter, settings_of
from hclm_rl.watch.report import read_run
from hclm_rl.watch.report.page import terms_of

from ..tiny import PAIRS, low_words, make, prompts, settings


def log_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_script_gets_what_a_recipe_gets(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[{"entropy_bonus": {"coef": 0.5}}], hub_token="hf_secret_of_mine")
    trainer.evaluate(prompts(4))  # before training: no part of a run
    assert not (tmp_path / "log.jsonl").exists()
    trainer.train()
    log = log_in(tmp_path)
    assert [entry["step"] for entry in log[:2]] == [1, 2] and log[0]["max_steps"] == 2
    assert log[0]["collapse/state"] == 0 and log[0]["entropy"] > 0
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["trainer"], about["model"], about["steps"]) == ("GRPOTrainer", policy, 2)
    [[name, given]] = [pair for term in about["terms"] for pair in term.items()]
    assert (name, given["coef"], given["name"]) == ("entropy_bonus", 0.5, "entropy_bonus")
    assert about["started"] <= about["ended"] and about["settings"]["learning_rate"] == 0.1
    assert "entropy_terms" not in about["settings"] and "warmup_steps" not in about["settings"]  # the default
    assert "hf_secret_of_mine" not in (tmp_path / "run.json").read_text()
    run = read_run("mine", tmp_path)
    assert not run.problems and "entropy_bonus" in terms_of(run) and "learning_rate: 0.1" in run.recipe


def test_a_run_before_in_the_same_folder_is_kept_whole(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = make(policy, tmp_path, trace_steps=[1], save_strategy="steps", save_steps=1)
    first.train()
    log = log_in(tmp_path)
    second = make(policy, tmp_path, max_steps=1, seed=8)
    with caplog.at_level(logging.WARNING):
        second.train()
    assert "held a run: it is in earlier-1, with its checkpoints" in caplog.text
    assert log_in(tmp_path / "earlier-1") == log
    assert (tmp_path / "earlier-1/checkpoint-2").is_dir() and (tmp_path / "earlier-1/trace").is_dir()
    assert len(log_in(tmp_path)) == 2 and not (tmp_path / "trace").exists()  # a step and the run's summary
    second.train()
    assert (tmp_path / "earlier-2/run.json").exists()
    shutil.rmtree(tmp_path / "earlier-1")  # the next one takes no number that is there
    second.train()
    assert (tmp_path / "earlier-3/run.json").exists() and (tmp_path / "earlier-2/run.json").exists()


def test_a_resumed_run_stays_and_a_broken_one_says_how_far_it_came(policy: str, tmp_path: Path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make(policy, tmp_path, **changes).train()
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "ended": None}))
    [problem] = read_run("mine", tmp_path).problems
    assert problem.startswith(f"The run began at {about['started']} and has not ended")
    assert problem.endswith("It logged step 2 of 2.")
    make(policy, tmp_path, **changes).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not list(tmp_path.glob("earlier-*"))
    assert json.loads((tmp_path / "run.json").read_text())["from_step"] == 1
    assert [entry["step"] for entry in log_in(tmp_path)][:2] == [1, 2]


@pytest.mark.parametrize(("max_steps", "steps"), [(2, [1, 2, 2]), (3, [1, 2, 3, 3])])
def test_a_run_that_goes_on_from_its_end_has_one_last_line(policy: str, tmp_path: Path, max_steps: int, steps: list):
    make(policy, tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    make(policy, tmp_path, max_steps=max_steps).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = log_in(tmp_path)
    assert [entry["step"] for entry in log] == steps  # a line a step, then that of the end
    assert ["train_runtime" in entry for entry in log] == [False] * max_steps + [True]


def test_a_detector_of_ones_own_takes_the_place_of_the_runs(policy: str, tmp_path: Path):
    own = hclm_rl.CollapseCallback(action="stop")
    trainer = make(policy, tmp_path)
    trainer.add_callback(own)
    given = make(policy, tmp_path, trainer={"callbacks": [own]})
    for each in (trainer, given):
        found = [one for one in each.callback_handler.callbacks if isinstance(one, hclm_rl.CollapseCallback)]
        assert found == [own] and each.callback_handler.callbacks[0] is own  # before what writes a log


def test_without_log_and_detector_the_folder_is_that_of_trl(policy: str, tmp_path: Path):
    make(policy, tmp_path / "none", watch_collapse="off", run_log=False).train()
    stock = make(policy, tmp_path / "stock", ours=False)
    stock.train()
    names = [sorted(each.name for each in (tmp_path / run).glob("*")) for run in ("none", "stock")]
    assert names[0] == names[1]


def test_a_run_of_trls_own_trainer_can_be_read(policy: str, tmp_path: Path):
    config = trl.GRPOConfig(output_dir=str(tmp_path), **settings(save_strategy="steps", save_steps=2))
    trainer = PAIRS["grpo"][0](model=policy, reward_funcs=low_words, args=config, train_dataset=prompts())
    trainer.train()
    run = read_run("stock", tmp_path)
    assert [entry["step"] for entry in run.log] == [1, 2] and not run.problems
    assert run.curve("entropy")[0] == [1, 2]
    # and it is the default for TRL's config in our trainer, which has no such fields
    ours = PAIRS["grpo"][1](model=policy, reward_funcs=low_words, args=config, train_dataset=prompts())
    assert any(isinstance(each, LogWriter) for each in ours.callback_handler.callbacks)
    assert settings_of(config)["max_steps"] == 2
