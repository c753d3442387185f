"""What the detector sees of a run: every optimiser step, whatever `logging_steps` is"""

import json
from pathlib import Path
from typing import Any

from ..watch.callback import CollapseCallback

NAME = "collapse.json"  # in a checkpoint: what its detectors have seen


class EveryStep:
    """Reads what TRL collects for its next log entry: the means over what is new since the last call."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seen: dict[str, tuple[list[float], int]] = {}  # by metric: TRL's list, and how much of it was read

    def __call__(self) -> dict[str, float]:
        """`entropy` in nats, over the step's micro-batches, `reward` where a rollout was scored, `learning_rate`."""
        found = {"learning_rate": self.trainer._get_learning_rate()}
        for name in ("entropy", "reward"):
            if new := self.new(name):
                found[name] = sum(new) / len(new)
        return found

    def new(self, name: str) -> list[float]:
        """TRL starts a new list after each log entry."""
        values = self.trainer._metrics["train"].get(name, [])
        before, count = self.seen.get(name, (values, 0))
        self.seen[name] = values, len(values)
        return values[count if before is values else 0 :]


def detectors(trainer: Any) -> list[CollapseCallback]:
    """Those of the run, in the order in which they are called."""
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, CollapseCallback)]


def show_every_step(trainer: Any) -> None:
    """Lets the detectors see every optimiser step of this trainer."""
    for each in detectors(trainer):
        each.measured = EveryStep(trainer)


def save_detectors(trainer: Any, folder: Path) -> None:
    """Writes what they have seen into a checkpoint."""
    (folder / NAME).unlink(missing_ok=True)
    if kept := [each.kept() for each in detectors(trainer)]:
        (folder / NAME).write_text(json.dumps(kept))


def resume_detectors(trainer: Any, checkpoint: str | None) -> None:
    """Lets them go on from a checkpoint; one that has nothing for them, or something damaged, leaves them the log."""
    try:
        kept = [] if checkpoint is None else json.loads((Path(checkpoint) / NAME).read_text())
    except (OSError, ValueError):
        kept = []
    own = detectors(trainer)
    for each, found in zip(own, kept if len(kept) == len(own) else [None] * len(own), strict=True):
        each.resumed = found
