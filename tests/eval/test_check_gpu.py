"""The list, the lines and the page of what a GPU owner runs; on the CPU the checks themselves."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

import check_gpu
from check_gpu import CHECKS, Check, Verdict, apart, main, page, run_all, versions

EVAL = Path(check_gpu.__file__).parent


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "verdict", "said"),
    [
        ("print('loading'); print('PASS 3 terms'); print('bye')", "PASS", "3 terms"),
        ("print('SKIP vllm is not installed')", "SKIP", "vllm is not installed"),
        ("print('PASS too early'); raise ValueError('NaN')", "FAIL", "exit status 1, see {log}: ValueError: NaN"),
        ("import os; os._exit(3)", "FAIL", "exit status 3, see {log}: nothing was printed"),
        ("print('it only talks')", "FAIL", "exit status 0, see {log}: it only talks"),
    ],
)  # fmt: skip
def test_a_checks_last_verdict_is_its_own_unless_it_failed(code: str, verdict: str, said: str, tmp_path: Path):
    log = tmp_path / "log.txt"
    found = apart("siren", python(code), 20, log)
    assert (found.name, found.verdict, found.said) == ("siren", verdict, said.format(log=log))


def test_a_check_that_hangs_is_ended_with_what_it_started(tmp_path: Path):
    sleeps = f"[{sys.executable!r}, '-c', 'import time; time.sleep(99)']"
    code = f"import subprocess, time; print('pid', subprocess.Popen({sleeps}).pid, flush=True); time.sleep(99)"
    found = apart("hangs", python(code), 3.0, tmp_path / "x")
    told, pid = found.said.rsplit(" ", 1)
    assert (found.verdict, told) == ("FAIL", f"not done after 3 s; the end of {tmp_path / 'x'}: pid")
    end = time.monotonic() + 20  # the signal is sent; on a busy machine it is a while until it is acted on
    while is_running(int(pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(int(pid))


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_one_that_fails_takes_no_other_with_it_and_time_runs_out(tmp_path: Path):
    codes = {"a b": "raise ValueError('no')", "c": "print('PASS yes')", "d": "print('PASS never')"}
    checks = [Check(name=name, asks="", seconds=20) for name in codes]
    lines: list[str] = []
    enough = run_all(checks[:2], lambda check: python(codes[check.name]), tmp_path, 1.0, lines.append)
    assert [each.verdict for each in enough] == ["FAIL", "PASS"] and (tmp_path / "a_b.txt").is_file()
    assert [line[:12] for line in lines] == ["FAIL  a b   ", "PASS  c     "] and lines[1].endswith("s  yes")
    [late] = run_all(checks[2:], lambda check: python(codes[check.name]), tmp_path, 0.1, lines.append)
    assert (late.verdict, late.said) == ("SKIP", "the 0.1 minutes are over")


def test_the_whole_is_listed_and_fits_into_its_time(capsys: pytest.CaptureFixture):
    assert main(["--list"]) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == [check.name for check in CHECKS]
    with pytest.raises(SystemExit):
        main(["--only", "no such check"])


@pytest.mark.parametrize(("verdicts", "status"), [("PASS SKIP", 0), ("PASS FAIL SKIP", 1)])
def test_the_status_is_1_where_one_failed_and_the_page_has_all(
    verdicts: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    found = [
        Verdict(name=CHECKS[i].name, verdict=each, said="a | b", seconds=2.0) for i, each in enumerate(verdicts.split())
    ]
    monkeypatch.setattr(check_gpu, "run_all", lambda *_: found)
    out = tmp_path / "gpu.md"
    assert main(["--device", "cpu", "--folder", str(tmp_path / "runs"), "--out", str(out)]) == status
    text = out.read_text()
    counts = [verdicts.count(kind) for kind in ("PASS", "FAIL", "SKIP")]
    assert f"{counts[0]} passed, {counts[1]} failed, {counts[2]} were not run" in text
    assert f"| PASS | device | 2 | {CHECKS[0].asks} | a \\| b |" in text
    assert "- trl: " in text and "torch: " in capsys.readouterr().out


def test_versions_are_those_of_the_machine():
    import torch
    import trl

    found = versions()
    assert (found["torch"], found["trl"]) == (torch.__version__, trl.__version__) and found["devices"]
    assert page([], {}, "x", 0.0).startswith("# What a GPU said")


def test_every_check_of_the_list_is_written():
    from gpu_checks import CHECKS as written

    assert list(written) == [check.name for check in CHECKS]


@pytest.mark.slow  # half a minute each on an idle core
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_on_a_cpu_each_check_passes_or_says_why_not(check: Check, tmp_path: Path):
    line = [sys.executable, "-W", "ignore", str(EVAL / "gpu_checks.py"), check.name, "--device", "cpu", "--toy"]
    done = subprocess.run([*line, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stdout.splitlines() if line.startswith(("PASS ", "SKIP "))]
    is_for_gpus = check.name in ("fsdp2", "vllm colocate", "vllm cure", "vllm server")
    assert told[-1].startswith("SKIP " if is_for_gpus else "PASS ")
