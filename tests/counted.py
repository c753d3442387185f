"""What a piece of code costs, counted operation by operation: memory, waits for the device, decompositions."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what a device would have to finish before the program goes on: a number is read, or a shape depends on values
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2")


class Counted(TorchDispatchMode):
    """`with Counted() as seen`: seen.peak, bytes held at once beyond what was there before; seen.calls of each op.

    seen.written: numbers that operations gave, views included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = self.written = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        given = {each.untyped_storage()._cdata for each in read}
        if "index" in func.overloadpacket.__name__ and any(each.dtype == torch.bool for each in read[1:]):
            self.calls["nonzero"] += 1  # how it finds the places
        for made in tree_leaves(out):
            self.written += made.numel() if isinstance(made, torch.Tensor) else 0
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in given:
                self.add(made.untyped_storage())
        return out

    def add(self, storage: Any) -> None:
        """Counts a storage for as long as it lives."""
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.held -= size

    @property
    def waits(self) -> int:
        """How often a device would have been waited for."""
        return sum(self.calls[name] for name in WAITS)

    @property
    def decompositions(self) -> int:
        """Eigenvalues and Cholesky factors."""
        return sum(count for name, count in self.calls.items() if "eigh" in name or "cholesky_ex" in name)
