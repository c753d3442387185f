"""What a term's memory may hold: what a checkpoint gives back as it was."""

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .door import TermRefused, described

ALLOWED = "numbers, text, None, lists and dicts of these by text, and tensors as values of the memory itself"


def make_plain(memory: dict[str, Any], link: str) -> None:
    """Turns NumPy numbers in a link's memory into Python's; raises where a checkpoint could not hold it."""
    for key, value in memory.items():
        if not isinstance(key, str):
            refuse(link, "its memory", f"the key {described(key)}")
        if not isinstance(value, Tensor):
            memory[key] = plain(value, link, f"memory[{key!r}]")
        elif value.layout != torch.strided or value.is_quantized:
            refuse(link, f"memory[{key!r}]", f"a tensor of layout {value.layout}")


def plain(value: Any, link: str, where: str) -> Any:
    """The value as JSON writes and reads it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        return [plain(each, link, f"{where}[{i}]") for i, each in enumerate(value)]
    if isinstance(value, dict):
        if keys := [key for key in value if not isinstance(key, str)]:
            refuse(link, where, f"the key {described(keys[0])}")
        return {key: plain(each, link, f"{where}[{key!r}]") for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    refuse(link, where, described(value))


def refuse(link: str, where: str, came: str) -> NoReturn:
    """Ends the run with what a term keeps that a checkpoint cannot hold."""
    raise TermRefused(
        f"the entropy term '{link}' keeps {came} in {where}, which a checkpoint cannot hold; allowed: {ALLOWED}"
    )
