"""What the names on the page mean: the words of docs/metrics.md and `hclm-rl metrics`."""

from dataclasses import dataclass

from ..meanings import meanings

MOST = 3  # terms, of a link with a name of its own that may be any


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """A logged quantity in words."""

    name: str
    unit: str
    told: str  # what it is, where it is healthy, what to do elsewhere
    by: str  # the term that logs it, where the name does not say


def meanings_of(key: str) -> list[Meaning]:
    """Of a name in a log; none where nobody has described it, several where it may be of several terms."""
    found, link = meanings(key), key.partition("/")[0]
    is_known = len(found) == 1 or any(who == link for who, _ in found)
    return [
        Meaning(name=key, unit=each.unit, told=each.told.replace("`", ""), by="" if is_known else who)
        for who, each in found[:MOST]
    ]
