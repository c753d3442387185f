"""What a task gives to training and to evaluation, and how one is found by name."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets

from hclm_rl.responses.names import find_function, is_of_library, nearest

PACKAGE = "hclm_rl.testbed"

Row = dict  # a row of a dataset: column -> value


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts with an exact verifier: enough for TRL's trainers and for `evaluate`.

    `is_correct` must be a function of the answer: two completions of one row with the same answer are both right or
    both wrong, and a completion without an answer is wrong.
    """

    train_dataset: datasets.Dataset  # column "prompt" (str), and the columns that the rewards and the verifier read
    eval_dataset: datasets.Dataset  # same columns, other problems
    reward_funcs: list[Callable[..., Sequence[float | None]]]  # TRL's signature: (prompts, completions, **columns)
    answer: Callable[[Row, str], str | None]  # (row, completion text) -> canonical answer, None if it does not parse
    is_correct: Callable[[Row, str], bool]  # (row, completion text)
    max_completion_length: int  # tokens, those that tools write included
    environment: Callable[[], object] | None = None  # of one response: TRL's environment_factory; its methods are tools


def find_task(name: str, **kwargs: object) -> Task:
    """The task of `make_task(**kwargs)` in hclm_rl/testbed/<name>.py, or of the function at a dotted path.

    Refuses an unknown name, and a function that gives no Task.
    """
    if "." in name:
        if is_of_library(name, "task") and not name.endswith(".make_task"):
            raise ValueError(f"no task {name!r}: the library's tasks are made by functions called make_task")
        try:
            make_task = find_function(name, "task")
        except ValueError as error:
            raise ValueError(f"no task {name!r}: {error}") from error
    else:
        is_module = name in {module.name for module in pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)}
        make_task = getattr(importlib.import_module(f"{PACKAGE}.{name}"), "make_task", None) if is_module else None
    if make_task is None:
        raise ValueError(
            f"no task {name!r}; the nearest are {nearest(name, known_tasks())}; `hclm-rl grpo --help` lists all; "
            "or give the dotted path of a function that returns a Task"
        )
    task = make_task(**kwargs)
    if not isinstance(task, Task):
        raise TypeError(f"{name} must return a hclm_rl.testbed.Task, got {type(task).__name__}")
    return task


def known_tasks() -> list[str]:
    """The names of the tasks in hclm_rl/testbed."""
    modules = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    found = [importlib.import_module(f"{PACKAGE}.{module.name}") for module in modules]
    makers = [vars(module)["make_task"] for module in found if "make_task" in vars(module)]
    return sorted({maker.__module__.rpartition(".")[2] for maker in makers})  # where defined, not where imported
