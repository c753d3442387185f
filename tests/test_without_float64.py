"""Every term on a device without float64, as Apple's MPS is: simulated on the CPU.

With the CPU among `NO_FLOAT64` every tensor of another type stands for one on the device and every float64 tensor for
one on the CPU, which `exactly` alone may make from the former. To mix both in one operation is the error that it would
be there; numbers made in float64 may be brought over as float32.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hclm_rl import known_terms
from hclm_rl.equations import functional
from hclm_rl.equations.functional import exactly, in_double

from .test_pairs import train
from .test_pairs import trainer as trainer  # a fixture
from .tiny import largest_difference, weights_of
from .trainer.test_invariance import STRONG

CONVERSIONS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def is_by_exactly() -> bool:
    """Whether the conversion under way was asked for there."""
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code.co_name == "exactly":
            return True
    return False


OF_CPU = "_made_of_float64"


class WithoutFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor) and each.dim()]
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.dim()]
        of_cpu = [each.dtype == torch.float64 or getattr(each, OF_CPU, False) for each in given]
        if func in CONVERSIONS:
            if made[0:1] and made[0].dtype == torch.float64 and not all(of_cpu) and not is_by_exactly():
                raise TypeError(f"{func}: MPS has no float64")
        elif any(of_cpu) and not all(of_cpu):
            raise RuntimeError(f"{func}: tensors of the CPU and of the device")
        elif given and all(of_cpu):
            for each in made:  # whole numbers and truths made of them are there, too
                setattr(each, OF_CPU, True)
        elif given and not any(of_cpu) and any(each.dtype == torch.float64 for each in made):
            raise TypeError(f"{func}: MPS has no float64")
        return out


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "NO_FLOAT64", {"cpu"})


@pytest.mark.parametrize("term", known_terms())
def test_every_term_trains(term: str, trainer: Any, no_float64: None):
    with WithoutFloat64():
        train(trainer, [{term: STRONG.get(term, {})}])
    without = weights_of(trainer)
    functional.NO_FLOAT64 = set()
    train(trainer, [{term: STRONG.get(term, {})}])
    assert largest_difference(weights_of(trainer), without) < 1e-4


def test_what_it_refuses(no_float64: None):
    x: Callable[[], torch.Tensor] = lambda: torch.ones(3)  # noqa: E731
    with WithoutFloat64():
        for wrong in (lambda: x().double(), lambda: exactly(x()) + x(), lambda: x().new_zeros(3, dtype=torch.float64)):
            with pytest.raises((TypeError, RuntimeError)):
                wrong()
        assert in_double(x()).dtype == torch.float32
        assert (exactly(x()).cumsum(dim=0).to(x()) == torch.tensor([1.0, 2, 3])).all()
