"""Before and after, side by side: runs of one name but different seeds ("plain, seed 1") make one column."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Run

MEASURES = {
    "token_entropy": "token entropy (nats)",
    "pass@1": "pass@1",
    "pass@8": "pass@8",
    "pass@32": "pass@32",
    "distinct_correct": "distinct right answers per prompt",
    "answer_entropy": "answer entropy (nats)",
}


@dataclass(frozen=True, kw_only=True)
class Value:
    """A mean and how uncertain it is: over prompts for one run, between seeds for several."""

    mean: float
    error: float | None  # None of a single prompt


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page, its cells as text."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]  # a measure's label, and its value in each column
    caption: str


def group_of(name: str) -> str:
    """The part of a run's name that its other seeds share: `plain` of `plain, seed 1`."""
    return re.sub(r", *seed +\d+$", "", name)


def by_group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that are seeds of one, by their common name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(group_of(run.name), []).append(run)
    return groups


def value_of(runs: Sequence[Run], when: str, measure: str) -> Value | None:
    """`when` is "before" or "after"; None where no run measured it."""
    measured = [each for run in runs if (each := run.summary.get(when)) and measure in each["means"]]
    means = [each["means"][measure] for each in measured]
    if not means:
        return None
    if len(means) == 1:
        error = measured[0]["standard_errors"][measure]
        return Value(mean=means[0], error=None if math.isnan(error) else error)
    return Value(mean=statistics.mean(means), error=statistics.stdev(means))


def described(runs: Sequence[Run], when: str) -> str | None:
    """What a column's values are of; None where nothing was measured."""
    measured = [run.summary[when] for run in runs if run.summary.get(when)]
    if not measured:
        return None
    prompts, samples = (
        " or ".join(map(str, sorted({each[key] for each in measured}))) for key in ("prompts", "samples")
    )
    seeds = len(measured)
    spread = f"standard deviation over {seeds} seeds" if seeds > 1 else "standard error over prompts"
    return f"{prompts} prompt{'s' * (prompts != '1')}, {samples} responses each, ± {spread}"


def written(values: Sequence[Value | None]) -> list[str]:
    """A row's values with equally many decimals; "-" where nothing was measured."""
    digits = 3 if max((abs(value.mean) for value in values if value), default=0.0) < 1.05 else 2

    def one(value: Value) -> str:  # a single prompt has no error
        return f"{value.mean:.{digits}f}" + ("" if value.error is None else f" ± {value.error:.{digits}f}")

    return [one(value) if value else "-" for value in values]


def change(measure: str, before: float, after: float) -> str:
    """A difference in the measure's own unit: of a share in points, a hundredth each."""
    label, _, unit = MEASURES[measure].partition(" (")
    if measure.startswith("pass@"):
        said = f"{100 * (after - before):+.1f} points"
    else:
        said = f"{after - before:+.2f}{' ' + unit.rstrip(')') if unit else ''}"
    return f"{label} {said}".replace("-", "\u2212")


def changes(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(group, what training did to it) for what control is about: entropy, success and diversity."""
    said = []
    for name, of in by_group(runs).items():
        parts = []
        for measure in ("token_entropy", "pass@1", "pass@32", "distinct_correct"):
            before, after = value_of(of, "before", measure), value_of(of, "after", measure)
            if before and after:
                parts.append(change(measure, before.mean, after.mean))
        if parts:
            said.append((name, ", ".join(parts)))
    return said


def compare(runs: Sequence[Run]) -> Table | None:
    """One column "before" if all groups started alike, and one a group after training, where it was measured."""
    groups = by_group(runs)
    starts = {name: [value_of(of, "before", measure) for measure in MEASURES] for name, of in groups.items()}
    known = [start for start in starts.values() if any(start)]
    columns: list[tuple[str, Sequence[Run], str]] = []
    if known and all(start == known[0] for start in known):
        one = next(of for name, of in groups.items() if any(starts[name]))
        columns.append(("before", one, "before"))
    else:
        columns += [(f"{name}, before", of, "before") for name, of in groups.items()]
    columns += [(f"{name}, after", of, "after") for name, of in groups.items()]
    columns = [each for each in columns if any(value_of(each[1], each[2], measure) for measure in MEASURES)]
    values = {label: [value_of(of, when, m) for _, of, when in columns] for m, label in MEASURES.items()}
    rows = [(label, written(row)) for label, row in values.items() if any(row)]
    if not rows:
        return None
    said = {name: text for name, of, when in columns if (text := described(of, when))}
    alike = set(said.values())
    each = alike.pop() if len(alike) == 1 else "; ".join(f"{name}: {text}" for name, text in said.items())
    caption = f"Held out, at the training temperature: {each}."
    return Table(columns=[name for name, _, _ in columns], rows=rows, caption=caption)


LOGGED = {
    "entropy": "token entropy (nats)",
    "reward": "mean reward",
    "completions/mean_length": "mean length (tokens)",
}
PART = 10  # of the steps up to there, the last part is averaged


def at_equal_steps(runs: Sequence[Run]) -> Table | None:
    """What several runs logged up to the last step that all of them reached; None for a single one."""
    reached = {run.name: max(run.curve("entropy")[0], default=0) for run in runs}
    if len(runs) < 2 or not (step := min(reached.values())):
        return None
    groups, start = by_group(runs), step - max(step // PART, 1)
    rows = []
    for key, label in LOGGED.items():
        of_group = [
            [mean for run in of if (mean := mean_of(run, key, start, step)) is not None] for of in groups.values()
        ]
        if any(of_group):
            values = [Value(mean=statistics.mean(of), error=spread(of)) if of else None for of in of_group]
            rows.append((label, written(values)))
    caption = f"Training prompts, mean over steps {start + 1} to {step}"
    if any(len(of) > 1 for of in groups.values()):
        caption += ", \u00b1 standard deviation over seeds"
    if len(set(reached.values())) > 1:
        lengths = ", ".join(f"{name} to step {last}" for name, last in reached.items())
        caption += f". The runs are not equally long ({lengths}): compared is what all of them have"
    return Table(columns=list(groups), rows=rows, caption=f"{caption}.")


def mean_of(run: Run, key: str, start: int, end: int) -> float | None:
    """Of what was logged after `start` and up to `end`; of the last before, where nothing was."""
    points = [point for point in zip(*run.curve(key), strict=True) if point[0] <= end]
    late = [value for step, value in points if step > start] or [value for _, value in points[-1:]]
    return statistics.mean(late) if late else None


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of several values; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None
