"""Where the final answer stands in a text: the last box, what follows a thought, between two tags. All in one pass."""

import re

BOX = re.compile(r"\\(?:boxed|fbox) ?\{")
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ is printed, { groups; \\ before a brace is a new line
MINUS_SIGNS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{FULLWIDTH HYPHEN-MINUS}": "-", "\N{SMALL HYPHEN-MINUS}": "-"})


def minus_signs(text: str) -> str:
    """With the hyphen for every minus sign, as Python and math-verify read it."""
    return text.translate(MINUS_SIGNS)


def after_thought(text: str) -> str:
    """What is said after the last </think>; the whole text where nothing is."""
    said = text.rpartition("</think>")[2]
    return said if said.strip() else text


def has_box(text: str) -> bool:
    r"""Whether it has a \boxed or \fbox."""
    return BOX.search(text) is not None


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...} or \fbox{...}, braces balanced; None without one or where it is not closed.

    A box in the thought counts only where nothing is said after it.
    """
    text = after_thought(text)
    inside = max((found.end() for found in BOX.finditer(text)), default=None)
    if inside is None:
        return None
    depth = 1
    for found in BRACES.finditer(text, inside):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            return text[inside : found.start()]
    return None


def between_tags(text: str, start: str, end: str) -> str | None:
    """What stands in the last pair of tags, from the first `start` since the `end` before it; None without a pair."""
    *closed, _ = text.split(end)
    for piece in reversed(closed):
        _, opened, found = piece.partition(start)
        if opened:
            return found
    return None
