"""Judging within limits: in a process of its own, whose clock and memory the operating system watches.

What a model writes can keep sympy busy for days (9^{9^9}). A signal in this process would stop that in the main thread
only, and not inside C. The process is started on first use; it imports what it needs and nothing of the caller's
script, and forks the one that computes, so that the next one is there at once where the clock has ended it.
"""

import atexit
import contextlib
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe

SECONDS = 3.0  # of processor time a call, so that a busy machine judges as an idle one does
WALL_SECONDS = 120.0  # for what waits and does not compute
MEMORY = 4 * 2**30  # bytes of address space
DIGITS = 1000  # in a row, of an answer that is read as mathematics
LENGTH = 4000  # characters, of an answer, or of the end of a response in which one is looked for


class OverLimits(Exception):
    """It took too long or too much memory; that says nothing about what it would have found."""


class Unjudged(str):
    """The text of an answer that went over a limit: wrong, told apart from other answers by its text, and counted."""


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        command = f"from {__name__} import _serve; _serve({theirs.fileno()}, {MEMORY})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the one who asked
        )
        theirs.close()

    def ask(self, question: str) -> dict:
        """Raises EOFError or an OSError where the process ends before it has answered."""
        self.connection.send_bytes(question.encode())
        if not self.connection.poll(WALL_SECONDS):
            return {"over": f"{WALL_SECONDS:g} s", "late": True}
        return json.loads(self.connection.recv_bytes())

    def end(self) -> int:
        """Its exit status."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=1)  # a closed pipe ends it, unless it computes
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


def within_limits(function: Callable, *arguments: object) -> object:
    """`function(*arguments)`, found by its name in the other process; arguments and result are JSON values.

    Raises OverLimits after SECONDS of processor time, at MEMORY, or where the computation takes the process down.
    """
    question = json.dumps([function.__module__, function.__qualname__, arguments, SECONDS])
    with _lock:
        answer = _asked(question)
    if "found" in answer:
        return answer["found"]
    if "over" in answer:
        raise OverLimits(answer["over"])
    raise RuntimeError(f"judging failed in {function.__module__}.{function.__qualname__}: {answer['error']}")


def _asked(question: str) -> dict:
    global _worker
    if _worker is None:
        _worker = _Worker()
    is_done = False
    try:
        answer = _worker.ask(question)
        is_done = "late" not in answer
        return answer
    except (EOFError, OSError) as error:  # it did not come up, or a judge called exit
        is_done, status, _worker = True, _worker.end(), None
        raise RuntimeError(f"the process that judges answers ended with exit status {status}") from error
    finally:
        if not is_done:  # a late answer would be taken for that of the next question
            _end()


@atexit.register
def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


def _forget() -> None:
    """A forked process starts its own: two that read from one pipe would take each other's answers."""
    global _worker, _lock
    _lock = threading.Lock()
    if _worker is not None:
        _worker.process.returncode = 0  # not this process's child, so nothing that it could wait for
        _worker.connection.close()
        _worker = None


os.register_at_fork(after_in_child=_forget)


def _serve(file: int, memory: int) -> None:
    """What the other process runs: it waits for the one that computes, and says so where a signal has ended that."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # of the profiling clock; ends what computes, in C code too
    logging.disable(logging.WARNING)
    connection = Connection(file)
    with contextlib.suppress(ImportError):  # imports and first calls are not on the clock
        from math_verify import parse

        parse("$1$ or 1", parsing_timeout=None)  # pyright: ignore[reportArgumentType]  (None: no clock of its own)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
    while True:
        child = os.fork()
        if child == 0:
            _answer_all(connection)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status >= 0:
            os._exit(status)
        connection.send_bytes(json.dumps({"over": signal.Signals(-status).name}).encode())


def _answer_all(connection: Connection) -> None:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            module, name, arguments, seconds = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(_answer(module, name, arguments, seconds)).encode())


def _answer(module: str, name: str, arguments: list, seconds: float) -> dict:
    try:
        function = getattr(importlib.import_module(module), name)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            return {"found": function(*arguments)}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (MemoryError, RecursionError) as error:
        return {"over": type(error).__name__}
    except Exception as error:  # whatever it is, the one who asked has to say it
        return {"error": f"{type(error).__name__}: {error}"}
