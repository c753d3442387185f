"""Every public name says what it is; an override may leave that to what it overrides."""

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest

import hclm_rl
from hclm_rl.chain.schedules import Coefficient
from hclm_rl.types import Term

OF_A_USER = ("terms", "types", "chain", "equations", "responses", "trainer", "recipe", "sft", "decoding", "evaluation")


def modules() -> Iterator[ModuleType]:
    """Of the rooms whose names a user may import; the command line says of itself what it does."""
    for found in pkgutil.walk_packages(hclm_rl.__path__, "hclm_rl."):
        if found.name.split(".")[1] in OF_A_USER:
            yield importlib.import_module(found.name)


def has_doc(name: str, thing: object) -> bool:
    """A dataclass without a docstring gets its signature as one, which is none."""
    said = inspect.getdoc(thing) or ""
    return bool(said) and not said.startswith(f"{name}(")


def is_override(kind: type, own: str) -> bool:
    """Of a name that Term or Coefficient says what it is for, in comments where it is a field."""
    return hasattr(Term, own) if issubclass(kind, Term) else own in vars(Coefficient) and hasattr(kind, "value")


def undocumented(module: ModuleType) -> Iterator[str]:
    """The module itself, its classes and functions, and their methods and properties."""
    if not module.__doc__:
        yield module.__name__
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not has_doc(name, thing):
            yield f"{module.__name__}.{name}"
        for own in vars(thing) if inspect.isclass(thing) else ():
            member = inspect.getattr_static(thing, own)
            is_code = isinstance(member, property | classmethod | staticmethod) or inspect.isfunction(member)
            if getattr(member, "__name__", "") == "<lambda>" or is_override(thing, own):  # a field's default is no code
                continue
            if is_code and not own.startswith("_") and not has_doc(own, getattr(thing, own)):
                yield f"{module.__name__}.{name}.{own}"


def test_every_public_name_has_a_docstring():
    assert [name for module in modules() for name in undocumented(module)] == []


@pytest.mark.parametrize("name", ["equations.functional", "responses.outcomes"])
def test_the_numbers_in_docstrings_come_out(name: str):
    found = doctest.testmod(importlib.import_module(f"hclm_rl.{name}"))
    assert found.attempted and not found.failed


def test_no_example_with_numbers_is_left_unrun():
    """Those of the trainers need a network and a model; README and docs have them in whole, and tests run these."""
    of_trainers = {"hclm_rl.trainer.grpo", "hclm_rl.trainer.rloo", "hclm_rl.recipe.config"}
    of_trainers |= {"hclm_rl.sft.config", "hclm_rl.sft.trainer"}
    having = {each.__name__ for each in modules() if ">>>" in inspect.getsource(each)}
    assert having - of_trainers == {"hclm_rl.equations.functional", "hclm_rl.responses.outcomes"}
