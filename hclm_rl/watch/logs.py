"""Anyone's log as entries with `step`, `entropy` and the rest: ours, TRL's, verl's, W&B's, TensorBoard's, trackio's

A log is known by its end or its first line. What a quantity is called is a small table, which a flag extends.
"""

import csv
import importlib.util
import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

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


def read_entries(path: Path, extra: Names | None = None, run: str | None = None) -> list[Entry]:
    """All entries of the log at `path` so far, in the detector's names; `run`: which, where a file holds several.

    Refuses a path with no log.
    """
    if path.is_dir():
        path = file_in(path)
    if not path.is_file():
        raise ValueError(f"no log at {path}")
    if path.name.startswith("events.out.tfevents"):
        rows = tensorboard_rows(path)
    elif path.suffix in (".db", ".sqlite"):
        rows = trackio_rows(path, run)
    else:
        with path.open(errors="replace", newline="") as file:
            rows = list(rows_of(file))
    return list(renamed(rows, extra))


def file_in(folder: Path) -> Path:
    """The log in a run's folder: ours, TRL's latest, or TensorBoard's. Refuses a folder without one."""
    for pattern in ("log.jsonl", "trainer_state.json", "checkpoint-*/trainer_state.json", "**/events.out.tfevents*"):
        found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1]
    raise ValueError(f"{folder} holds no log.jsonl, no trainer_state.json and no events.out.tfevents file")


def rows_of(lines: Iterable[str]) -> Iterator[Entry]:
    """The rows of a text log: JSON lines, trainer_state.json, CSV, or a console with verl's lines."""
    lines = iter(lines)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        yield from json_rows(first, lines)
    elif "," in first and not VERL_LINE.search(first):
        yield from csv_rows(first, lines)
    else:
        yield from filter(None, map(verl_row, chained(first, lines)))


def chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    """A first line before the rest."""
    yield first
    yield from rest


def json_rows(first: str, lines: Iterable[str]) -> Iterator[Entry]:
    """One object a line; or one object over many lines, TRL's trainer_state.json."""
    whole = read_json(first)
    if whole is None:
        whole = read_json(first + "".join(lines)) or {}
    if isinstance(history := whole.get("log_history"), list):
        yield from ({"max_steps": whole.get("max_steps"), **entry} for entry in history if isinstance(entry, dict))
        return
    yield whole
    yield from filter(None, map(read_json, lines))


def read_json(line: str) -> Entry | None:
    """The object on the line; None where it holds none, as where a file grows in its middle."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def csv_rows(first: str, lines: Iterable[str]) -> Iterator[Entry]:
    """With a line of names. W&B writes "<run> - <name>", and its least and greatest beside it."""
    reader = csv.DictReader(chained(first, lines))
    for row in reader:
        yield {
            name.rpartition(" - ")[2]: value
            for name, value in row.items()
            if name and value and not name.endswith(("__MIN", "__MAX"))
        }


def verl_row(line: str) -> Entry | None:
    """`step:3 - actor/entropy:0.96 - ...`, whatever stands before it on the line."""
    found = VERL_LINE.search(ANSI.sub("", line).rstrip())
    return {"step": int(found[1]), **{name: value for name, value in VERL_PAIR.findall(found[2])}} if found else None


def tensorboard_rows(path: Path) -> list[Entry]:
    """The scalars of an event file, by tensorboard's own reader. Refuses where that is not installed."""
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
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        try:
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


def renamed(rows: Iterable[Entry], extra: Names | None = None) -> Iterator[Entry]:
    """The rows in the detector's names; `train/` and `eval/`, which trackers are sent, are left off the others."""
    names = {ours: (*(extra or {}).get(ours, ()), *theirs) for ours, theirs in NAMES.items()}
    for row in rows:
        entry = {name.removeprefix("train/"): value for name, value in row.items()}
        for ours, theirs in names.items():
            found = next((row[name] for name in theirs if row.get(name) is not None), None)
            if found is not None:
                entry[ours] = found
        yield entry
