"""Whether a value of a recipe may stand where a type is declared, how it is held there, and the type in words."""

import reprlib
import types
import typing
from typing import Any

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 120
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxtuple = 4, 12, 12, 12


def shown(value: object) -> str:
    """A value in a sentence: not all of it, where it is long."""
    try:
        return SHORT.repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return "a number of thousands of digits"


def is_mixed(annotation: object) -> bool:
    """Whether a mapping is meant, and text may stand for it."""
    options = options_of(annotation)
    return str in options and any(each is dict or typing.get_origin(each) is dict for each in options)


def options_of(annotation: object) -> tuple[object, ...]:
    """The parts of a union, or the annotation alone."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def fits(value: object, annotation: object) -> bool:
    """Whether a YAML value may stand where `annotation` is declared; an int stands for a float, a bool for neither."""
    for option in options_of(annotation):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is typing.Literal and value in arguments:
            return True
        if origin in (tuple, list) and isinstance(value, (list, tuple)):
            is_fixed = origin is tuple and arguments and arguments[-1] is not ...
            items = arguments if is_fixed else (arguments[:1] or (object,)) * len(value)
            if len(items) == len(value) and all(map(fits, value, items)):
                return True
        elif isinstance(origin, type) and isinstance(
            value, origin
        ):  # a mapping, a function: its parts are not looked at
            return True
        if option is Any:
            return True
        if option is type(None) and value is None:
            return True
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return True
        if isinstance(option, type) and option not in (int, float) and isinstance(value, option):
            return True
    return False


def stored(value: object, annotation: object) -> object:
    """A YAML value as a frozen dataclass holds it: a list as a tuple, a whole number as a float where one is meant."""
    if isinstance(value, list):
        return tuple(value)
    options = options_of(annotation)
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    return value


def written(annotation: object) -> str:
    """An annotation in a user's words."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(annotation))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
