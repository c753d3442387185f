"""Terms, links and coefficients built in Python, as a recipe would write them"""

from collections.abc import Mapping

from .. import terms
from ..chain.chain import Link
from ..chain.coefficients import KINDS, Constant
from ..types import Term


def as_recipe(value: object) -> object:
    """Terms, links and coefficients built in Python as a recipe would write them; all else as it is, or its repr."""
    if isinstance(value, Link):
        [(name, parameters)] = term_as_recipe(value.term).items()
        return {name: {**parameters, "coef": as_recipe(value.coef), "name": value.name}}
    if isinstance(value, Term):
        return term_as_recipe(value)
    if isinstance(value, Constant):
        return value.coefficient
    for kind, coefficient_class in KINDS.items():
        if type(value) is coefficient_class:
            return {"kind": kind, **vars(value)}
    if isinstance(value, Mapping):
        return {key: as_recipe(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_recipe(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)


def term_as_recipe(term: Term) -> dict[str, dict[str, object]]:
    """{name: {hyper-parameter: value}}"""
    kind = type(term)
    is_ours = kind.__module__.startswith(f"{terms.__name__}.")
    name = kind.__module__.rpartition(".")[2] if is_ours else f"{kind.__module__}.{kind.__qualname__}"
    return {name: {key: as_recipe(value) for key, value in vars(term).items()}}
