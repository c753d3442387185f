"""Vectors as long as a model's parameters, on the disk: the doctor needs some twenty, and a part of each at a time"""

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ROOM = 40  # such vectors that must find room on the disk, before one is kept there
AT_ONCE = 1 << 24  # numbers of a vector, about, that are looked at together


class Stored(Sequence[Tensor]):
    """One tensor a parameter, written as they come and read when asked for; the file ends with the object."""

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the vector)
        weakref.finalize(self, self.file.close)
        self.places: list[tuple[int, torch.Size, torch.device]] = []
        for each in tensors:
            self.places.append((self.file.tell(), each.shape, each.device))
            self.file.write(as_bytes(each.detach().to("cpu", dtype).contiguous()))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override] (no slices)
        place, shape, device = self.places[number]
        found = torch.empty(shape, dtype=self.dtype)
        self.file.seek(place)
        self.file.readinto(as_bytes(found))
        return found.to(device)


def as_bytes(of: Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return of.reshape(-1).view(torch.uint8).numpy().data


def has_room(count: int, dtype: torch.dtype) -> bool:
    """Whether the disk takes a few dozen vectors of so many numbers."""
    return shutil.disk_usage(tempfile.gettempdir()).free > ROOM * count * dtype.itemsize


def parts(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the parameters, in groups of about AT_ONCE of their elements."""
    found: list[list[int]] = []
    filled = AT_ONCE
    for number, size in enumerate(sizes):
        if filled + size > AT_ONCE:
            found.append([])
            filled = 0
        found[-1].append(number)
        filled += size
    return found
