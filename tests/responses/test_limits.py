"""What a judgement may cost, and what is left when it cost more."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hclm_rl.responses import limits
from hclm_rl.responses.limits import OverLimits, within_limits


def double(number: int) -> int:
    return 2 * number


def spin() -> None:
    while True:
        pass


def spin_in_c() -> int:
    return len(str(7 ** (10**8)))  # seconds inside one call, where a Python signal handler would not run


def sleep() -> None:
    time.sleep(60)


def eat() -> int:
    return len(bytearray(limits.MEMORY))


def fall() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> None:
    os._exit(3)


def fail() -> None:
    raise KeyError("no such thing")


def sink() -> None:
    sink()


@pytest.mark.parametrize("function", [spin, spin_in_c, eat, fall, sink])
def test_what_goes_over_a_limit_is_over_and_the_next_is_answered(function, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    with pytest.raises(OverLimits):
        within_limits(function)
    assert within_limits(double, 21) == 42


def test_a_call_that_waits_has_a_clock_too(monkeypatch):
    assert within_limits(double, 1) == 2
    monkeypatch.setattr(limits, "WALL_SECONDS", 0.2)
    with pytest.raises(OverLimits):
        within_limits(sleep)


def test_threads_get_their_own_answers_and_limits(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    found: dict[int, object] = {}

    def ask(number: int) -> None:
        try:
            found[number] = within_limits(spin) if number == 3 else within_limits(double, number)
        except OverLimits:
            found[number] = "over"

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0, 1: 2, 2: 4, 3: "over", 4: 8, 5: 10}


def test_a_mistake_is_not_taken_for_a_limit():
    with pytest.raises(RuntimeError, match=r"judging failed in tests.responses.test_limits.fail: KeyError: 'no such"):
        within_limits(fail)
    with pytest.raises(RuntimeError, match="the process that judges answers ended with exit status 3"):
        within_limits(leave)


def test_a_forked_process_asks_its_own():
    assert within_limits(double, 1) == 2
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, json.dumps(within_limits(double, 4)).encode())
        limits._end()
        os._exit(0)
    assert within_limits(double, 3) == 6
    assert os.read(read, 10) == b"8"
    assert os.waitpid(child, 0)[1] == 0


def test_a_script_without_a_guard_is_not_run_twice(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from hclm_rl.responses.limits import within_limits\n"
        "from tests.responses.test_limits import double\n"
        "print(within_limits(double, 2))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("started\n4\n", "", 0)
