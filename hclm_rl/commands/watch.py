"""`hclm-rl watch PATH|-`: what the entropy of a run does, from its log or another library's, without torch"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..watch.collapse import STATES, CollapseDetector, State, Verdict
from ..watch.logs import NAMES, Entry, Names, read_entries, renamed, rows_of
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
    parser.add_argument("--run", help="which run, where a trackio database holds several; default: the latest")
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
    """Reads entries as they come and tells every change of state."""

    def __init__(self, tell: Callable[[dict], None]) -> None:
        self.detector, self.tell = CollapseDetector(), tell
        self.state: State = self.detector.initial_state()
        self.verdict, self.step, self.last = Verdict(state="healthy"), 0, 0.0
        self.changes: list[dict] = []
        self.entropies = 0
        self.seen: dict[str, None] = {}  # the names of the log, in their order

    def read(self, entries: Iterable[Entry]) -> bool:
        """Whether one of them was new."""
        grew = False
        for entry in entries:
            self.seen |= dict.fromkeys(entry)
            step, entropy = number(entry.get("step")), number(entry.get("entropy"))
            if step is None or entropy is None or step <= self.state.get("step", -1):
                continue
            grew, self.step, self.entropies = True, int(step), self.entropies + 1
            self.last = number(entry.get("max_steps")) or 0.0
            before = self.verdict.state
            self.verdict, self.state = self.detector.update(entry, self.step, self.state)
            if self.verdict.state != before:
                self.changes.append(told(self.step, self.verdict))
                self.tell(self.changes[-1])
        return grew

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for: the run is at its end, or the entropy is."""
        return self.verdict.ends or 0 < self.last <= self.step

    def missing(self, path: str) -> str:
        """What a log without what is needed lacks."""
        if not self.seen:
            return f"{path} holds no entry of a log that is known: see hclm-rl watch --help"
        lacks = "step" if "step" not in self.seen else "entropy"
        near = [name for name in self.seen if lacks in name.lower()] or list(self.seen)
        return f"no {lacks} in {path}: give its name with --{lacks} NAME; the log has {', '.join(near[:12])}"


def told(step: int, verdict: Verdict) -> dict:
    return {"step": step, "state": verdict.state, "causes": list(verdict.causes), "signs": list(verdict.signs)}


def looks(path: str, options: argparse.Namespace, extra: Names) -> Iterator[Iterable[Entry]]:
    """The entries of the log, once; again and again with --follow, where what was seen is passed over."""
    if path == "-":
        yield renamed(rows_of(sys.stdin), extra)
        return
    yield read_entries(Path(path), extra, options.run)
    while options.follow:
        time.sleep(options.every)
        yield read_entries(Path(path), extra, options.run)


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
        quiet = 0.0 if watcher.read(entries) else quiet + options.every
        if watcher.is_over or (options.idle and quiet >= options.idle):
            break
    if not watcher.entropies:
        raise ValueError(watcher.missing(options.path))
    now = told(watcher.step, watcher.verdict)
    if options.json:
        now |= {"entries": watcher.entropies, "number": STATES.index(watcher.verdict.state), "changes": watcher.changes}
        print(json.dumps(now))
    else:
        print(f"{watcher.entropies} entries, at step {watcher.step} the entropy: {watcher.verdict.state}")
    return int(watcher.verdict.is_alarm)
