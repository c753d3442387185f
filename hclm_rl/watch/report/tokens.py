"""Completions of the trace, token by token: each in the colour of a quantity, its numbers in the hover text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..trace import read_trace, traced_steps
from .runs import Run, is_number
from .table import by_group

STEPS, PROMPTS, RESPONSES, TOKENS = 3, 2, 4, 400  # shown at most: a run, a step, a prompt, a response
QUANTITIES = 10  # to choose from, at most
LOW, HIGH = (213, 94, 0), (0, 114, 178)  # the colour of little or negative, and that of much
OWN = {"entropy": "entropy", "weight": "weight", "advantage": "advantage"}  # column -> its name on the page
PLAIN = ("prompt", "response", "position", "id", "token", "prompt_text", "reward")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers to colours: white at `white`, LOW below it and HIGH above, full at `reach` from it."""

    column: str
    label: str
    white: float
    reach: float
    is_never_negative: bool = False

    def colour(self, value: float | None) -> str:
        if value is None or not is_number(value):
            return "#fff"
        part = max(-1.0, min(1.0, (value - self.white) / self.reach))
        full = HIGH if part > 0 else LOW
        red, green, blue = (round(255 + 0.75 * abs(part) * (channel - 255)) for channel in full)
        return f"#{red:02x}{green:02x}{blue:02x}"

    def legend(self) -> list[tuple[str, str]]:
        """(colour, what it means)"""
        low, high = self.white - self.reach, self.white + self.reach
        below = [] if self.white == 0 and self.is_never_negative else [(self.colour(low), f"\u2264 {low:.3g}")]
        return [*below, (self.colour(self.white), f"{self.white:.3g}"), (self.colour(high), f"\u2265 {high:.3g}")]


@dataclass(frozen=True, kw_only=True)
class Token:
    text: str
    hover: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Response:
    reward: str
    tokens: list[Token]
    left_out: int  # tokens after the last one shown


@dataclass(frozen=True, kw_only=True)
class Prompt:
    text: str
    responses: list[Response]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The section: the quantities to colour by, and [(step, [(run, prompts)])]."""

    scales: list[Scale]
    steps: list[tuple[int, list[tuple[str, list[Prompt]]]]]
    problems: list[tuple[str, str]]


def spread(steps: Sequence[int], count: int = STEPS) -> list[int]:
    """The first, the last, and evenly between: `count` of them at most."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def first_rows(table: pa.Table) -> list[dict]:
    """The tokens of the first responses to the first prompts."""
    kept: list[int] = []
    for prompt in sorted(table["prompt"].unique().to_pylist())[:PROMPTS]:
        of_prompt = table.filter(pc.field("prompt") == prompt)
        kept += sorted(of_prompt["response"].unique().to_pylist())[:RESPONSES]
    return table.filter(pc.field("response").isin(kept)).to_pylist()


def scales_of(rows: Sequence[dict]) -> list[Scale]:
    """A scale for each quantity that is not the same in all tokens, common to all runs and steps."""
    columns = dict.fromkeys(column for row in rows for column in row)
    wanted = [*(column for column in OWN if column in columns), *(column for column in columns if "/" in column)]
    # what a term says of the tokens it is about comes before which tokens it changed
    wanted.sort(key=lambda column: column.endswith("/affected"))
    found = []
    for column in wanted:
        values = [row[column] for row in rows if is_number(row.get(column))]
        if not values or len(set(values)) == 1:
            continue
        white = 1.0 if column == "weight" else 0.0
        away = sorted(abs(value - white) for value in values)
        reach = away[round(0.98 * (len(away) - 1))] or away[-1]
        label = OWN.get(column, column)
        found.append(Scale(column=column, label=label, white=white, reach=reach, is_never_negative=min(values) >= 0))
    return found[:QUANTITIES]


def token_of(row: dict, scales: Sequence[Scale]) -> Token:
    numbers = [f"{name} {value:.4g}" for name, value in row.items() if name not in PLAIN and is_number(value)]
    hover = "\n".join([f"{row['token']!r}, id {row['id']}, position {row['position']}", *numbers])
    style = ";".join(f"--c{i}:{scale.colour(row.get(scale.column))}" for i, scale in enumerate(scales))
    return Token(text=row["token"].replace("\n", "\u21b5\n"), hover=hover, style=style)


def prompts_of(rows: Sequence[dict], scales: Sequence[Scale]) -> list[Prompt]:
    by_prompt: dict[int, dict[int, list[dict]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {}).setdefault(row["response"], []).append(row)
    prompts = []
    for responses in by_prompt.values():
        shown = [
            Response(
                reward=f"{of[0]['reward']:.3g}",
                tokens=[token_of(row, scales) for row in of[:TOKENS]],
                left_out=max(len(of) - TOKENS, 0),
            )
            for of in responses.values()
        ]
        prompts.append(Prompt(text=next(iter(responses.values()))[0]["prompt_text"], responses=shown))
    return prompts


def read_rows(folder: Path, steps: Sequence[int]) -> tuple[dict[int, list[dict]], str | None]:
    """{step: tokens} as far as the files can be read, and a sentence if one cannot."""
    rows, broken = {}, []
    for step in steps:
        try:
            rows[step] = first_rows(read_trace(folder, step))
        except (pa.ArrowException, OSError, KeyError):
            broken.append(str(step))
    return rows, f"The trace of step {', '.join(broken)} is incomplete and left out." if broken else None


def tokens(runs: Sequence[Run]) -> Tokens | None:
    """The first run of each group that has a trace; None if none has."""
    known = [next((run for run in of if traced_steps(run.folder)), None) for of in by_group(runs).values()]
    traced = [run for run in known if run is not None]
    if not traced:
        return None
    shared = set.intersection(*(set(traced_steps(run.folder)) for run in traced))
    rows: dict[str, dict[int, list[dict]]] = {}
    problems = []
    for run in traced:
        rows[run.name], problem = read_rows(run.folder, spread(sorted(shared) or traced_steps(run.folder)))
        if problem:
            problems.append((run.name, problem))
    scales = scales_of([row for of in rows.values() for each in of.values() for row in each])
    steps = sorted({step for of in rows.values() for step in of})
    shown = [
        (step, [(name, prompts_of(of[step], scales)) for name, of in rows.items() if step in of]) for step in steps
    ]
    return Tokens(scales=scales, steps=shown, problems=problems)
