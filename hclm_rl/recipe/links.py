"""From a recipe's words to a chain of terms. Nothing here needs TRL: other trainers' adapters begin here too."""

import dataclasses
import functools
import importlib
import json
import math
import pkgutil
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from .. import terms
from ..chain.chain import Chain, Link
from ..chain.coefficients import Coefficient, Constant, coefficient_from
from ..responses.names import find, nearest
from ..types import Term
from .values import fits, options_of, shown, stored, written

NOTHING = Constant(coefficient=0.0)


@functools.cache
def _modules_of_terms() -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(terms.__path__)))


def known_terms() -> list[str]:
    """The names of all terms that the library has: the modules in hclm_rl/terms."""
    return list(_modules_of_terms())


def find_term(name: str) -> type[Term]:
    """The class behind a recipe's name: `clip_cov` is terms/clip_cov.py's ClipCov, `my_lab.floor.Floor` is itself.

    Refuses an unknown name, and what is no frozen dataclass of a Term.
    """
    if "." in name:
        found = find(name, "entropy term")
    elif name in _modules_of_terms():
        class_name = "".join(word.capitalize() for word in name.split("_"))
        found = getattr(importlib.import_module(f"{terms.__name__}.{name}"), class_name)
    else:
        raise ValueError(
            f"unknown entropy term '{name}'; the nearest are {nearest(name, known_terms())}; `hclm-rl methods` lists "
            "all; a term of your own is named by its dotted path"
        )
    # its own fields: an undecorated subclass inherits those of Term, which are none
    if (
        not (isinstance(found, type) and issubclass(found, Term))
        or found is Term
        or "__dataclass_fields__" not in vars(found)
    ):
        raise ValueError(f"'{name}' is not an entropy term: it must be a frozen dataclass that subclasses hclm_rl.Term")
    return found


def build_term(name: str, parameters: Mapping[str, Any]) -> Term:
    """The term with its hyper-parameters; raises one sentence with the culprit and what is allowed."""
    term_class = find_term(name)
    annotations = typing.get_type_hints(term_class)
    known = [each.name for each in dataclasses.fields(term_class)]
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(
                f"{name} has no hyper-parameter '{key}'; the nearest are {nearest(key, [*known, 'coef', 'name'])}; "
                f"`hclm-rl methods {name}` shows all"
            )
        if not fits(value, annotations[key]):
            hint = ""
            if isinstance(value, str) and float in options_of(annotations[key]):
                hint = "; YAML reads 1e-6 as text, write 1.0e-6"
            raise ValueError(
                f"{name}: {key} must be {written(annotations[key])}, got {type(value).__name__} {shown(value)}{hint}"
            )
    missing = [
        each.name
        for each in dataclasses.fields(term_class)
        if each.default is each.default_factory is dataclasses.MISSING and each.name not in parameters
    ]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}; got {', '.join(parameters) or 'nothing'}")
    try:
        term = term_class(**{key: stored(value, annotations[key]) for key, value in parameters.items()})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{name}: {error}") from error
    return checked_term(name, term)


def checked_term(name: str, term: Term) -> Term:
    """The term, its fields being of the declared kinds and its numbers finite, where infinity is not the default.

    Refuses any other.
    """
    annotations = typing.get_type_hints(type(term))
    for each in dataclasses.fields(term) if dataclasses.is_dataclass(term) else ():
        value, annotation = vars(term)[each.name], annotations[each.name]
        if not fits(value, annotation):
            raise ValueError(
                f"{name}: {each.name} must be {written(annotation)}, got {type(value).__name__} {shown(value)}"
            )
        is_endless = isinstance(value, float) and not math.isfinite(value)
        if is_endless and not (isinstance(each.default, float) and math.isinf(each.default)):
            raise ValueError(f"{name}: {each.name} must be finite, got {value}")
    return term


def build_link(entry: object) -> Link:
    """One entry of `entropy_terms`: a Link, a Term, a name, or {name: {hyper-parameters, coef, name}}.

    Refuses any other form, an unknown name and a wrong value.
    """
    if isinstance(entry, Link):
        checked_term(entry.name, entry.term)
        return entry
    if type(entry) is Term:
        raise ValueError("hclm_rl.Term itself is no entropy term: subclass it")
    if isinstance(entry, Term):
        package, _, module = type(entry).__module__.rpartition(".")
        name = module if package == terms.__name__ else type(entry).__name__  # as a recipe would name it
        return Link(name=name, term=checked_term(name, entry), coef=coefficient_from(entry.default_coef))
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise ValueError(
            f"an entry of entropy_terms is a name or one {{name: {{hyper-parameter: value}}}}, got {shown(entry)}; "
            "hyper-parameters are indented below the name, and each term starts with its own `-`"
        )
    [(name, given)] = entry.items()
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name}: its hyper-parameters are a mapping, as in {{coef: 0.5}}, got {shown(given)}")
    parameters = dict(given or {})
    coef, label = parameters.pop("coef", None), parameters.pop("name", None)
    term = build_term(name, parameters)
    if label is not None and not isinstance(label, str):
        raise ValueError(f"{name}: name must be text without '/', got {shown(label)}")
    try:
        strength: Coefficient = coefficient_from(term.default_coef if coef is None else coef)
    except ValueError as error:
        raise ValueError(f"{name}: coef: {error}") from error
    return Link(name=name.rpartition(".")[2] if label is None else label, term=term, coef=strength)


def build_chain(entries: object) -> Chain:
    """`entropy_terms` as given, in Python, YAML or JSON, to a Chain. Refuses what is no list of entries."""
    if entries is None:
        return Chain()
    if isinstance(entries, str):
        try:
            entries = json.loads(entries)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"entropy_terms on the command line is JSON, as in '[{{\"clip_cov\": {{}}}}]'; {error}: "
                f"{shown(entries)}"
            ) from error
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"entropy_terms is a list, one entry a term, got {type(entries).__name__} {shown(entries)}")
    chain = Chain(tuple(build_link(entry) for entry in entries))
    refuse_order(chain)
    return chain


def refuse_order(chain: Chain) -> None:
    """A term that shapes rewards after one that shapes advantages, whose work it would undo; coef 0 is absence."""
    shaper = None
    for link in chain.links:
        if link.coef == NOTHING:
            continue
        if link.term.shapes_rewards and shaper is not None:
            raise ValueError(
                f"'{link.name}' shapes rewards, of which the advantages are made anew, and would undo '{shaper}' "
                f"before it: put '{link.name}' before '{shaper}'"
            )
        shaper = link.name if link.term.shapes_advantages else shaper
