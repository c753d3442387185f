"""`hclm-rl watch PATH|-`: what the entropy of a run does, from its log or another library's, without torch"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..watch.collapse import STATES, CollapseDetector, State, Verdict
from ..watch.logs import NAMES, Entry, Names, NoLog, read_entries, renamed, rows_of
from ..watch.signs import number

EPILOG = """exit status: 0 healthy or warning, 1 collapsing, collapsed or exploding, 2 the log cannot be read.
The words are defined in docs/words.md."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hclm-rl watch",
        description="Says healthy, warning, collapsing, collapsed or exploding of the entropy in a log.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "path",
        help="a run's folder, log.jsonl, trainer_state.json, a console log of verl's, a CSV or JSONL export of W&B, a "
        "TensorBoard event file, a trackio database; - reads lines from the standard input",
    )
    for ours in NAMES:
        parser.add_argument(f"--{ours}", metavar="NAME", help=f"what {ours} is called there, as in actor/{ours}")
    parser.add_argument(
        "--run",
        help="which run, where a trackio database or a CSV of W&B's holds several; default: a database's latest",
    )
    parser.add_argument(
        "--follow", action="store_true", help="go on as the log grows, until an alarm that ends the run"
    )
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks with --follow")
    parser.add_argument(
        "--idle", type=float, default=0.0, help="end --follow after so many seconds of no growth; 0: never"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: the state, and every change of it")
    return parser


class Watcher:
    """Reads entries as they come and tells every change of state. Where steps begin anew it is another run."""

    def __init__(self, tell: Callable[[dict], None]) -> None:
        self.detector, self.tell = CollapseDetector(), tell
        self.runs = self.passed = 0  # runs that are over; entries of this look whose steps were not new
        self.seen: dict[str, None] = {}  # the names of the log, in their order
        self.begin()

    def begin(self) -> None:
        """With nothing known of the run."""
        self.state: State = self.detector.initial_state()
        self.verdict, self.step, self.last = Verdict(state="healthy"), -1, 0.0
        self.changes: list[dict] = []
        self.entropies = 0

    def read(self, entries: Iterable[Entry]) -> bool:
        """A look at a log from its beginning; whether one of its entries was new."""
        grew, run, first, highest, self.passed = False, 0, -1, -1, 0
        for entry in entries:
            self.seen |= dict.fromkeys(entry)
            step, entropy = number(entry.get("step")), number(entry.get("entropy"))
            if step is None or step < 0 or entropy is None or entropy < 0:
                continue
            at = int(step)
            if at <= first and at < highest:
                run, highest = run + 1, -1
            self.passed += at <= highest
            if highest < 0:
                first = at
            highest = max(highest, at)
            if run > self.runs:
                self.runs = run
                self.begin()
            if run == self.runs and at > self.step:
                self.take(entry, at)
                grew = True
        return grew

    def take(self, entry: Entry, step: int) -> None:
        """An entry that is new."""
        self.step, self.entropies = step, self.entropies + 1
        self.last = number(entry.get("max_steps")) or 0.0
        before = self.verdict.state
        self.verdict, self.state = self.detector.update(entry, step, self.state)
        if self.verdict.state != before:
            self.changes.append(told(step, self.verdict))
            self.tell(self.changes[-1])

    @property
    def notes(self) -> list[str]:
        """What of the log was not looked at."""
        found = []
        if self.runs:
            found.append(f"the steps begin anew: of {self.runs + 1} runs the last is told")
        if self.passed:
            found.append(f"{self.passed} entries were passed over: their steps are not above those before them")
        return found

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for: the run is at its end, or the entropy is."""
        return self.verdict.ends or 0 < self.last <= self.step

    def missing(self, path: str) -> str:
        """What a log without what is needed lacks."""
        if not Path(path).exists() and path != "-":
            return f"no log at {path}"
        if not self.seen:
            return f"{path} holds no entry of a log that is known: see hclm-rl watch --help"
        lacks = "step" if "step" not in self.seen else "entropy"
        if lacks in self.seen:
            return f"no entry of {path} has an entropy that is a number from 0 on, and a step"
        near = [name for name in self.seen if lacks in name.lower()] or list(self.seen)
        return f"no {lacks} in {path}: give its name with --{lacks} NAME; the log has {', '.join(near[:12])}"


def until_over(entries: Iterable[Entry], watcher: Watcher) -> Iterator[Entry]:
    """Those of a stream up to the one after which there is nothing to wait for."""
    for entry in entries:
        yield entry
        if watcher.is_over:
            return


def told(step: int, verdict: Verdict) -> dict:
    return {"step": step, "state": verdict.state, "causes": list(verdict.causes), "signs": list(verdict.signs)}


def looks(path: str, options: argparse.Namespace, extra: Names) -> Iterator[Iterable[Entry]]:
    """The entries of the log, once; again and again with --follow, where what was seen is passed over."""
    if path == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield renamed(rows_of(sys.stdin, options.run), extra)
        return
    has_told = False
    while True:
        try:
            entries = read_entries(Path(path), extra, options.run)
        except NoLog as error:
            if not options.follow:
                raise
            if not has_told:
                print(f"{error}: waiting for it", file=sys.stderr)
            entries, has_told = [], True
        yield entries
        if not options.follow:
            return
        time.sleep(options.every)


def main(arguments: Sequence[str]) -> int:
    options = make_parser().parse_args(arguments)
    if options.every <= 0 or options.idle < 0:
        raise ValueError(f"--every must be above 0 and --idle at least 0, got {options.every} and {options.idle}")
    extra = {ours: [name] for ours in NAMES if (name := getattr(options, ours))}

    def tell(change: dict) -> None:
        said = *change["causes"], *change["signs"]
        if not options.json:
            print(
                f"step {change['step']}: " + "; ".join((f"the entropy: {change['state']}", *said)),
                flush=True,
            )

    watcher, quiet = Watcher(tell), 0.0
    for entries in looks(options.path, options, extra):
        if options.path == "-" and options.follow:
            entries = until_over(entries, watcher)
        quiet = 0.0 if watcher.read(entries) else quiet + options.every
        if watcher.is_over or (options.idle and quiet >= options.idle):
            break
    if not watcher.entropies:
        raise ValueError(watcher.missing(options.path))
    now = told(watcher.step, watcher.verdict)
    if options.json:
        now |= {"entries": watcher.entropies, "number": STATES.index(watcher.verdict.state), "changes": watcher.changes}
        now |= {"notes": watcher.notes}
        print(json.dumps(now))
    else:
        print(*watcher.notes, sep="\n", end="\n" * bool(watcher.notes), file=sys.stderr)
        entries = "entry" if watcher.entropies == 1 else "entries"
        print(f"{watcher.entropies} {entries}, at step {watcher.step} the entropy: {watcher.verdict.state}")
    return int(watcher.verdict.is_alarm)
