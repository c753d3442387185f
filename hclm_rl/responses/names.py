"""What a name means: the object at a dotted path, `my_lab.rewards.length`; the known names most like a wrong one"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable


def look_here() -> None:
    """A user's own files lie in the folder where the command runs, which a console script does not search by itself."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def find(path: str, what: str) -> object:
    """The object at `module.name`; a ValueError says that there is no `what`, and why."""
    look_here()
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"no {what} at '{path}': {error}") from error


def find_function(path: str, what: str) -> Callable:
    """As `find`, of what can be called."""
    found = find(path, what)
    if not callable(found):
        raise ValueError(f"no {what} at '{path}': it is {found!r}, which cannot be called")
    return found


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """`known`, the most like `name` first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def nearest(name: object, known: Iterable[str]) -> str:
    """The three of `known` most like `name`, for a sentence; YAML reads some names as numbers or booleans."""
    return ", ".join(nearest_first(str(name), known)[:3])
