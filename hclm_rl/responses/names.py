"""What a name means: the object at a dotted path, `my_lab.rewards.length`; the known names most like a wrong one

Looking up a dotted path imports its module, which runs it. A recipe's words are not trusted with that unless the user
says so on the command line: inside `custom_code(False)` only names that the library itself defines are looked up.
"""

import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

FLAG = "--allow_custom_code"
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
LIBRARY = "hclm_rl"
# what a name of the library may stand for, and where such things are: a function of it that does something else is none
ROOMS = {
    "entropy term": ("terms", "types"),
    "function that finds answers": ("answers", "responses.answers"),
    "reward function": ("testbed",),
    "rollout": ("rollouts",),
    "task": ("testbed",),
}

_is_allowed: ContextVar[bool] = ContextVar("is_custom_code_allowed", default=True)


@contextmanager
def custom_code(is_allowed: bool) -> Iterator[None]:
    """Whether names outside the library are looked up inside; outside of any, as in Python, they are."""
    before = _is_allowed.set(is_allowed)
    try:
        yield
    finally:
        _is_allowed.reset(before)


def is_of_library(path: str, what: str) -> bool:
    """Whether the name lies where the library keeps such things."""
    rooms = [f"{LIBRARY}.{room}" for room in ROOMS.get(what, ())]
    return any(path.startswith(f"{room}.") for room in rooms)


def refuse_custom_code(path: str, what: str) -> None:
    """Before anything at the path is imported: a name that is not the library's, where custom code is not allowed."""
    if not (_is_allowed.get() or is_of_library(path, what)):
        raise ValueError(
            f"the {what} '{path}' is code from outside the library, which a recipe may run only with {FLAG} on the "
            "command line: read it first, then add the flag"
        )


def look_here() -> None:
    """A user's own files lie in the folder where the command runs, which a console script does not search by itself."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def find(path: str, what: str) -> object:
    """The object at `module.name`; a ValueError says that there is no `what`, and why."""
    if not DOTTED.fullmatch(path):
        raise ValueError(f"no {what} at '{path}': a dotted path is names with dots between, as in my_lab.floor.Floor")
    refuse_custom_code(path, what)
    look_here()
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no {what} at '{path}': {error}") from error
    except Exception as error:  # a stranger's module may raise anything while it is imported
        raise ValueError(f"no {what} at '{path}': its module ends in {type(error).__name__}: {error}") from error
    # what a module of the library imported for itself is not the library's: `hclm_rl.testbed.coins.random`
    if not _is_allowed.get() and not str(getattr(found, "__module__", "")).startswith(f"{LIBRARY}."):
        raise ValueError(f"no {what} at '{path}': what is there is not the library's own")
    return found


def find_function(path: str, what: str) -> Callable:
    """As `find`, of what can be called. Refuses what cannot be called."""
    found = find(path, what)
    if not callable(found):
        raise ValueError(f"no {what} at '{path}': it is {found!r}, which cannot be called")
    return found


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """`known`, the most like `name` first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def nearest(name: object, known: Iterable[str]) -> str:
    """The three of `known` most like `name`, for a sentence; YAML reads some names as numbers or booleans."""
    return ", ".join(nearest_first(str(name)[:80], known)[:3])
