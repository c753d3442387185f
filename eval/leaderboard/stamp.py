"""What the leaderboard saw of a method: into the recipe's header, docs/methods.md and docs/verdicts.csv."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import yaml

from .page import Row, marks_of, measures_of
from .plan import DEFAULT, Candidate
from .statistics import DOWN, UP

NUMBERS = "# Numbers"
OF_THE_OUTPUT = {"save_strategy", "disable_tqdm"}  # a recipe has them, an entry of the board's file does not
COLUMNS = 5  # of the table of methods; the last is the verdict
VERDICTS = "verdicts.csv"  # beside that table: the numbers of its verdicts, for the pages of the methods
HEAD = ("name", "task", "verdict", "auc", "pass@1", "pass@32", "seeds", "affected")
Verdict = tuple[str, ...]  # a line of that file


def write(of_boards: Sequence[Sequence[Row]], methods: Path) -> list[str]:
    """Names of the recipes that were stamped, from each board's rows at the recipes' values.

    A recipe counts as run on a board if an entry has exactly its settings. The recipe gets the numbers of the first
    board that ran it, the table of methods the verdicts of all, in words, and the file beside it their numbers.
    """
    by_settings = [{_settings(row.candidate): row for row in rows if row.differences} for rows in of_boards]
    written = of_boards[0][0].candidate.board.written
    lines, stamped, said = methods.read_text().splitlines(), [], verdicts_of(methods.with_name(VERDICTS))
    for recipe in sorted(Path(written["recipes"]).glob("*.yaml")):
        own = yaml.safe_load(recipe.read_text())
        found: list[tuple[Row, Sequence[Row]]] = []
        for rows, known in zip(of_boards, by_settings, strict=True):
            board = rows[0].candidate.board
            as_entry = Candidate(board=board, entry=recipe.stem, point=DEFAULT, own=own, changes={})
            if row := known.get(_settings(as_entry)):
                found.append((row, rows))
        if not found:
            continue
        row, rows = found[0]
        [plain] = [each for each in rows if each.name == written["reference"]]
        recipe.write_text(with_numbers(recipe.read_text(), numbers(row, plain)))
        said[recipe.stem] = [(recipe.stem, *verdict(*each)) for each in found]
        words = in_words(said[recipe.stem])
        lines = [with_verdict(line, words) if _is_of(line, recipe.stem) else line for line in lines]
        stamped.append(recipe.stem)
    methods.write_text("\n".join(lines) + "\n")
    methods.with_name(VERDICTS).write_text(as_csv(said))
    return stamped


def verdicts_of(path: Path) -> dict[str, list[Verdict]]:
    """{method: its lines}; empty where there is no file yet."""
    found: dict[str, list[Verdict]] = {}
    if path.is_file():
        for line in list(csv.reader(io.StringIO(path.read_text())))[1:]:
            found.setdefault(line[0], []).append(tuple(line))
    return found


def as_csv(said: dict[str, list[Verdict]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([HEAD, *(line for name in sorted(said) for line in said[name])])
    return out.getvalue()


def in_words(verdicts: Sequence[Verdict]) -> str:
    """`**better**: coins, coins on-policy; no difference shown: products`"""
    where: dict[str, list[str]] = {}
    for _, task, word, *_ in verdicts:
        where.setdefault(f"**{word}**" if word in ("better", "worse") else word, []).append(task)
    return "; ".join(f"{word}: {', '.join(tasks)}" for word, tasks in where.items())


def _settings(candidate: Candidate) -> str:
    settings = candidate.run(0, "report").settings
    return yaml.safe_dump({key: value for key, value in settings.items() if key not in OF_THE_OUTPUT}, sort_keys=True)


def _is_of(line: str, name: str) -> bool:
    return line.startswith(f"| [`{name}`](../recipes/methods/{name}.yaml)")


def numbers(row: Row, plain: Row) -> list[str]:
    """The lines of a recipe's header from "# Numbers" on."""
    board = row.candidate.board
    seeds, prompts = row.seeds, board.layers["task_kwargs"]["eval_prompts"]
    labels = [each.label for each in measures_of(board)]
    table = [["", *labels], ["plain", *_cells(plain)], ["this", *_cells(row)]]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    written = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return [
        f"{NUMBERS}: seeds {', '.join(map(str, seeds))}, {prompts} held-out prompts x {board.samples}, mean ± deviation"
        " over seeds; AUC of pass@k",
        f"# over log k up to {max(board.pass_ks)}. Affected: {row.affected} of the tokens. More in docs/leaderboard.md",
        "#",
        *(f"#   {line}".rstrip() for line in written),
    ]


def _cells(row: Row) -> list[str]:
    board = row.candidate.board
    summaries = row.candidate.summaries(board.seeds, "report")
    cells = []
    for measure in measures_of(board):
        means = [measure.values(board, summary).mean() for summary in summaries.values()]
        spread = f" ± {statistics.stdev(means):.{measure.digits}f}" if len(means) > 1 else ""
        cells.append(f"{statistics.mean(means):.{measure.digits}f}{spread}")
    return cells


def with_numbers(text: str, lines: list[str]) -> str:
    """The recipe with its block "# Numbers" up to the first line that is no comment replaced."""
    found = re.search(rf"^{NUMBERS}.*\n(?:#.*\n)*", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"a recipe without a line '{NUMBERS}': {text.splitlines()[0]}")
    return text[: found.start()] + "\n".join(lines) + "\n" + text[found.end() :]


def verdict(row: Row, rows: Sequence[Row]) -> Verdict:
    """Better or worse by AUC where that is significant, and by how much: a line of the file, without the name."""
    shown = [each.label for each in measures_of(row.candidate.board)][:3]  # AUC, pass@1, pass@32
    marks = {label: marks_of(rows, label)[row.name] for label in shown}
    unmarked = "too few seeds" if math.isnan(row.differences["AUC"].p) else "no difference shown"
    word = {f" {UP}": "better", f" {DOWN}": "worse", "": unmarked}[marks["AUC"]]
    board = row.candidate.board
    where = [board.task] if board.setting == next(iter(board.written["settings"])) else [board.task, board.setting]
    differences = [f"{row.differences[label].mean:+.3f}{marks[label]}" for label in shown]
    return " ".join(where).replace("_", "-"), word, *differences, str(len(row.seeds)), row.affected


def with_verdict(line: str, words: str) -> str:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return "| " + " | ".join([*cells[: COLUMNS - 1], words]) + " |"
