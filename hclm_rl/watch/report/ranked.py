"""The tokens that are shown, in the order of a quantity: those that have most of it, and those that have least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .runs import is_number

MOST = 12  # shown at most at either end


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A table: a row a token, largest first; `left_out` tokens between the two ends are not shown."""

    column: str
    rows: list[tuple[str, str, str, int, int, str]]  # value, token, run, step, position, reward
    most: int  # rows before the gap
    left_out: int


def ranked(rows: Mapping[str, Mapping[int, Sequence[dict]]], column: str) -> Ranked:
    """Of {run: {step: tokens}}, by the quantity in this column."""
    found = [
        (row[column], row, name, step)
        for name, of in rows.items()
        for step, each in of.items()
        for row in each
        if is_number(row.get(column))
    ]
    found.sort(key=lambda each: -each[0])  # equal ones keep their order: run, step, response, position
    left_out = max(len(found) - 2 * MOST, 0)
    ends = [*found[:MOST], *found[MOST + left_out :]]
    return Ranked(
        column=column,
        rows=[
            (f"{value:.4g}", repr(row["token"]), name, step, row["position"], f"{row['reward']:.3g}")
            for value, row, name, step in ends
        ],
        most=MOST,
        left_out=left_out,
    )
