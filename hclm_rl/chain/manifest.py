"""What a checkpoint says of the links that wrote it, and how a run's own links differ from that."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType

from .chain import Chain


def class_of(value: object) -> str:
    """The dotted path of its class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def plain(value: object) -> object:
    """As JSON holds it; what JSON has no word for is named by its class, a function by its path."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class": class_of(value), **fields_of(value)}
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return class_of(value)


def fields_of(value: object) -> dict[str, object]:
    """{field: value} of a term or a coefficient; what it is without fields, by its attributes."""
    return {name: plain(each) for name, each in vars(value).items()}


def described(chain: Chain) -> list[dict]:
    """One entry a link, in order: its name, the classes of term and coefficient, and the values of both."""
    return [
        {
            "name": link.name,
            "class": class_of(link.term),
            "hyper_parameters": fields_of(link.term),
            "coef": {"class": class_of(link.coef), **fields_of(link.coef)},
        }
        for link in chain.links
    ]


def text(value: object) -> str:
    """By which two values are compared: as JSON writes them, so that NaN equals NaN and 1 is not 1.0."""
    return json.dumps(value, sort_keys=True)


def differences(kept: Sequence[Mapping], chain: Chain) -> list[str]:
    """What differs between the links of a checkpoint and those of a run of the same names, in words."""
    said, now = [], {link["name"]: link for link in described(chain)}
    for old in kept:
        new, name = now[old["name"]], f"'{old['name']}'"
        if old["class"] != new["class"]:
            said.append(f"{name} was the term {old['class']} and is {new['class']}")
            continue
        was, is_now = ({**link["hyper_parameters"], "coef": link["coef"]} for link in (old, new))
        for key in [*was, *(key for key in is_now if key not in was)]:
            if key not in was or key not in is_now:
                said.append(f"{key} of {name} is {'new' if key not in was else 'gone'}")
            elif text(was[key]) != text(is_now[key]):
                said.append(f"{key} of {name} was {text(was[key])} and is {text(is_now[key])}")
    return said
