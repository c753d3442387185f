"""The board in one table: the area under pass@k where an entry has plain GRPO's pass@1, on every task."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .plan import BEFORE, Board, Candidate
from .statistics import DOWN, FEWEST_SEEDS, SIGNIFICANT, UP, Difference, holm
from .temperatures import Areas, at_several, curve_of, curves_of, difference, matched

EXPLAINED = """\
**How much does a policy still solve, at the pass@1 that plain GRPO reaches?** A cell is the AUC of pass@k (over log k,
k to {largest}) at the sampling temperature at which the entry has the pass@1 that `{reference}` has at {trained:g} on
the same seed: mean ± deviation over seeds, the number of seeds in brackets. So an entry cannot win by being less sharp.
{up} {down}: differs from `{reference}`, p < {level} after Holm's correction over all cells of this table, those with
fewer than 3 seeds counted in; no mark: not shown to differ. **Bold**: the largest of the column
among those with 3 seeds or more. A dash: not run, not
sampled at other temperatures, or nowhere at that pass@1."""
BESIDE = "pass@1 and AUC as trained, at temperature {trained:g}, different right answers among {samples} samples:"


@dataclass(kw_only=True)
class Cell:
    """An entry on one task."""

    areas: Areas  # by seed, of each prompt, at the reference's pass@1; empty where it is not known
    accuracy: float  # at the training temperature, as the next two
    area: float
    distinct: float
    seconds: float
    seeds: list[int]
    difference: Difference | None = None  # from the reference, at its pass@1
    mark: str = ""

    @property
    def means(self) -> list[float]:
        return [float(of.mean()) for of in self.areas.values()]

    @property
    def mean(self) -> float:
        return statistics.mean(self.means)

    def written(self, is_best: bool) -> str:
        if not self.areas:
            return "-"
        spread = f" ± {statistics.stdev(self.means):.3f}" if len(self.means) > 1 else ""
        text = f"{self.mean:.3f}{spread}{self.mark}"
        return f"{f'**{text}**' if is_best else text} ({len(self.means)})"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A task."""

    board: Board
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def best(self) -> str | None:
        """The largest of those with enough seeds for a test."""
        tested = [name for name, cell in self.cells.items() if len(cell.areas) >= FEWEST_SEEDS]
        return max(tested, key=lambda name: self.cells[name].mean, default=None)


def column_of(board: Board) -> Column:
    candidates = [each for entry in board.entries() for each in entry.shown]
    curves = curves_of(candidates, board)
    plain = {seed: of[board.trained_at] for seed, of in curves.get(board.reference, {}).items()}
    compared = at_several(curves)
    column = Column(board=board)
    for candidate in candidates:
        if not curves[candidate.name]:
            continue
        areas = {} if candidate.entry == BEFORE else matched(compared.get(candidate.name, {}), plain)
        if candidate.entry == board.reference:
            areas = {seed: point.areas for seed, point in plain.items()}
        cell = cell_of(candidate, areas)
        if areas and candidate.entry != board.reference:
            cell.difference = difference(areas, {seed: point.areas for seed, point in plain.items()})
        column.cells[candidate.name] = cell
    return column


def cell_of(candidate: Candidate, areas: Areas) -> Cell:
    board = candidate.board
    summaries = candidate.summaries(board.seeds, "report")
    points = [curve_of(summary, board)[board.trained_at] for summary in summaries.values()]
    clock = "training" if next(iter(summaries.values()))["device"] != "cpu" else "training_cpu"
    return Cell(
        areas=areas,
        accuracy=statistics.mean(point.accuracy for point in points),
        area=statistics.mean(point.area for point in points),
        distinct=statistics.mean(float(np.mean(of["per_prompt"]["distinct_correct"])) for of in summaries.values()),
        seconds=statistics.mean(of["seconds"].get(clock, 0.0) for of in summaries.values()),
        seeds=sorted(summaries),
    )


def mark(columns: Sequence[Column]) -> None:
    """Arrows where an entry differs from the reference, corrected over the whole table."""
    compared = [cell for column in columns for cell in column.cells.values() if cell.difference is not None]
    adjusted = holm([cell.difference.p for cell in compared if cell.difference is not None])
    for cell, p in zip(compared, adjusted, strict=True):
        assert cell.difference is not None
        if p < SIGNIFICANT:
            cell.mark = f" {UP if cell.difference.mean > 0 else DOWN}"


def gain(name: str, columns: Sequence[Column]) -> tuple[int, float]:
    """On how many tasks it is known, and its mean gain on the reference there."""
    gains = [
        column.cells[name].mean - column.cells[column.board.reference].mean
        for column in columns
        if name in column.cells and column.cells[name].areas and column.board.reference in column.cells
    ]
    return len(gains), statistics.mean(gains) if gains else 0.0


def rows_of(columns: Sequence[Column]) -> list[str]:
    """Entries that are known somewhere: those on most tasks first, then by their mean gain."""
    names = dict.fromkeys(name for column in columns for name, cell in column.cells.items() if cell.areas)
    return sorted(names, key=lambda name: gain(name, columns), reverse=True)


def table(columns: Sequence[Column]) -> list[str]:
    lines = ["| entry | " + " | ".join(f"{each.board.task}" for each in columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for name in rows_of(columns):
        cells = [each.cells[name].written(name == each.best) if name in each.cells else "-" for each in columns]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def beside(columns: Sequence[Column]) -> list[str]:
    """What the same policies are as trained, and what they cost."""
    lines = ["| entry | " + " | ".join(f"{each.board.task}" for each in columns) + " | CPU s, of plain's |"]
    lines.append("|" + "---|" * (len(columns) + 2))
    for name in [BEFORE, *rows_of(columns)]:
        cells = []
        for column in columns:
            cell = column.cells.get(name)
            cells.append(f"{cell.accuracy:.3f}, {cell.area:.3f}, {cell.distinct:.1f}" if cell else "-")
        title = name if name == BEFORE else f"`{name}`"
        lines.append(f"| {title} | " + " | ".join([*cells, cost(name, columns)]) + " |")
    return lines


def cost(name: str, columns: Sequence[Column]) -> str:
    """Seconds of training over the reference's, over the tasks of both; machines differ, so it is rough."""
    shares = [
        column.cells[name].seconds / column.cells[column.board.reference].seconds
        for column in columns
        if name in column.cells and column.cells.get(column.board.reference) and column.cells[name].seconds
    ]
    return f"{statistics.median(shares):.1f}" if shares and name != BEFORE else "-"


def as_csv(columns: Sequence[Column]) -> str:
    """All of it and the difference from the best other entry, a line an entry and task."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["task", "setting", "entry", "seeds", "auc_at_plains_pass_1", "deviation", "over_plain", "low", "high", "p"]
    head += [
        "over_best_other",
        "best_other",
        "other_low",
        "other_high",
        "pass_1",
        "auc",
        "distinct",
        "training_seconds",
    ]
    writer.writerow(head)
    for column in columns:
        for name, cell in column.cells.items():
            line: list = [column.board.task, column.board.setting, name, " ".join(map(str, cell.seeds))]
            line += [f"{cell.mean:.4f}" if cell.areas else ""]
            line += [f"{statistics.stdev(cell.means):.4f}" if len(cell.means) > 1 else ""]
            line += _numbers(cell.difference)
            others = [each for each, of in column.cells.items() if each != name and of.areas]
            best = max(others, key=lambda each: column.cells[each].mean, default=None)
            if best and (to_best := difference(cell.areas, column.cells[best].areas)):
                line += [f"{to_best.mean:+.4f}", best, *_numbers(to_best)[1:3]]
            else:
                line += ["", "", "", ""]
            writer.writerow(
                [*line, f"{cell.accuracy:.4f}", f"{cell.area:.4f}", f"{cell.distinct:.2f}", f"{cell.seconds:.0f}"]
            )
    return out.getvalue()


def _numbers(of: Difference | None) -> list[str]:
    """Mean, ends of the interval and p; empty where they are not known."""
    values = (of.mean, of.low, of.high, of.p) if of else ()
    written = [f"{value:.4g}" if np.isfinite(value) else "" for value in values]
    return [*written, *[""] * (4 - len(written))]


def section(boards: Sequence[Board], page: Path) -> list[str]:
    """The lines of the table, its CSV beside the page; none where no run was sampled at other temperatures."""
    first = next(iter(boards[0].written["settings"]))
    columns = [column_of(board) for board in boards if board.setting == first]
    columns = [column for column in columns if sum(bool(cell.areas) for cell in column.cells.values()) > 1]
    if not columns:
        return []
    mark(columns)
    board = columns[0].board
    explained = EXPLAINED.format(
        largest=max(board.pass_ks),
        reference=board.reference,
        trained=board.trained_at,
        level=SIGNIFICANT,
        up=UP,
        down=DOWN,
    )
    beside_page = page.with_suffix(".csv")
    beside_page.write_text(as_csv(columns))
    return [
        *explained.splitlines(),
        "",
        *table(columns),
        "",
        BESIDE.format(trained=board.trained_at, samples=board.samples),
        "",
        *beside(columns),
        "",
        f"With the intervals and the differences from the best other entry: [{beside_page.name}]({beside_page.name}).",
    ]
