"""A command's recipe and flags to its dataclasses, with the refusals that all recipes share."""

from collections.abc import Sequence
from typing import Any

from ..responses.names import FLAG
from .arguments import recipe_of, set_environment
from .custom_code import refuse_unnamed_code
from .limits import refuse_out_of_range
from .packages import refuse_missing_packages
from .parser import RecipeParser
from .reading import read_recipe


def settings_of(types: Sequence[type], prog: str, line: Sequence[str]) -> tuple[Any, ...]:
    """One object of each type; a ValueError names the key at fault."""
    parser = RecipeParser(list(types), prog=prog)
    recipe = recipe_of(line)
    given = read_recipe(recipe) if recipe is not None else {}
    at = line.index("--config") if recipe is not None else len(line)
    flags = [*line[:at], *line[at + 2 :]]
    keys = {key: value for key, value in given.items() if key != "env"}
    parser.refuse_unknown_keys(list(keys), flags)
    if "allow_custom_code" in given:
        raise ValueError(f"allow_custom_code is {FLAG} on the command line only: a recipe may not allow it to itself")
    parser.set_defaults_with_config(**keys)
    words, _ = parser.parse_known_args(flags)
    refuse_out_of_range(vars(words))
    refuse_missing_packages(vars(words))
    if not words.allow_custom_code:
        refuse_unnamed_code(given)
    set_environment(given)
    return parser.settings(flags)
