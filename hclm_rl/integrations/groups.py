"""Rows as another trainer has them, in any order and in groups of any size, brought into the order that terms read."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class Decoded(list):
    """Rows of ids that read as text. Each is decoded when it is read: that takes seconds, and few terms look."""

    def __init__(self, rows: Iterable[Tensor | tuple], tokenizer: Any) -> None:
        super().__init__(rows)
        self.tokenizer = tokenizer

    def at(self, rows: Iterable[int]) -> "Decoded":
        """Those rows; no tokens where a row is below 0."""
        return Decoded((super(Decoded, self).__getitem__(row) if row >= 0 else () for row in rows), self.tokenizer)

    def __getitem__(self, index: Any) -> Any:
        return self.tokenizer.decode(super().__getitem__(index), skip_special_tokens=True)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Groups:
    """Where each place of a batch in groups finds its row: the places of a group follow one another.

    All groups have the size of the largest. A place for which there is no response is -1; terms see there a response
    without a token that nothing scored.
    """

    row: Int[Tensor, "N"]  # of each place, -1 for none
    size: int

    @classmethod
    def of(cls, uid: Sequence[Hashable], counts: Sequence[bool]) -> "Groups":
        """`uid`: of each row's prompt. Rows that do not count (what a trainer filled its batch up with) have none."""
        rows: dict[Hashable, list[int]] = defaultdict(list)
        for row, (prompt, does) in enumerate(zip(uid, counts, strict=True)):
            if does:
                rows[prompt].append(row)
        size = max((len(group) for group in rows.values()), default=1)
        places = [row for group in rows.values() for row in (*group, *[-1] * (size - len(group)))]
        return cls(torch.tensor(places, dtype=torch.long), size)

    @property
    def number(self) -> Int[Tensor, "N"]:
        """Of each place's group."""
        return torch.arange(len(self.row)) // self.size

    def placed(self, values: Tensor, empty: float) -> Tensor:
        """The rows' values, place by place; `empty` where there is none. (B, ...) -> (N, ...), N the places."""
        taken = values[self.row.clamp(min=0).to(values.device)]
        is_none = (self.row < 0).to(values.device).view(-1, *[1] * (values.dim() - 1))
        return taken.masked_fill(is_none, empty)

    def listed(self, values: Sequence) -> list:
        """The same of a list, of which nothing stays nothing; empty text where there is none."""
        if not len(values):
            return []
        if isinstance(values, Decoded):
            return values.at(self.row.tolist())
        return [values[row] if row >= 0 else "" for row in self.row.tolist()]

    def back(self, values: Tensor, instead: Tensor) -> Tensor:
        """From places to rows; rows without a place keep theirs of `instead`. (N, ...) -> (B, ...), N the places."""
        is_row, result = self.row >= 0, instead.clone()
        result[self.row[is_row].to(result.device)] = values[is_row.to(values.device)].to(result)
        return result


def scale_of(rewards: Tensor, uid: Sequence[Hashable], counts: Sequence[bool], epsilon: float | None) -> Tensor:
    """What GRPO divides each row's centred reward by: its group's deviation plus `epsilon`; 1 where that is None.

    Both are (B,), a row a response.
    """
    scale = torch.ones_like(rewards)
    if epsilon is None:
        return scale
    groups = Groups.of(uid, counts)
    for rows in groups.row.view(-1, groups.size):
        rows = rows[rows >= 0]
        if len(rows) > 1:
            scale[rows] = rewards[rows].std() + epsilon
    return scale
