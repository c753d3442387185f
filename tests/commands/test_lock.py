"""One run at a time in a folder; a dead owner's lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hclm_rl.commands.lock import LOCK_NAME, Owner, RunLock


def locked_by(folder: Path, **changes: object) -> Path:
    file = folder / LOCK_NAME
    file.write_text(json.dumps(vars(Owner.this()) | changes))
    return file


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield {"process": process.pid, "started": psutil.Process(process.pid).create_time()}
    process.kill()
    process.wait()


def test_a_free_folder_is_taken_and_let_go(tmp_path: Path):
    lock = RunLock(tmp_path / "runs" / "one")
    lock.take()
    assert json.loads(lock.file.read_text())["process"] == os.getpid()
    assert [each.name for each in lock.folder.iterdir()] == [LOCK_NAME]
    lock.release()
    assert not lock.folder.exists()  # nothing was written
    lock.take()
    (lock.folder / "log.jsonl").touch()
    lock.release()
    assert [each.name for each in lock.folder.iterdir()] == ["log.jsonl"]


def test_another_living_process_keeps_it(tmp_path: Path, sleeper: dict):
    file = locked_by(tmp_path, **sleeper)
    with pytest.raises(ValueError) as error:
        RunLock(tmp_path).take()
    assert str(error.value) == (
        f"another run is at work in {tmp_path} (process {sleeper['process']} on {socket.gethostname()}): take another "
        f"output_dir, wait for its end, or remove {file} if it has ended"
    )
    assert [each.name for each in tmp_path.iterdir()] == [LOCK_NAME]


def test_one_that_has_ended_does_not(tmp_path: Path):
    process = subprocess.Popen(["true"])
    process.wait()
    locked_by(tmp_path, process=process.pid)
    RunLock(tmp_path).take()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["process"] == os.getpid()


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path, sleeper: dict):
    locked_by(tmp_path, process=sleeper["process"], started=time.time() - 86400)
    RunLock(tmp_path).take()


def test_of_another_host_it_is_not_known(tmp_path: Path):
    locked_by(tmp_path, host="elsewhere", process=1)
    with pytest.raises(ValueError, match=r"\(process 1 on elsewhere\)"):
        RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "here"}'])
def test_a_lock_that_says_nothing_is_named(content: str, tmp_path: Path):
    (tmp_path / LOCK_NAME).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}/{LOCK_NAME} cannot be read: remove it if no other run is at"):
        RunLock(tmp_path).take()


def test_the_other_processes_of_a_run_take_none(tmp_path: Path, sleeper: dict):
    file = locked_by(tmp_path, **sleeper)
    lock = RunLock(tmp_path, is_held=False)
    lock.take()
    lock.release()
    assert file.exists()


def test_a_run_that_is_refused_lets_go(tmp_path: Path):
    lock = RunLock(tmp_path)
    with pytest.raises(KeyError), lock.until_error():
        raise KeyError
    assert not lock.file.exists()
