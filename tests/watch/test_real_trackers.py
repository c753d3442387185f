"""The trackers themselves, offline: what a run of the command line told them is read back from their files."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # and each needs its package

ALARM = ("entropy collapsed", "step 1: a test")
SCRIPT = f"""
import sys
from hclm_rl.commands import cli
from hclm_rl.watch.alerts import alert
from hclm_rl.watch.callback import CollapseCallback
own = CollapseCallback.on_log
def on_log(self, args, state, *more, **kwargs):
    if state.global_step == 1:
        print("told", alert({ALARM[0]!r}, {ALARM[1]!r}, is_over=True))
    own(self, args, state, *more, **kwargs)
CollapseCallback.on_log = on_log
sys.exit(cli.main(sys.argv[1:]))
"""
RUN = ["--task", "coins", "--task_kwargs", '{"prompts": 16, "eval_prompts": 2}', "--max_steps", "2"]
RUN += [
    "--per_device_train_batch_size",
    "16",
    "--steps_per_generation",
    "1",
    "--num_generations",
    "8",
    "--eval_samples",
]
RUN += ["2", "--use_cpu", "true", "--save_final", "false", "--trace_every", "1"]
RUN += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--bf16", "false"]


def run_with(tracker: str, folder: Path) -> tuple[list[dict[str, float]], str]:
    """(before and after as its summary says them, what it printed)"""
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "grpo", *RUN, "--report_to", tracker, "--output_dir", str(folder / "out")],
        env={**os.environ, **offline, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return [summary[when]["means"] for when in ("before", "after")], done.stdout + done.stderr


def tokens_of(folder: Path) -> int:
    """Rows of the last traced step."""
    import pyarrow.parquet as parquet

    return parquet.read_metadata(folder / "out" / "trace" / "step-00002.parquet").num_rows


def test_tensorboard_has_before_and_after(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    means, _ = run_with("tensorboard", tmp_path)
    found: dict[str, list] = {}
    for file in (tmp_path / "out").rglob("events.out.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, []).extend((each.step, each.value) for each in events.Scalars(name))
    for name in ("pass@1", "token_entropy"):
        assert dict(found[f"held_out/{name}"]) == pytest.approx({0: means[0][name], 2: means[1][name]})
    assert [step for step, _ in found["train/entropy"]] == [1, 2]


def records(file: Path) -> Iterator[bytes]:
    """Of a W&B run's file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of its parts
            yield part
            part = b""


def test_wandb_has_before_and_after_the_alert_the_table_and_the_trace(tmp_path: Path):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    means, said = run_with("wandb", tmp_path)
    assert "told ['wandb']" in said
    [file] = [each for each in tmp_path.rglob("*.wandb") if not each.parent.is_symlink()]
    logged, alerts, artefacts = [], [], {}
    for each in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(each)
        if record.HasField("history"):
            items = record.history.item
            logged.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif record.HasField("alert"):
            alerts.append((record.alert.title, record.alert.text, record.alert.level))
        elif record.HasField("artifact"):
            artefacts[record.artifact.type] = len(record.artifact.manifest.contents)
    for name in ("pass@1", "token_entropy"):
        measured = [(of["train/global_step"], of[f"held_out/{name}"]) for of in logged if f"held_out/{name}" in of]
        assert measured == [(0, means[0][name]), (2, means[1][name])]
    assert alerts == [(*ALARM, "ERROR")]
    [rows] = [of["trace/tokens/nrows"] for of in logged if "trace/tokens/nrows" in of]
    assert rows == tokens_of(tmp_path) and artefacts["trace"] == 2  # both steps were traced


def test_trackio_has_before_and_after_the_alert_and_the_table(tmp_path: Path):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    means, said = run_with("trackio", tmp_path)
    assert "told ['trackio']" in said, version("trackio")
    [file] = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as base:
        rows = base.execute("select step, metrics from metrics order by id").fetchall()
        alerts = base.execute("select title, text, level from alerts").fetchall()
        runs = set(base.execute("select run_name from metrics"))
    logged = [(step, json.loads(of)) for step, of in rows]
    for name in ("pass@1", "token_entropy"):
        measured = [(step, of[f"held_out/{name}"]) for step, of in logged if f"held_out/{name}" in of]
        assert measured == [(0, means[0][name]), (2, means[1][name])]
    [(step, table)] = [(step, of["trace/tokens"]) for step, of in logged if "trace/tokens" in of]
    assert step == 2 and len(table["_value"]) == tokens_of(tmp_path)
    assert alerts == [(*ALARM, "error")]
    assert len(runs) == 1  # the run that was, not one beside it
