"""`hclm-rl watch`: what it prints, its exit status, what it follows, and that it needs no torch."""

import json
import math
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import pytest

from hclm_rl.commands.cli import main


def written(path: Path, entropies: list[float], name: str = "entropy", **more: float) -> Path:
    path.write_text("".join(json.dumps({"step": i, name: h, **more}) + "\n" for i, h in enumerate(entropies, start=1)))
    return path


def falling(steps: int, tau: float = 100) -> list[float]:
    return [math.exp(-i / tau) for i in range(steps)]


def test_a_healthy_log_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["watch", str(written(tmp_path / "log.jsonl", [0.5] * 50))]) == 0
    assert capsys.readouterr().out == "50 entries, at step 50 the entropy: healthy\n"


def test_every_change_is_told_and_an_alarm_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["watch", str(written(tmp_path / "log.jsonl", falling(200)))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": the entropy: ")[2].split()[0].rstrip(";") for line in lines[:-1]] == [
        "warning",
        "collapsing",
        "collapsed",
    ]
    assert "at its pace collapsed in" in lines[1] and lines[-1] == "200 entries, at step 200 the entropy: collapsed"


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["watch", "--json", str(written(tmp_path / "log.jsonl", falling(200)))]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["number"], found["step"], found["entries"]) == ("collapsed", 4, 200, 200)
    assert [change["state"] for change in found["changes"]] == ["warning", "collapsing", "collapsed"]


def test_a_name_is_given_by_a_flag_and_missing_ones_are_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = written(tmp_path / "log.jsonl", [0.5] * 20, name="my/policy_entropy", reward=1.0)
    assert main(["watch", str(file)]) == 2
    assert (
        "no entropy in" in (said := capsys.readouterr().err) and "--entropy NAME; the log has my/policy_entropy" in said
    )
    assert main(["watch", str(file), "--entropy", "my/policy_entropy"]) == 0
    (tmp_path / "notes.txt").write_text("nothing of the kind\n")
    assert main(["watch", str(tmp_path / "notes.txt")]) == 2
    assert "holds no entry of a log that is known" in capsys.readouterr().err
    assert main(["watch", str(file), "--every", "0"]) == 2


def test_lines_of_the_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    lines = "".join(
        f"(pid=3) step:{i} - actor/entropy:{h:.4f} - actor/lr:1e-06\n" for i, h in enumerate(falling(200), 1)
    )
    monkeypatch.setattr(sys, "stdin", StringIO(lines))
    assert main(["watch", "-"]) == 1
    assert "the entropy: collapsed" in capsys.readouterr().out


def test_of_two_runs_in_one_file_the_last_is_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = written(tmp_path / "log.jsonl", [0.5] * 300)
    second = written(tmp_path / "second.jsonl", falling(200)).read_text()
    file.write_text(file.read_text() + second)
    assert main(["watch", str(file)]) == 1
    told = capsys.readouterr()
    assert told.out.endswith("200 entries, at step 200 the entropy: collapsed\n")
    assert told.err == "the steps begin anew: of 2 runs the last is told\n"
    # looked at again, it is no third one
    assert main(["watch", str(file), "--json", "--follow", "--every", "0.01", "--idle", "0.03"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["entries"] == 200 and found["notes"] == ["the steps begin anew: of 2 runs the last is told"]


def test_steps_that_come_again_are_passed_over_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A run that went on from its checkpoint at step 80."""
    file = written(tmp_path / "log.jsonl", falling(100))
    again = "".join(json.dumps({"step": i, "entropy": h}) + "\n" for i, h in enumerate(falling(200), 1) if i > 80)
    file.write_text(file.read_text() + again)
    assert main(["watch", "--json", str(file)]) == 1
    resumed = json.loads(capsys.readouterr().out)
    assert resumed.pop("notes") == ["20 entries were passed over: their steps are not above those before them"]
    assert main(["watch", "--json", str(written(file, falling(200)))]) == 1
    whole = json.loads(capsys.readouterr().out)
    assert whole.pop("notes") == [] and resumed == whole


@pytest.mark.parametrize("entropy", ["NaN", "-0.5", '"high"', "1" + "0" * 400, "null", "[0.5]"])
def test_what_is_no_entropy_is_no_healthy_run(entropy: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "log.jsonl"
    file.write_text("".join(f'{{"step": {i}, "entropy": {entropy}}}\n' for i in range(1, 30)))
    assert main(["watch", str(file)]) == 2
    assert capsys.readouterr().err.endswith("log.jsonl has an entropy that is a number from 0 on, and a step\n")


def test_a_stream_ends_with_the_alarm_that_ends_the_run_and_may_hold_any_bytes(tmp_path: Path):
    lines = b"\xff\xfe a, b\n" + b"".join(
        f"step:{i} - actor/entropy:{h:.4f}\n".encode() for i, h in enumerate(falling(200), 1)
    )
    script = "import sys; from hclm_rl.commands.cli import main; sys.exit(main(['watch', '-', '--follow']))"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(lines)
        run.stdin.flush()  # and stays open
        assert run.wait(timeout=120) == 1
        assert b"the entropy: collapsed" in run.stdout.read()


def test_it_waits_for_a_run_that_has_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "run"

    def begin() -> None:
        time.sleep(0.1)
        folder.mkdir()
        time.sleep(0.1)
        written(folder / "log.jsonl", [0.5] * 30, max_steps=30)

    writer = threading.Thread(target=begin)
    writer.start()
    assert main(["watch", str(folder), "--follow", "--every", "0.02", "--idle", "30"]) == 0
    writer.join()
    assert capsys.readouterr().err.count(f"no log at {folder}: waiting for it") == 1
    assert main(["watch", str(tmp_path / "never"), "--follow", "--every", "0.01", "--idle", "0.03"]) == 2
    assert f"no log at {tmp_path / 'never'}" in capsys.readouterr().err


def test_it_follows_a_growing_file_to_the_alarm_that_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    file, all_of_it = tmp_path / "log.jsonl", falling(300)
    written(file, all_of_it[:50])

    def grow() -> None:
        for end in (100, 300):
            time.sleep(0.1)
            written(file, all_of_it[:end])

    writer = threading.Thread(target=grow)
    writer.start()
    status = main(["watch", str(file), "--follow", "--every", "0.02", "--idle", "5"])
    writer.join()
    assert status == 1 and "the entropy: collapsed" in capsys.readouterr().out
    # a run at its last step, and one that does not grow, are not waited for
    assert main(["watch", str(written(file, [0.5] * 30, max_steps=30)), "--follow"]) == 0
    assert main(["watch", str(written(file, [0.5] * 30)), "--follow", "--every", "0.01", "--idle", "0.03"]) == 0


def test_five_thousand_steps_take_under_five_seconds_and_no_torch(tmp_path: Path):
    file = written(tmp_path / "log.jsonl", falling(5000, tau=5000), reward=0.5, loss=0.1)
    script = (
        "import sys, time; from hclm_rl.commands.cli import main; start = time.process_time();"
        f"main(['watch', {str(file)!r}]); spent = time.process_time() - start;"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules), 'imported'; print(spent)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "5000 entries" in run.stdout and float(run.stdout.splitlines()[-1]) < 5
