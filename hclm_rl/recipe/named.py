"""A frozen dataclass from a recipe's words, `{name: {hyper-parameter: value}}`; every mistake is one sentence."""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..responses.names import nearest
from .values import fits, options_of, shown, stored, written


def named_entry(entry: object, key: str) -> tuple[str, dict[str, Any]]:
    """(name, hyper-parameters) of `name`, `{name: {...}}`, or these as JSON; `key` is what the recipe calls it.

    Refuses any other form.
    """
    if isinstance(entry, str) and entry.lstrip()[:1] == "{":
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{key} on the command line is a name or JSON: {error}: {shown(entry)}") from error
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise ValueError(f"{key} is a name or one {{name: {{hyper-parameter: value}}}}, got {shown(entry)}")
    [(name, given)] = entry.items()
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(each, str) for each in given)):
        raise ValueError(f"{key}: the hyper-parameters of {name} are a mapping of names to values, got {shown(given)}")
    return str(name), dict(given or {})


def class_name(name: str) -> str:
    """`em_inf` is EmInf."""
    return "".join(word.capitalize() for word in name.split("_"))


def refuse_unknown(name: str, known: Sequence[str], key: str) -> None:
    """A ValueError for a name that is not known; `key` is what the recipe calls it."""
    if name not in known:
        raise ValueError(f"{key}: unknown name '{name:.80}'; it must be one of {', '.join(known)}")


def filled(kind: type, name: str, given: Mapping[str, Any], without: Sequence[str] = ()) -> Any:
    """An object of the dataclass with these fields; those in `without` are not the recipe's to give.

    Refuses unknown fields, missing ones and wrong values.
    """
    annotations = typing.get_type_hints(kind)
    fields = [each for each in dataclasses.fields(kind) if each.init and each.name not in without]
    known = [each.name for each in fields]
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{name} has no hyper-parameter '{key:.80}'; the nearest are {nearest(key, known)}")
        hint = ""
        if isinstance(value, str) and float in options_of(annotations[key]):
            hint = "; YAML reads 1e-6 as text, write 1.0e-6"
        if not fits(value, annotations[key]):
            came = f"{type(value).__name__} {shown(value)}"
            raise ValueError(f"{name}: {key} must be {written(annotations[key])}, got {came}{hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: {key} must be finite, got {value}")
    missing = [
        each.name
        for each in fields
        if each.default is each.default_factory is dataclasses.MISSING and each.name not in given
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; got {', '.join(given) or 'nothing'}")
    values = {key: stored(value, annotations[key]) for key, value in given.items()}
    if without:
        return lambda **more: kind(**values, **more)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
