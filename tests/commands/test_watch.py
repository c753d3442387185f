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
