"""`--quiet`, with every verb: what was asked and what went wrong, and nothing else."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout

QUIET = "--quiet"
ASKED = "HCLM_RL_QUIET"  # tells the processes that a run starts
SILENT = {ASKED: "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def is_asked(line: Sequence[str]) -> bool:
    return QUIET in line or ASKED in os.environ


@contextmanager
def quiet(*, hides_output: bool) -> Iterator[None]:
    """No progress bars, warnings and log messages below errors; of a verb that trains, no log lines either.

    Mistakes still go to stderr, and every file is written.
    """
    before, disabled = {name: os.environ.get(name) for name in SILENT}, logging.root.manager.disable
    os.environ.update(SILENT)
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stdout(nowhere) if hides_output else nullcontext():
                yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
