"""Which name did they mean?"""

import difflib
from collections.abc import Iterable


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """`known`, the most like `name` first."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
