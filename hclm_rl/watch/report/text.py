"""Text on a page: what others wrote, a completion, a name, a key of a log; and numbers as a file to download."""

import base64
import csv
import io
import unicodedata
from collections.abc import Iterable

# the characters of Unicode's bidirectional algorithm: marks, embeddings, overrides, isolates
TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """Characters that turn the order of what follows, or that control anything else, as `\\u202e`: a completion may
    not rearrange the page, nor hide in it."""
    return "".join(
        f"\\u{ord(each):04x}" if each in TURNS or (unicodedata.category(each) == "Cc" and each not in "\n\t") else each
        for each in text
    )


def shown(value: object) -> object:
    """What the page prints of a value, before jinja escapes what is no markup yet."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def as_link(rows: Iterable[Iterable[object]]) -> str:
    """The rows as CSV, for a link that holds it: base64, behind `data:text/csv;base64,`."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return base64.b64encode(out.getvalue().encode()).decode()
