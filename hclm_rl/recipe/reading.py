"""A recipe's YAML as a mapping, or one sentence: no key twice, keys that are text, nothing endless."""

from collections.abc import Hashable, Iterator
from pathlib import Path

import yaml

DEEPEST = 20  # levels of lists and mappings; a recipe has four
LARGEST = 100_000  # values, each as often as an alias repeats it
LARGEST_NUMBER = 2**63  # what torch and numpy hold in an integer
BOOLEANS = "YAML reads on, off, yes and no as true and false: write the key in quotes"


class Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """Refuses a key that stands twice in one mapping."""
        seen: dict[object, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                raise ValueError(
                    f"the key '{key.value[:80]}' stands twice, in lines {first.start_mark.line + 1} and "
                    f"{key.start_mark.line + 1}: keep one of them"
                )
        return super().construct_mapping(node, deep)


def read_recipe(recipe: Path) -> dict[str, object]:
    """The recipe's keys and values. Refuses what is no YAML of keys and values."""
    if not recipe.is_file():
        raise ValueError(f"no recipe at '{recipe}': --config names a YAML file")
    try:
        found = yaml.load(recipe.read_bytes(), Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{recipe} is nested too deeply: {DEEPEST} levels are allowed") from error
    except (ValueError, OverflowError) as error:  # a key twice, a date of month 13, a number of 5000 digits
        raise ValueError(f"{recipe}: {error}") from error
    if not isinstance(found, dict):
        came = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{recipe} must be keys and values, as in `task: coins`, got {came}")
    for key in found:
        if not isinstance(key, str):
            hint = f"; {BOOLEANS}" if isinstance(key, bool) else ""
            raise ValueError(f"{recipe}: a key must be text, got {type(key).__name__} {key!r:.80}{hint}")
    refuse_endless(found)
    return found


def refuse_endless(of: dict[str, object]) -> None:
    """What is nested too deeply, repeated too often, or a number that nothing can hold; the sentence has the key."""
    for key, value in of.items():
        for count, (level, each) in enumerate(values_below(value, 1)):
            if level > DEEPEST:
                raise ValueError(f"{key} is nested too deeply: {DEEPEST} levels are allowed")
            if count >= LARGEST:
                raise ValueError(f"{key} has more than {LARGEST} values")
            if isinstance(each, int) and abs(each) >= LARGEST_NUMBER:
                raise ValueError(f"{key} has a whole number beyond 2^63, which nothing here can hold")


def values_below(value: object, level: int) -> Iterator[tuple[int, object]]:
    """(level, value) of all that a value holds, itself first."""
    yield level, value
    if level > DEEPEST:
        return
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    for each in value if isinstance(value, (list, tuple, set)) else ():
        yield from values_below(each, level + 1)
