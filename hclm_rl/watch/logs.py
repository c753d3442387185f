"""Anyone's log as entries with `step`, `entropy` and the rest: ours, TRL's, verl's, W&B's, TensorBoard's, trackio's

A log is known by its end or its first line. What a quantity is called is a small table, which a flag extends.
"""

import csv
import importlib.util
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path

from .signs import number

Entry = dict[str, object]
Names = Mapping[str, Sequence[str]]

NAMES: Names = {  # ours -> those of others, the first that a log has is taken
    "step": ("train/global_step", "step", "global_step", "training/global_step", "_step", "Step"),
    "entropy": ("entropy", "train/entropy", "actor/entropy", "actor/entropy_loss", "policy/entropy", "policy_entropy"),
    "reward": ("reward", "train/reward", "critic/rewards/mean", "critic/score/mean", "rewards/mean"),
    "learning_rate": ("learning_rate", "train/learning_rate", "actor/lr"),
    "max_steps": ("max_steps", "training/total_steps"),
}
LATEST = 3  # runs of a database that a sentence names
VERL_LINE = re.compile(r"\bstep:(\d+) - (.*)")
VERL_PAIR = re.compile(
    r"([\w./@-]+):(?:np\.\w+\()?([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf))\)?(?= - |$)", re.IGNORECASE
)
ANSI = re.compile(r"\x1b\[[0-9;]*m")
MOST_OF_A_FIELD = 2**31 - 1  # characters; csv's own limit is less than a long response


class NoLog(ValueError):
    """There is none yet."""


def read_entries(path: Path, extra: Names | None = None, run: str | None = None) -> list[Entry]:
    """All entries of the log at `path` so far, in the detector's names; `run`: which, where a file holds several.

    Refuses a path with no log.
    """
    given = path
    if path.is_dir():
        path = file_in(path)
    if not path.is_file():
        raise NoLog(f"no log at {path}")
    if path.name.startswith("events.out.tfevents"):
        rows = tensorboard_rows(path.parent if given.is_dir() else path)
    elif path.suffix in (".db", ".sqlite"):
        rows = trackio_rows(path, run)
    else:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = list(rows_of(file, run))
    return list(renamed(rows, extra))


def file_in(folder: Path) -> Path:
    """The log in a run's folder: ours, TRL's latest, or TensorBoard's. Refuses a folder without one."""
    for pattern in ("log.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json", "**/events.out.tfevents*"):
        found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1]
    raise NoLog(f"{folder} holds no log.jsonl, no trainer_state.json and no events.out.tfevents file")


def rows_of(lines: Iterable[str], run: str | None = None) -> Iterator[Entry]:
    """The rows of a text log: JSON lines, trainer_state.json, CSV, or a console with verl's lines.

    `run`: which, where a CSV has the curves of several. What is none of these is passed over, as half a line is.
    """
    lines = (line for line in lines if line.strip())
    first, second = (next(lines, "").lstrip("\ufeff") for _ in range(2))
    lines = chain([first, second], lines)
    if opens_an_object(first):
        yield from json_rows(lines)
    elif is_csv(first, second):
        yield from csv_rows(lines, run)
    else:
        yield from filter(None, map(line_row, lines))


def opens_an_object(first: str) -> bool:
    """Whether it is the beginning of an object over many lines: not all of one, and no mapping that Python printed."""
    return re.match(r"\s*\{\s*($|\")", first) is not None and read_json(first) is None


def is_csv(first: str, second: str) -> bool:
    """Whether there are names that are known, or as many values below them, a number among these.

    The lines of a console have commas too.
    """
    names, values = (next(csv.reader([line]), []) for line in (first, second))
    known = {each for theirs in NAMES.values() for each in theirs}
    if len(names) < 2 or VERL_LINE.search(first):
        return False
    return not known.isdisjoint(name.rpartition(" - ")[2] for name in names) or (
        len(names) == len(values) and any(number(each) is not None for each in values)
    )


def line_row(line: str) -> Entry | None:
    """One line of a log in lines: an object, or verl's."""
    return read_json(line) if line.lstrip().startswith("{") else verl_row(line)


def json_rows(lines: Iterable[str]) -> Iterator[Entry]:
    """One object over many lines, TRL's trainer_state.json; else what of the lines can be read."""
    kept = list(lines)
    whole = read_json("".join(kept))
    if whole is None:
        yield from filter(None, map(line_row, kept))
    else:
        yield whole


def read_json(line: str) -> Entry | None:
    """The object on the line; None where it holds none, as where a file grows in its middle."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # also a whole number of thousands of digits
        return None
    return found if isinstance(found, dict) else None


def csv_rows(lines: Iterable[str], run: str | None) -> Iterator[Entry]:
    """With a line of names. W&B writes "<run> - <name>", and its least and greatest beside it.

    Refuses the curves of several runs of which none is named, and another run's name.
    """
    csv.field_size_limit(MOST_OF_A_FIELD)
    reader = csv.DictReader(lines)
    names = {name: name.rpartition(" - ") for name in reader.fieldnames or () if not name.endswith(("__MIN", "__MAX"))}
    runs = list(dict.fromkeys(of for of, _, _ in names.values() if of))
    if runs and run not in runs and (run is not None or len(runs) > 1):
        asked = "several runs" if run is None else f"no run '{run}'"
        raise ValueError(f"the log has the curves of {asked}: name one with --run, of {', '.join(runs)}")
    for row in reader:
        yield {name: row[whole] for whole, (of, _, name) in names.items() if row[whole] and of in ("", run or of)}


def verl_row(line: str) -> Entry | None:
    """`step:3 - actor/entropy:0.96 - ...`, whatever stands before it on the line."""
    found = VERL_LINE.search(ANSI.sub("", line).rstrip())
    return {"step": int(found[1]), **{name: value for name, value in VERL_PAIR.findall(found[2])}} if found else None


def tensorboard_rows(path: Path) -> list[Entry]:
    """The scalars of an event file, or of all in a folder, by tensorboard's own reader.

    Refuses where that is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(f"reading {path.name} needs TensorBoard's reader: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    by_step: dict[int, Entry] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            by_step.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [by_step[step] for step in sorted(by_step)]


def trackio_rows(path: Path, run: str | None) -> list[Entry]:
    """The metrics of one run of a project's database, by default the latest.

    Refuses another run's name, and what is no database of trackio's.
    """
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            known = [
                name for (name,) in database.execute("SELECT run_name FROM metrics GROUP BY run_name ORDER BY max(id)")
            ]
            if run is not None and run not in known:
                latest = ", ".join(known[-LATEST:]) or "none"
                more = f", the latest of {len(known)}" if len(known) > LATEST else ""
                raise ValueError(f"{path.name} has no run '{run}'; it has {latest}{more}")
            rows = database.execute(
                "SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (run or (known or [""])[-1],)
            ).fetchall()
    except sqlite3.Error as error:
        raise ValueError(f"{path} is no database of trackio's: {error}") from error
    return [{"step": step, **(read_json(metrics) or {})} for step, metrics in rows]


def unfolded(row: Entry) -> list[Entry]:
    """The entries of TRL's log, which lie within one object."""
    if not isinstance(history := row.get("log_history"), list):
        return [row]
    return [{"max_steps": row.get("max_steps"), **entry} for entry in history if isinstance(entry, dict)]


def renamed(rows: Iterable[Entry], extra: Names | None = None) -> Iterator[Entry]:
    """The rows in the detector's names; `train/` and `eval/`, which trackers are sent, are left off the others."""
    names = {ours: (*(extra or {}).get(ours, ()), *theirs) for ours, theirs in NAMES.items()}
    for row in chain.from_iterable(map(unfolded, rows)):
        entry = {name.removeprefix("train/"): value for name, value in row.items()}
        for ours, theirs in names.items():
            found = next((row[name] for name in theirs if row.get(name) is not None), None)
            if found is not None:
                entry[ours] = found
        yield entry
