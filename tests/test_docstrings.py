"""Every public name says what it is; an override may leave that to what it overrides."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType

import pytest

import hclm_rl
from hclm_rl.chain.schedules import Coefficient
from hclm_rl.types import Term

OF_A_USER = ("terms", "types", "chain", "equations", "responses", "trainer", "recipe", "sft", "decoding", "evaluation")
OF_A_USER += ("rollouts", "testbed", "watch", "integrations")


def modules() -> Iterator[ModuleType]:
    """Of the rooms whose names a user may import; the command line says of itself what it does.

    Of the integrations those that need no trainer that is not installed.
    """
    for found in pkgutil.walk_packages(hclm_rl.__path__, "hclm_rl."):
        if found.name.split(".")[1] in OF_A_USER:
            try:
                yield importlib.import_module(found.name)
            except ModuleNotFoundError:
                if ".integrations." not in found.name:
                    raise


def has_doc(name: str, thing: object) -> bool:
    """A dataclass without a docstring gets its signature as one, which is none."""
    said = inspect.getdoc(thing) or ""
    return bool(said) and not said.startswith(f"{name}(")


def is_override(kind: type, own: str) -> bool:
    """Of a name that Term or Coefficient says what it is for, in comments where it is a field."""
    return hasattr(Term, own) if issubclass(kind, Term) else own in vars(Coefficient) and hasattr(kind, "value")


REFUSES = re.compile(r"[Rr]efus|\braises?\b|\bmust\b|ValueError")
SHAPE = re.compile(r"\((\w[\w*+. ]*,[^)]*|)\)|any shape|one shape|whose shape")  # (N,) or (B, T); () is a scalar


def public_functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, str]]:
    """(function or method, what its docstring says; where it has none, its class's)"""
    for kind in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        said = ast.get_docstring(kind) or "" if isinstance(kind, ast.ClassDef) else ""
        if isinstance(kind, ast.ClassDef) and any("autograd" in ast.unparse(base) for base in kind.bases):
            continue  # torch calls these
        for node in kind.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield node, ast.get_docstring(node) or said


def has_no_shape(kind: ast.expr | None) -> bool:
    """A tensor of which the annotation says no more."""
    return kind is not None and any(
        isinstance(node, ast.Name) and node.id == "Tensor" for node in ast.walk(kind) if not inside_shape(kind, node)
    )


def inside_shape(kind: ast.expr, tensor: ast.AST) -> bool:
    """Whether it is the Tensor of Float[Tensor, "N T"]."""
    shaped = [node for node in ast.walk(kind) if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)]
    return any(
        node.slice.elts[0] is tensor and isinstance(node.slice.elts[1], ast.Constant | ast.JoinedStr)
        for node in shaped
        if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2
    )


def unsaid(source: str) -> Iterator[str]:
    """Functions that refuse something and do not say so, or handle a tensor whose shape neither tells."""
    for function, said in public_functions(ast.parse(source)):
        raised = [
            node.exc.func.id
            for node in ast.walk(function)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        ]
        if {"ValueError", "TypeError"} & {*raised} and not (
            function.name.startswith("refuse_") or REFUSES.search(said)
        ):
            yield f"{function.name} does not say what it refuses"
        given = [each.annotation for each in (*function.args.args, *function.args.kwonlyargs)]
        if any(map(has_no_shape, [*given, function.returns])) and not SHAPE.search(said):
            yield f"{function.name} does not say the shape of its tensors"


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


def test_a_function_that_hides_what_it_refuses_or_a_shape_is_found():
    hidden = '''
def f(x: Tensor, y: Float[Tensor, "N"]) -> None:
    """Does."""
    if y:
        raise ValueError("y")
def g(x: Callable[[Tensor], Tensor], y: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """`x`: (N, V) -> (N,). Refuses no row."""
    raise ValueError("y")
def _own(x: Tensor) -> None: ...
'''
    assert [*unsaid(hidden)] == ["f does not say what it refuses", "f does not say the shape of its tensors"]


def test_every_public_function_says_what_it_refuses_and_the_shape_of_its_tensors():
    found = [f"{module.__name__}.{each}" for module in modules() for each in unsaid(inspect.getsource(module))]
    assert not [each for each in found if not each.split(".")[-1].startswith("main ")]  # its --help says it


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
