"""docs/leaderboard.md and its plots, from the summaries of the runs that are there."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy import ndarray

from hclm_rl.watch.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of

from . import main_table, temperatures
from .plan import BEFORE, Board, Candidate, Entry, chosen, point_scores
from .statistics import (
    DOWN,
    SIGNIFICANT,
    UP,
    Difference,
    Interval,
    area_over_log_k,
    bootstrap_interval,
    holm,
    paired_difference,
    pass_curve,
)

TITLE = """# Leaderboard

"""
BEHIND = """
Every task, setting and measure, the grids and what was chosen: [{name}]({name}). Written by `python
eval/leaderboard.py`, do not edit by hand. What was tried beside: [log.md](log.md)."""
HEADER = """# Leaderboard

Every method of the library on the same tasks against plain GRPO, written by `python eval/leaderboard.py` from the runs
of eval/leaderboard.yaml (do not edit by hand; `--table` writes it anew without training). `--runs
docs/leaderboard_runs.tar.xz` adds to these runs, another `--page` starts from none.

- **AUC**: area under pass@k over log k, k = {ks}, divided by its width: accuracy at few samples and coverage at many
  in one number. **distinct**: different right answers among {samples} samples of a prompt. **entropy**: nats per token
  on held-out prompts after training. **affected**: share of the tokens that each term of the entry changed, mean over
  training; what affects none cannot differ from plain GRPO. **s**: seconds of training of a run ({clock}).
- Brackets: 95 % interval, bootstrap over seeds and prompts together (10,000 resamples; with few seeds a little too
  narrow). **Δ AUC**: paired with plain GRPO on the same seeds and prompts, t interval of a two-way model (seed and
  prompt at random).
- {up} {down}: differs from plain GRPO, p < {level} by that model after Holm's correction over all entries of the same
  table and column, those with too few seeds for a test (fewer than 3) included. No mark: not shown to differ, which is
  not the same as equal.
- "At the recipe's values": recipes/methods/, which has the authors' values, and says so where it has others. A name
  with `, key=value` is an entry at that value instead.
- "Best of {points}": of a grid of {points} points for each entry, the one with the largest AUC on other held-out
  prompts and other seeds than those reported here; the grids are in eval/leaderboard.yaml.
"""


@dataclass(frozen=True, kw_only=True)
class Measure:
    label: str
    values: Callable[[Board, dict], ndarray]  # the summary of a run -> a value per prompt
    digits: int = 3


def counted(name: str) -> Callable[[Board, dict], ndarray]:
    return lambda board, summary: np.array(summary["per_prompt"][name], dtype=float)


def correct(summary: dict) -> ndarray:
    return np.array([summary["per_prompt"]["correct"]])


def area(board: Board, summary: dict) -> ndarray:
    return area_over_log_k(pass_curve(correct(summary), board.samples, board.pass_ks), board.pass_ks)[0]


def pass_at(pick: Callable[[Sequence[int]], int]) -> Callable[[Board, dict], ndarray]:
    return lambda board, summary: pass_curve(correct(summary), board.samples, [pick(board.pass_ks)])[0, 0]


def measures_of(board: Board) -> list[Measure]:
    return [
        Measure(label="AUC", values=area),
        Measure(label=f"pass@{min(board.pass_ks)}", values=pass_at(min)),
        Measure(label=f"pass@{max(board.pass_ks)}", values=pass_at(max)),
        Measure(label="distinct", values=counted("distinct_correct"), digits=2),
        Measure(label="entropy", values=counted("token_entropy")),
    ]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An entry's runs reduced to what the table and the plot show."""

    candidate: Candidate
    seeds: list[int]
    intervals: dict[str, Interval]
    differences: dict[str, Difference]  # empty for the reference and for the policy before training
    affected: str
    steps: int
    seconds: float

    @property
    def name(self) -> str:
        return self.candidate.name


def row_of(candidate: Candidate, reference: dict[int, dict]) -> Row | None:
    """None where no run of it is finished."""
    board = candidate.board
    is_compared = candidate.entry not in (BEFORE, board.reference)
    summaries = candidate.summaries(board.seeds, "report")
    if not summaries:
        return None
    shared = [seed for seed in summaries if seed in reference]
    intervals, differences = {}, {}
    for measure in measures_of(board):
        values = {seed: measure.values(board, summary) for seed, summary in summaries.items()}
        intervals[measure.label] = bootstrap_interval(np.array(list(values.values())))
        if is_compared and shared:
            plain = np.array([measure.values(board, reference[seed]) for seed in shared])
            differences[measure.label] = paired_difference(np.array([values[seed] for seed in shared]), plain)
    links = {link: [each["affected"][link] for each in summaries.values()] for link in first(summaries)["affected"]}
    clock = "training" if first(summaries)["device"] != "cpu" else "training_cpu"
    return Row(
        candidate=candidate,
        seeds=sorted(summaries),
        intervals=intervals,
        differences=differences,
        affected=", ".join(
            f"{link} {statistics.mean(shares):.2g}" if len(links) > 1 else f"{statistics.mean(shares):.2g}"
            for link, shares in links.items()
        )
        or "-",
        steps=first(summaries)["steps"],
        seconds=statistics.mean(each["seconds"][clock] for each in summaries.values()),
    )


def first(summaries: dict[int, dict]) -> dict:
    return next(iter(summaries.values()))


def rows_of(entries: Sequence[Entry], best: Sequence[Candidate], board: Board) -> dict[str, Row]:
    """Name -> row of what is shown of each entry and of the best points: before training, then all others by AUC."""
    [plain] = [entry.default for entry in entries if entry.name == board.reference]
    reference = plain.summaries(board.seeds, "report")
    candidates = {each.name: each for each in [*(each for entry in entries for each in entry.shown), *best]}
    found = [row for each in candidates.values() if (row := row_of(each, reference)) is not None]
    found.sort(key=lambda row: (row.name != BEFORE, -row.intervals["AUC"].mean))
    return {row.name: row for row in found}


def rows_among(candidates: Sequence[Candidate], rows: dict[str, Row]) -> list[Row]:
    """Their rows, in the order of `rows`."""
    names = {each.name for each in candidates}
    return [row for name, row in rows.items() if name in names]


def marks_of(rows: Sequence[Row], label: str) -> dict[str, str]:
    """Entry -> arrow, where it differs from the reference after correction over all rows."""
    compared = [row for row in rows if row.differences]
    adjusted = holm([row.differences[label].p for row in compared])
    return {
        row.name: f" {UP if row.differences[label].mean > 0 else DOWN}" if p < SIGNIFICANT else ""
        for row, p in zip(compared, adjusted, strict=True)
    }


def table(rows: Sequence[Row], board: Board) -> list[str]:
    measures = measures_of(board)
    marks = {measure.label: marks_of(rows, measure.label) for measure in measures}
    head = ["entry", "Δ AUC", *(each.label for each in measures), "affected", "steps", "s", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        delta = row.differences.get("AUC")
        cells = [f"`{row.name}`" if row.name != BEFORE else BEFORE]
        cells += ["-" if delta is None else delta.written(3, "+")]
        cells += [
            row.intervals[each.label].written(each.digits) + marks[each.label].get(row.name, "") for each in measures
        ]
        steps, seconds = ("-", "-") if row.name == BEFORE else (str(row.steps), f"{row.seconds:.0f}")
        lines.append("| " + " | ".join([*cells, row.affected, steps, seconds, str(len(row.seeds))]) + " |")
    return lines


def frontier(rows: Sequence[Row], board: Board) -> list[str]:
    """The trained rows, sorted by AUC, that no other passes in both AUC and pass@1; a line where there are two rows."""
    accuracy, found = f"pass@{min(board.pass_ks)}", []
    trained = [row for row in rows if row.name != BEFORE]
    for row in trained:
        if not found or row.intervals[accuracy].mean > found[-1].intervals[accuracy].mean:
            found.append(row)
    if len(trained) < 2:
        return []
    names = ", ".join(f"`{row.name}`" for row in found)
    return ["", f"Passed by no other in both AUC and {accuracy} (means, not tested): {names}."]


def grid_lines(entries: Sequence[Entry], board: Board) -> list[str]:
    """Which points were tried, with their score on the validation prompts."""
    lines = ["| entry | AUC on validation, each point of the grid |", "|---|---|"]
    for entry in entries:
        scores, best = point_scores(entry, board), chosen(entry, board)
        if any(score is not None for score in scores.values()):
            parts = [
                f"{'**' if best and best.point == point else ''}`{point}` {'-' if score is None else f'{score:.3f}'}"
                f"{'**' if best and best.point == point else ''}"
                for point, score in scores.items()
            ]
            lines.append(f"| `{entry.name}` | {', '.join(parts)} |")
    return lines if len(lines) > 2 else []


def plot(rows: Sequence[Row], board: Board) -> str:
    """Δ AUC with its interval, and pass@1 against pass@32 of the same rows."""
    compared = [row for row in reversed(rows) if row.differences]
    low, high = (f"pass@{pick(board.pass_ks)}" for pick in (min, max))
    marks = marks_of(rows, "AUC")
    with rc_context(STYLE):
        figure = Figure(figsize=(10, max(3.0, 1.2 + 0.26 * len(compared))), layout="constrained")
        left, right = figure.subplots(1, 2)
        for y, row in enumerate(compared):
            delta = row.differences["AUC"]
            colour = {"": BEFORE_COLOUR, f" {UP}": COLOURS[2], f" {DOWN}": COLOURS[0]}[marks[row.name]]
            left.plot([delta.low, delta.high], [y, y], color=colour, linewidth=1.6)
            left.plot([delta.mean], [y], "o", color=colour, markersize=5)
        left.axvline(0, color="#5f6368", linewidth=1)
        left.set_yticks(range(len(compared)), [row.name for row in compared])
        left.set_xlabel(f"AUC of pass@k over log k, less {board.reference}'s")
        for row in rows:
            special = {BEFORE: BEFORE_COLOUR, board.reference: COLOURS[0]}
            x, y = row.intervals[low].mean, row.intervals[high].mean
            right.plot([x], [y], "o", color=special.get(row.name, COLOURS[1]), markersize=5)
            right.annotate(row.name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        right.set_xlabel(low)
        right.set_ylabel(high)
        return svg_of(figure)


def section(board: Board, page: Path) -> tuple[list[str], list[Row]]:
    """Its lines, and its rows at the recipes' values and what is shown beside them."""
    entries = board.entries()
    best = [point for entry in entries if (point := chosen(entry, board)) is not None]
    rows = rows_of(entries, best, board)
    candidates = [each for entry in entries for each in entry.shown]
    shown = rows_among(candidates, rows)
    lines = [f"## {board.task}, {board.setting}", "", described(board), made(entries, board), ""]
    lines += ["### At the recipe's values", ""]
    lines += [*table(shown, board), *frontier(shown, board)]
    if any(row.differences for row in shown):
        picture = page.with_name(f"{page.stem}_{board.task}_{board.setting}.svg")
        picture.write_text(plot(shown, board))
        lines += ["", f"![Difference in AUC from plain GRPO, and pass@k at the ends]({picture.name})"]
    unvaried = [entry.default for entry in entries if entry.name in (BEFORE, board.reference)]
    if best and (of_best := rows_among([*unvaried, *best], rows)):
        lines += ["", f"### Best of {len(board.written['coef_factors'])}", ""]
        lines += [*table(of_best, board), *frontier(of_best, board)]
    lines += temperatures.section(candidates, board, page)
    if grid := grid_lines(entries, board):
        seeds = f"seed{'s' * (len(board.grid_seeds) > 1)} {', '.join(map(str, board.grid_seeds))}"
        lines += ["", f"Chosen on validation, {seeds}:", "", *grid]
    return [*lines, *notes(entries, board), ""], shown


def described(board: Board) -> str:
    prompts, sizes = board.layers.get("task_kwargs", {}), board.layers
    return (
        f"{prompts.get('prompts')} training prompts, {prompts.get('eval_prompts')} held out x {board.samples} samples; "
        f"{sizes.get('max_steps')} optimiser steps of {sizes.get('per_device_train_batch_size')} responses, "
        f"learning rate {sizes.get('learning_rate'):g}, steps_per_generation {sizes.get('steps_per_generation')}, "
        f"num_iterations {sizes.get('num_iterations')}."
    )


def made(entries: Sequence[Entry], board: Board) -> str:
    """The command, and when and where its runs were made."""
    by_seed = [entry.default.summaries(board.seeds, "report") for entry in entries]
    summaries = [summary for each in by_seed for summary in each.values()]
    seeds = sorted({seed for each in by_seed for seed in each})
    dates = sorted({summary["date"] for summary in summaries})
    machines = sorted({summary["machine"] for summary in summaries})
    packages = sorted({f"{name} {number}" for summary in summaries for name, number in summary["versions"].items()})
    return (
        f"Made by `python eval/leaderboard.py --task {board.task} --setting {board.setting}`, seeds "
        f"{', '.join(map(str, seeds))}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}, on {'; '.join(machines)}; "
        f"{', '.join(packages)}."
    )


def notes(entries: Sequence[Entry], board: Board) -> list[str]:
    """What a reader of the table must know about single entries."""
    lines = []
    shown = [each for entry in entries for each in entry.shown]
    missing = [f"`{each.name}`" for each in shown if not each.summaries(board.seeds, "report")]
    failed = [path.parent for path in sorted(board.folder.rglob("error.txt"))]
    brought = {entry.name: entry.default.brings() for entry in entries}
    ungridded = [entry.name for entry in entries if not entry.grid and entry.name not in (BEFORE, board.reference)]
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    if failed:
        lines.append(f"Failed: {', '.join(str(path.relative_to(board.folder)) for path in failed)}.")
    if left_out := board.left_out():
        lines.append(f"Without effect in this setting, and left out: {', '.join(left_out)}.")
    if board.without:
        lines.append(f"Cannot run on this task: {', '.join(board.without)}.")
    for name, settings in brought.items():
        if settings:
            lines.append(f"`{name}` also sets {', '.join(f'{key}: {value}' for key, value in settings.items())}.")
    if ungridded:
        lines.append(f"Without a grid: {', '.join(ungridded)}.")
    return ["", *(f"- {line}" for line in lines)] if lines else []


def write(boards: Sequence[Board], page: Path) -> list[list[Row]]:
    """The main table, and behind it a page with a section for each board that has runs; gives the boards' rows.

    Where nothing was sampled at other temperatures there is no main table, and one page.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    if not boards:
        raise ValueError("there is no finished run to make a page from")
    one = boards[0]
    lines = HEADER.format(
        ks=", ".join(map(str, one.pass_ks)),
        samples=one.samples,
        points=len(one.written["coef_factors"]),
        level=SIGNIFICANT,
        up=UP,
        down=DOWN,
        clock="of one core on a CPU, by the wall on a GPU",
    ).splitlines()
    rows_of_boards = []
    for board in boards:
        of_board, rows = section(board, page)
        lines += ["", *of_board]
        rows_of_boards.append(rows)
    if front := main_table.section(boards, page):
        behind = page.with_name(f"{page.stem}_all.md")
        page.write_text(TITLE + "\n".join([*front, BEHIND.format(name=behind.name)]) + "\n")
        lines[0] = f"{lines[0]}: all tables"
    else:
        behind = page
    behind.write_text("\n".join(lines).rstrip() + "\n")
    return rows_of_boards
