"""A tensor that is not there: it has a shape, and whoever reads a value of it is told why there is none."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# what may be asked of it: all that does not read a value
PROPERTIES = ("shape", "dtype", "device", "requires_grad")
METHODS = ("dim", "size", "numel", "__len__", "is_floating_point", "is_complex")
SHAPELY = {vars(torch._C.TensorBase)[name].__get__ for name in PROPERTIES} | {getattr(Tensor, name) for name in METHODS}


class Absent(Tensor):
    """Stands for entropies that a trainer does not hand to its loss."""

    why: str

    @classmethod
    def like(cls, values: Tensor, why: str) -> "Absent":
        """A tensor of the shape and the values of `values`, (B, T), that refuses to be read, with the reason."""
        made = values.detach().as_subclass(cls)
        made.why = why
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SHAPELY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise ValueError(next((each.why for each in args if isinstance(each, cls)), "this tensor is not there"))
