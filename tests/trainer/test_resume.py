"""A run that is interrupted and resumed is the one that was not, bit for bit; what cannot be resumed is refused."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
import trl

from hclm_rl import Effect, Term, TokenBatch
from hclm_rl.chain.state import FILE_NAME
from hclm_rl.trainer.checkpoints import STATE_NAME, find_checkpoint, what_is_missing

from ..tiny import largest_difference, make, weights_of

STATEFUL = [
    "epo",
    "tests.own_terms.Remembers",
    {"entropy_bonus": {"coef": {"kind": "step_to_target", "target": 5.0, "delta": 0.1}}},
]
# 16 prompts, 8 in a step: 2 steps an epoch
EPOCHS = {"per_device_train_batch_size": 32, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 7}
SAVING = {"save_strategy": "steps", "save_steps": 1}
WAYS: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "accumulation": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
    "two updates of a rollout": {"num_iterations": 2},
    "four mini-batches of a rollout": {"per_device_train_batch_size": 16, "steps_per_generation": 4},
    "RLOO": {"algorithm": "rloo"},
    "no terms": {"terms": []},
}


def steps_of(trainer: Any) -> list[dict]:
    """What was logged, step by step, but for the seconds it took."""
    return [{**entry, "step_time": 0} for entry in trainer.state.log_history if "train_runtime" not in entry]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_resumes_from_any_step_of_any_epoch(way: str, policy: str, tmp_path: Path):
    settings = {"terms": STATEFUL, **EPOCHS, **WAYS[way]}
    whole = make(policy, tmp_path / "whole", **settings, **SAVING)
    whole.train()
    assert whole.state.epoch > 1
    for step in (3, 4):  # within an epoch and at its end, within a rollout and at its end
        resumed = make(policy, tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0, step
        assert resumed._hclm.state.memory.keys() == whole._hclm.state.memory.keys()
        assert resumed._hclm.state.controller == whole._hclm.state.controller
        assert steps_of(resumed) == steps_of(whole)


@pytest.mark.parametrize("steps", [3, 2])
def test_a_run_that_is_done_makes_no_step_more(steps: int, policy: str, tmp_path: Path):
    # killed after its last checkpoint (in the middle of an epoch), or resumed with fewer steps than it has made
    settings = {"terms": STATEFUL, **EPOCHS, "max_steps": 3}
    whole = make(policy, tmp_path, **settings, **SAVING)
    whole.train()
    resumed = make(policy, tmp_path, **settings | {"max_steps": steps}, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and not (tmp_path / "checkpoint-4").exists()
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0


def test_a_rollout_that_is_lost_is_said(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    settings = {**EPOCHS, "max_steps": 4, "num_iterations": 2}
    make(policy, tmp_path, **settings, **SAVING).train()
    assert (tmp_path / "checkpoint-3/rollout_0.pt").exists() and not (tmp_path / "checkpoint-2/rollout_0.pt").exists()
    (tmp_path / "checkpoint-3/rollout_0.pt").unlink()
    make(policy, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "checkpoint-3 was written within a rollout and has no rollout_0.pt" in caplog.text


@dataclass(frozen=True, kw_only=True)
class Interrupted(Term):
    """Ctrl-C in the middle of a step, once."""

    def __call__(self, batch: TokenBatch, memory: dict) -> Effect:
        if batch.step == 1 and SWITCH.pop("on", False) is True:
            raise KeyboardInterrupt
        return Effect(metrics={"seen": batch.entropy.mean()})


SWITCH: dict[str, bool] = {}


def test_training_again_after_an_interruption_has_nothing_of_the_half_step(policy: str, tmp_path: Path):
    # a policy that does not move and fixed responses: every training of it logs the same
    terms = [*STATEFUL, Interrupted(), {"spectrum": {"spectrum_every": 3}}]
    still = {"terms": terms, "fixed": True, "learning_rate": 0.0, "max_steps": 3, "trace_every": 1}
    still |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}
    plain = make(policy, tmp_path / "plain", **still)
    transformers.set_seed(1)  # of TRL's shuffle
    plain.train()
    trainer = make(policy, tmp_path / "run", **still)
    SWITCH["on"] = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for _ in range(3):
        transformers.set_seed(1)
        trainer.train()
        assert steps_of(trainer) == steps_of(plain)
        for each, folder in ((trainer, "run"), (plain, "plain")):
            each._hclm.state.save(tmp_path / folder)
        assert (tmp_path / "run" / FILE_NAME).read_bytes() == (tmp_path / "plain" / FILE_NAME).read_bytes()
    assert "spectrum/effective_rank" in steps_of(trainer)[0]  # though that of the training before planned one at step 3
    for step in (1, 2, 3):
        name = f"trace/step-{step:05d}.parquet"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_trainer_that_was_interrupted_resumes_like_a_new_one(policy: str, tmp_path: Path):
    settings = {"terms": STATEFUL, **EPOCHS, "max_steps": 4, "num_iterations": 2}
    trainer = make(policy, tmp_path, **settings, **SAVING)
    trainer.train()
    ended = weights_of(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert largest_difference(ended, weights_of(trainer)) == 0.0


@pytest.fixture(scope="module")
def saved(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    make(policy, folder, terms=["epo"], max_steps=2, **SAVING).train()
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def args(folder: Path, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"output_dir": str(folder), "save_only_model": False, **changes})


CUT = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_NAME, "training_args.bin"]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("way", ["gone", "empty", "half"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(name: str, way: str, run: Path, caplog):
    assert find_checkpoint(True, args(run), True) == str(run / "checkpoint-2") and not caplog.text
    file = run / "checkpoint-2" / name
    if way == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if way == "half" else 0])
    if name == "training_args.bin" and way == "gone":  # no run reads it
        assert what_is_missing(run / "checkpoint-2") is None
        return
    assert find_checkpoint(True, args(run), True) == str(run / "checkpoint-1")
    what = "weights" if (name, way) == ("model.safetensors", "gone") else name.split(".")[0]
    assert re.search(f"checkpoint-1; passed over: checkpoint-2: it.*{what}", caplog.text)
    with pytest.raises(ValueError, match=f"'{run}/checkpoint-2' is no complete checkpoint: it.*{what}"):
        find_checkpoint(str(run / "checkpoint-2"), args(run), True)


def test_every_spelling_of_a_folder_finds_its_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run.parent)
    for wanted in (True, "true", "True", "run", "run/", "./run", str(run), f"{run}//", "run/checkpoint-2/.."):
        found = find_checkpoint(wanted, args(Path("run")), True)
        assert found is not None and Path(found).resolve() == run / "checkpoint-2"
    for wanted in ("run/checkpoint-1", "run/checkpoint-1/", str(run / "checkpoint-1")):
        found = find_checkpoint(wanted, args(Path("elsewhere")), True)
        assert found is not None and Path(found).resolve() == run / "checkpoint-1"
    for wanted in (None, False, "", "false", "False"):
        assert find_checkpoint(wanted, args(run), True) is None


def test_where_there_is_no_checkpoint_a_sentence_says_so(run: Path, tmp_path: Path):
    for wanted in ("nowhere", str(tmp_path)):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint: no checkpoint at '{wanted}'"):
            find_checkpoint(wanted, args(run), False)
    with pytest.raises(ValueError, match="checkpoint-9' is no complete checkpoint: there is no such folder"):
        find_checkpoint(str(run / "checkpoint-9"), args(run), False)
    for step in (1, 2):
        (run / f"checkpoint-{step}" / STATE_NAME).unlink()
    with pytest.raises(ValueError, match=r"no complete checkpoint in '.*': checkpoint-2: it has .*; checkpoint-1: it"):
        find_checkpoint(True, args(run), True)


def test_checkpoints_are_compared_by_number(tmp_path: Path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-1000-old").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-100: it .*; checkpoint-10: it .*; checkpoint-9: it"):
        find_checkpoint(True, args(tmp_path), False)


def test_one_without_the_terms_state_is_passed_over_where_there_are_terms(run: Path, caplog):
    (run / "checkpoint-2" / FILE_NAME).unlink()
    assert find_checkpoint(True, args(run), True) == str(run / "checkpoint-1")
    assert f"checkpoint-2: it has no {FILE_NAME}, though this run has entropy terms" in caplog.text
    assert find_checkpoint(True, args(run), False) == str(run / "checkpoint-2")
    assert find_checkpoint(True, args(run, allow_changed_terms=True), True) == str(run / "checkpoint-2")


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ([], r"was written with the entropy terms \['epo'\], this run has none"),
        (["epo", "qae"], r"was written with the entropy terms \['epo'\], this run has \['epo', 'qae'\]"),
        ([{"qae": {"name": "epo"}}], "'epo' was the term hclm_rl.terms.epo.Epo and is hclm_rl.terms.qae.Qae"),
        ([{"epo": {"coef": 0.5}}], 'coef of \'epo\' was {.*"coefficient": .*} and is {.*"coefficient": 0.5}'),
    ],
)
def test_other_terms_are_refused_unless_allowed(terms: list, sentence: str, policy: str, run: Path, caplog):
    settings = {"terms": terms, "max_steps": 3}
    with pytest.raises(ValueError, match=sentence + ".*or set allow_changed_terms"):
        make(policy, run, **settings).train(resume_from_checkpoint=True)
    make(policy, run, **settings, allow_changed_terms=True).train(resume_from_checkpoint=True)
    assert re.search(sentence, caplog.text)


def test_a_checkpoint_that_is_written_again_is_not_whole_before_it_is(policy: str, run: Path):
    trainer = make(policy, run, terms=["epo"], max_steps=2, **SAVING)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        save = trl.GRPOTrainer._save_optimizer_and_scheduler
        patch.setattr(
            trl.GRPOTrainer,
            "_save_optimizer_and_scheduler",
            lambda self, folder: (seen.append(what_is_missing(Path(folder))), save(self, folder)),
        )
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert seen == [f"it has no {STATE_NAME}, which is written last"]
    assert what_is_missing(run / "checkpoint-2") is None


def test_the_terms_state_is_there_before_older_checkpoints_go(policy: str, tmp_path: Path):
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        rotate = transformers.trainer.rotate_checkpoints

        def watched(output_dir: str, **given: Any) -> None:
            seen.append(sorted(folder.parent.name for folder in Path(output_dir).glob(f"*/{FILE_NAME}")))
            rotate(output_dir, **given)

        patch.setattr(transformers.trainer, "rotate_checkpoints", watched)
        make(policy, tmp_path, terms=["epo"], max_steps=2, save_total_limit=1, **SAVING).train()
    assert seen == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]


def test_a_half_checkpoint_of_a_later_step_does_not_outlive_what_the_run_writes(policy: str, run: Path):
    """transformers keeps the one with the highest number, where the times of writing tell nothing."""
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-9")
    (run / "checkpoint-9" / STATE_NAME).unlink()
    make(policy, run, terms=["epo"], max_steps=4, save_total_limit=1, **SAVING).train(resume_from_checkpoint=True)
    left = sorted(each.name for each in run.iterdir() if "checkpoint" in each.name)
    assert left == ["checkpoint-4", "incomplete-checkpoint-9"] and what_is_missing(run / "checkpoint-4") is None
