"""What the trackers get beside the log; stand-ins with the trackers' own signatures."""

import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from hclm_rl.commands import cli
from hclm_rl.watch.trackers import TellTrackers, pages_of_run, points, tell_trackers

from ..synthetic_run import write_trace

BEFORE = {"prompts": 2, "samples": 4, "means": {"pass@1": 0.25, "pass@4": 1.0}, "standard_errors": {}}
AFTER = {**BEFORE, "means": {"pass@1": 0.5, "pass@4": 0.75}}
AT = [(0, {"held_out/pass@1": 0.25, "held_out/pass@4": 1.0}), (20, {"held_out/pass@1": 0.5, "held_out/pass@4": 0.75})]


class FakeWandb:
    """wandb 0.31: run.log(data), run.log_artifact(it), Table(columns, data), Artifact(name, type).add_dir(path)"""

    def __init__(self) -> None:
        self.logged, self.artefacts = [], []
        self.run = SimpleNamespace(id="r1", log=self.logged.append, log_artifact=self.artefacts.append)

    class Table:
        def __init__(self, columns: list[str], data: list[list]) -> None:
            self.columns, self.data = columns, data

    class Artifact:
        def __init__(self, name: str, type: str) -> None:
            self.name, self.type = name, type

        def add_dir(self, local_path: str) -> None:
            self.files = sorted(file.name for file in Path(local_path).iterdir())


class FakeTrackio:
    """trackio 0.43: init(project, name, space_id, ...), log(metrics, step), Table(dataframe), finish()"""

    def __init__(self) -> None:
        self.calls: list = []
        self.space: str | None = None
        self.context_vars = SimpleNamespace(
            current_run=SimpleNamespace(get=self.current), current_space_id=SimpleNamespace(get=lambda: self.space)
        )

    def current(self) -> SimpleNamespace:
        return SimpleNamespace(project="p", name="n")

    def init(
        self,
        project: str,
        name: str | None = None,
        space_id: str | None = None,
        bucket_id: str | None = None,
        resume: str = "never",
        private: bool | None = None,
        embed: bool = True,
    ) -> None:
        self.calls.append(("init", project, name, resume, space_id, bucket_id, private))

    def log(self, metrics: dict, step: int | None = None) -> None:
        self.calls.append(("log", step, metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))

    class Table:
        def __init__(self, dataframe: object) -> None:
            self.rows = len(dataframe)  # pyright: ignore[reportArgumentType]


class TensorBoardCallback(TrainerCallback):
    """transformers': a writer's class and its folder."""

    logging_dir = "events"

    def __init__(self) -> None:
        self.scalars: list = []
        self._SummaryWriter = self.open

    def open(self, log_dir: str) -> SimpleNamespace:
        return SimpleNamespace(add_scalar=lambda *given: self.scalars.append((log_dir, *given)), close=lambda: None)


GIVEN = SimpleNamespace(trackio_bucket_id=None, hub_private_repo=None)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> tuple[TellTrackers, FakeWandb, FakeTrackio]:
    wandb, trackio, teller = FakeWandb(), FakeTrackio(), TellTrackers()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    teller.on_train_begin(GIVEN, TrainerState(), TrainerControl())  # pyright: ignore[reportArgumentType]
    return teller, wandb, trackio


def test_before_and_after_stand_at_the_steps_at_which_they_were_measured():
    assert points(BEFORE, AFTER, 0, 20) == AT
    assert points(None, AFTER, 0, 20) == AT[1:] and points(None, None, 0, 20) == []


def test_every_tracker_gets_before_and_after(started: tuple, tmp_path: Path):
    teller, wandb, trackio = started
    board = TensorBoardCallback()
    assert tell_trackers([board, teller], tmp_path, BEFORE, AFTER, 20) == ["wandb", "trackio", "tensorboard"]
    assert wandb.logged == [{**values, "train/global_step": step} for step, values in AT]
    assert trackio.calls[0] == ("init", "p", "n", "must", None, None, None) and trackio.calls[-1] == ("finish",)
    assert trackio.calls[1:-1] == [("log", step, {**values, "train/global_step": step}) for step, values in AT]
    assert board.scalars == [("events", name, value, step) for step, values in AT for name, value in values.items()]
    assert wandb.artefacts == []  # nothing was traced


def test_a_run_has_an_address_where_a_tracker_shows_it(started: tuple, monkeypatch: pytest.MonkeyPatch):
    _, wandb, trackio = started
    assert pages_of_run() == {}  # this machine alone has them
    wandb.run.url, trackio.space = "https://wandb.ai/me/p/runs/r1", "someone/runs"
    assert pages_of_run() == {"wandb": wandb.run.url, "trackio": "https://huggingface.co/spaces/someone/runs"}
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name)
    assert pages_of_run() == {}


def test_a_run_in_a_space_is_told_there(started: tuple, tmp_path: Path):
    _, _, trackio = started
    trackio.space, teller = "someone/runs", TellTrackers()
    given = SimpleNamespace(trackio_bucket_id="someone/bucket", hub_private_repo=True)
    teller.on_train_begin(given, TrainerState(), TrainerControl())  # pyright: ignore[reportArgumentType]
    trackio.space = None  # transformers has ended the run
    assert "trackio" in teller.tell(AT, tmp_path)
    assert trackio.calls[0] == ("init", "p", "n", "must", "someone/runs", "someone/bucket", True)


def test_the_token_table_is_a_table_and_the_trace_an_artefact(started: tuple, tmp_path: Path):
    teller, wandb, trackio = started
    for step in (1, 7):
        write_trace(tmp_path, step, random.Random(0), responses=2, tokens=3)
    assert teller.tell([], tmp_path) == ["wandb", "trackio"]
    [entry] = wandb.logged
    table = entry["trace/tokens"]
    assert entry["train/global_step"] == 7 and len(table.data) == 6 and len(table.columns) == len(table.data[0])
    assert table.data[1][table.columns.index("token")] == " w1"  # the second token of the synthetic trace
    [artefact] = wandb.artefacts
    assert (artefact.name, artefact.type) == ("trace-r1", "trace")
    assert artefact.files == ["step-00001.parquet", "step-00007.parquet"]
    [(_, step, said)] = [call for call in trackio.calls if call[0] == "log"]
    assert step == 7 and said["trace/tokens"].rows == 6


def test_a_tracker_that_does_not_run_is_not_told_and_one_that_fails_ends_no_run(
    started: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    teller, wandb, trackio = started
    monkeypatch.setattr(wandb.run, "log", lambda _: 1 / 0)
    with caplog.at_level(logging.WARNING):
        assert teller.tell(AT, tmp_path) == ["trackio"]
    assert "wandb could not be told before and after: division by zero" in caplog.text
    monkeypatch.setattr(wandb, "run", None)
    monkeypatch.setattr(trackio.context_vars.current_run, "get", lambda: None)
    later = TellTrackers()
    later.on_train_begin(GIVEN, TrainerState(), TrainerControl())  # pyright: ignore[reportArgumentType]
    assert later.tells == {} and tell_trackers([], tmp_path, BEFORE, AFTER, 20) == []


def test_a_run_of_the_command_line_tells_its_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    told: list = []
    monkeypatch.setattr(TellTrackers, "tell", lambda _, measured, folder: told.extend(measured))
    small = ["--task", "coins", "--task_kwargs", '{"prompts": 16, "eval_prompts": 2}', "--max_steps", "1"]
    small += ["--per_device_train_batch_size", "16", "--steps_per_generation", "1", "--num_generations", "8"]
    small += ["--use_cpu", "true", "--report_to", "none", "--save_final", "false"]
    assert cli.main(["grpo", *small, "--eval_samples", "2", "--output_dir", str(tmp_path / "out")]) == 0
    means = [json.loads((tmp_path / "out" / "summary.json").read_text())[when]["means"] for when in ("before", "after")]
    assert [step for step, _ in told] == [0, 1]
    assert [values["held_out/pass@1"] for _, values in told] == [of["pass@1"] for of in means]
