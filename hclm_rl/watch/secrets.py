"""Tokens and keys stay out of what a run writes: the recipe's copy, the summary, the page.

A secret is what stands under a key called `hub_token` or whatever ends in `_token`, `_key`, `password` or `secret`, and
all that stands below `env`. It is hidden there and wherever the same text stands again.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

import yaml

HIDDEN = "<hidden>"
SECRET = re.compile(r"(.*[_-])?(token|key|password|passwd|secret|credential|credentials)", re.IGNORECASE)
SHORTEST = 6  # characters of a secret that is looked for elsewhere: a shorter one would blank out common words


def is_secret(key: object) -> bool:
    """Whether what stands under the key is nobody's business; `env` holds tokens among other things."""
    return isinstance(key, str) and (key == "env" or SECRET.fullmatch(key) is not None)


def without(text: str, secrets: Sequence[str]) -> str:
    """The text with every secret hidden, the longest first."""
    for secret in sorted({each for each in secrets if len(each) >= SHORTEST}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def hide(value: object, is_below: bool = False) -> object:
    """A value of a recipe or a summary without its secrets; `is_below`: a key that is one."""
    if isinstance(value, Mapping):
        return {key: hide(each, is_below or is_secret(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide(each, is_below) for each in value]
    return HIDDEN if is_below and value not in (None, "", False) else value


def secrets_in(value: object, is_below: bool = False) -> Iterator[str]:
    """The texts that `hide` hides."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from secrets_in(each, is_below or is_secret(key))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from secrets_in(each, is_below)
    elif is_below and value not in (None, "", False):
        yield str(value)


def hide_in_yaml(text: str) -> str:
    """The file as it stands, comments and all, with its secrets hidden."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return "# not shown: no valid YAML, in which a secret could not be told from the rest\n"
    scalars = set(secret_scalars(tree, False, set()))
    for start, end, _ in sorted(scalars, reverse=True):
        whole = text[start:end]
        text = f"{text[:start]}{HIDDEN}{whole[len(whole.rstrip()) :]}{text[end:]}"
    return without(text, [value for _, _, value in scalars])


def secrets_in_yaml(text: str) -> list[str]:
    """The texts that `hide_in_yaml` hides."""
    return [value for *_, value in secret_scalars(yaml.compose(text, Loader=yaml.SafeLoader), False, set())]


def secret_scalars(
    node: yaml.Node | None, is_below: bool, seen: set[tuple[int, bool]]
) -> Iterator[tuple[int, int, str]]:
    """(start, end, value) of what is secret; an anchor's node is read once, as it may stand in itself."""
    if node is None or (id(node), is_below) in seen:
        return
    seen.add((id(node), is_below))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from secret_scalars(value, is_below or is_secret(key.value), seen)
    elif isinstance(node, yaml.SequenceNode):
        for each in node.value:
            yield from secret_scalars(each, is_below, seen)
    elif is_below and node.value not in ("", "null", "~"):
        yield node.start_mark.index, node.end_mark.index, node.value.strip()


def secrets_in_line(line: Sequence[str]) -> Iterator[str]:
    """Those of a command line: --hub_token X, --hub-token=X, and the values of such keys within JSON."""
    key = ""
    for word in line:
        if word.startswith("--"):
            key, is_given, word = word[2:].partition("=")
            if not is_given:
                continue
        if is_secret(key.replace("-", "_")):
            yield word
        elif word[:1] in ("{", "["):
            try:
                yield from secrets_in(json.loads(word))
            except (ValueError, RecursionError):
                continue


def hide_in_line(line: Sequence[str]) -> list[str]:
    """The words of a command line with their secrets hidden, be they as short as may be."""
    secrets = list(secrets_in_line(line))
    return [HIDDEN if word in secrets else _in_word(word, secrets) for word in line]


def _in_word(word: str, secrets: Sequence[str]) -> str:
    """Flag and value in one word, JSON, or a longer text that holds a secret."""
    flag, is_given, value = word.partition("=")
    if is_given and flag.startswith("--") and value in secrets:
        return f"{flag}={HIDDEN}"
    for secret in secrets:
        word = word.replace(json.dumps(secret), json.dumps(HIDDEN))
    return without(word, secrets)
