"""Completions of the trace, token by token: each in the colour of a quantity, its numbers in the hover text.

Shown are prompts that were traced at several steps, where there are any, so that one can be followed.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..trace import prompts_in, read_trace, traced_steps
from .ranked import Ranked, ranked
from .runs import Run, is_number
from .table import by_group

STEPS, PROMPTS, RESPONSES, TOKENS = 3, 2, 4, 400  # shown at most: a run, a step, a prompt, a response
LOOKED_AT = 100  # traced steps of which the prompts are read, to find one that was asked again
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
        """The colour of a value, as CSS writes it: white where there is none."""
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
    """A token as the page shows it."""

    text: str
    hover: str
    style: str


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response as the page shows it."""

    reward: str
    tokens: list[Token]
    left_out: int  # tokens after the last one shown


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a traced step, with its responses."""

    text: str
    place: str  # to link to
    elsewhere: list[tuple[int, str]]  # the other steps that show it, and its place there
    responses: list[Response]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The section: the quantities to colour by, and [(step, [(run, prompts)])]."""

    scales: list[Scale]
    steps: list[tuple[int, list[tuple[str, list[Prompt]]]]]
    ranked: list[Ranked]  # one a quantity
    problems: list[tuple[str, str]]

    @property
    def is_followed(self) -> bool:
        """Whether some prompt is shown at several steps."""
        return any(prompt.elsewhere for _, of_runs in self.steps for _, prompts in of_runs for prompt in prompts)


def spread(steps: Sequence[int], count: int = STEPS) -> list[int]:
    """The first, the last, and evenly between: `count` of them at most."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def to_follow(asked: Mapping[int, set[str]]) -> list[int]:
    """The steps to show of {step: prompts}: those of the prompt that was asked at most steps, and others evenly."""
    steps = sorted(asked)
    often = Counter(text for texts in asked.values() for text in sorted(texts))
    text, count = max(often.items(), key=lambda each: each[1], default=("", 0))
    own = spread([step for step in steps if text in asked[step]]) if count > 1 else []
    return sorted([*own, *(step for step in spread(steps) if step not in own)][:STEPS])


def first_rows(table: pa.Table, often: Mapping[str, int]) -> list[dict]:
    """The tokens of the first responses to the first prompts, of those first that the shown steps have most `often`."""
    numbers = dict(zip(table["prompt"].to_pylist(), table["prompt_text"].to_pylist(), strict=True))
    shown = sorted(numbers, key=lambda number: (-often.get(numbers[number], 0), number))[:PROMPTS]
    rows = []
    for prompt in shown:
        of_prompt = table.filter(pc.field("prompt") == prompt)
        responses = sorted(of_prompt["response"].unique().to_pylist())[:RESPONSES]
        rows += of_prompt.filter(pc.field("response").isin(responses)).to_pylist()
    return rows


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
    """The token of a row of the trace, with its numbers and a colour for each scale."""
    numbers = [f"{name} {value:.4g}" for name, value in row.items() if name not in PLAIN and is_number(value)]
    hover = "\n".join([f"{row['token']!r}, id {row['id']}, position {row['position']}", *numbers])
    style = ";".join(f"--c{i}:{scale.colour(row.get(scale.column))}" for i, scale in enumerate(scales))
    return Token(text=row["token"].replace("\n", "\u21b5\n"), hover=hover, style=style)


def places_of(rows: Mapping[str, Mapping[int, Sequence[dict]]]) -> dict[tuple[str, int, int], tuple[str, str]]:
    """{(run, step, number of the prompt): (its place on the page, its text)}"""
    return {
        (name, step, row["prompt"]): (f"prompt-{i}-{step}-{row['prompt']}", row["prompt_text"])
        for i, (name, of) in enumerate(rows.items())
        for step, each in of.items()
        for row in each
    }


def prompts_of(
    name: str,
    step: int,
    rows: Sequence[dict],
    scales: Sequence[Scale],
    places: Mapping[tuple[str, int, int], tuple[str, str]],
) -> list[Prompt]:
    """The prompts of a traced step, each with its first responses."""
    by_prompt: dict[int, dict[int, list[dict]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], {}).setdefault(row["response"], []).append(row)
    prompts = []
    for number, responses in by_prompt.items():
        place, text = places[name, step, number]
        # where two prompts of a step have one text, the first of them
        same = {
            at: there
            for (run, at, _), (there, said) in reversed(list(places.items()))
            if run == name and at != step and said == text
        }
        shown = [
            Response(
                reward=f"{of[0]['reward']:.3g}",
                tokens=[token_of(row, scales) for row in of[:TOKENS]],
                left_out=max(len(of) - TOKENS, 0),
            )
            for of in responses.values()
        ]
        prompts.append(Prompt(text=text, place=place, elsewhere=sorted(same.items()), responses=shown))
    return prompts


def asked_at(folder: Path, steps: Sequence[int]) -> dict[int, set[str]]:
    """{step: texts of its prompts}; none of a file that cannot be read."""
    found: dict[int, set[str]] = {}
    for step in spread(steps, LOOKED_AT):
        try:
            found[step] = prompts_in(folder, step)
        except (pa.ArrowException, OSError, KeyError):
            found[step] = set()
    return found


def read_rows(folder: Path, steps: Sequence[int], often: Mapping[str, int]) -> tuple[dict[int, list[dict]], str | None]:
    """{step: tokens} as far as the files can be read, and a sentence if one cannot."""
    rows, broken = {}, []
    for step in steps:
        try:
            rows[step] = first_rows(read_trace(folder, step), often)
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
        asked = asked_at(run.folder, sorted(shared) or traced_steps(run.folder))
        steps = to_follow(asked)
        if shared and run is not traced[0]:  # all runs at the steps of the first
            steps = sorted(rows[traced[0].name]) or steps
        often = Counter(text for step in steps for text in asked.get(step, ()))
        rows[run.name], problem = read_rows(run.folder, steps, often)
        if problem:
            problems.append((run.name, problem))
    scales = scales_of([row for of in rows.values() for each in of.values() for row in each])
    places = places_of(rows)
    shown = [
        (step, [(name, prompts_of(name, step, of[step], scales, places)) for name, of in rows.items() if step in of])
        for step in sorted({step for of in rows.values() for step in of})
    ]
    return Tokens(
        scales=scales, steps=shown, ranked=[ranked(rows, scale.column) for scale in scales], problems=problems
    )
