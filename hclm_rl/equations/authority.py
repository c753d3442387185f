"""Whether weights on tokens can hold a floor: what is left of a fall without all tokens that burn, in sentences"""

import math
from dataclasses import dataclass

from .ledger import Ledger, Line

SURE_BY = 3.0  # standard errors by which a fall must be left, with all weights at 0, before it is said
HELD = 0.1  # of the floor, within which the entropy is held
FIRST = 0.1  # share of the run by whose end a doubt is said
FEW = 30  # generation batches of a run, for a third of which at least the gain is not known
FAR, LONG = 0.25, 2  # of the floor, and generation batches in a row so far below it, from which on it is not held
UNTIL = (
    "what the weights do to it is known from ten generation batches on, often from tens; until then a feedback on the "
    "level acts alone"
)
HELP = "an entropy_bonus, a smaller learning rate or more prompts may slow it"


@dataclass(frozen=True)
class When:
    """Of a generation batch."""

    step: int  # optimiser steps done
    progress: float  # share of the run
    since: int  # optimiser steps since the batch before

    @property
    def whole(self) -> float:
        """Optimiser steps of the run."""
        return self.step / self.progress if self.progress > 0 else math.inf

    @property
    def is_last_of_first(self) -> bool:
        """Whether the next batch lies beyond the first tenth of the run."""
        return self.step + self.since > FIRST * self.whole


def cannot_hold(memory: dict, line: Line | None, floor: float, raising: float, removed: float) -> str:
    """Once, off the floor: that even without all that burns the entropy falls, surely, or lies below; else nothing.

    `raising`: mean influence of the tokens that raise the entropy; `removed`: share of the others that is removed.
    """
    entropy = memory["entropy"]
    if memory.get("is_warned") or abs(entropy - floor) < HELD * abs(floor):
        return ""
    change, error = (0.0, 0.0) if line is None else line.change(raising)
    if change + SURE_BY * error < 0:
        reason = f"would still change by {change:.2g} ± {error:.1g} nats per optimiser step"
    elif removed >= 1 and entropy < floor:
        reason = "still lies below"
    else:
        return ""
    memory["is_warned"] = True
    return (
        f"cannot hold the floor of {floor:.3g} nats, the entropy is {entropy:.3g}: without all tokens that burn it it "
        f"{reason}, so its fall does not come from the tokens' own updates; {HELP}"
    )


def does_not_hold(memory: dict, floor: float, removed: float, when: When) -> str:
    """Once: that the entropy has been far below the floor for some generation batches; else nothing."""
    entropy = memory["entropy"]
    memory["far_below"] = memory.get("far_below", 0) + 1 if entropy < floor - FAR * abs(floor) else 0
    if memory["far_below"] < LONG or memory.get("is_warned"):
        return ""
    memory["is_warned"] = True
    return (
        f"does not hold the floor of {floor:.3g} nats: after {when.step} optimiser steps the entropy is {entropy:.3g}, "
        f"and {max(removed, 0.0):.0%} of what burns it is removed; {HELP}"
    )


def cannot_say_yet(memory: dict, line: Line | None, floor: float, raising: float, when: When) -> str:
    """Once, at the end of the first tenth of the run: that it makes too few generation batches, or that the pace so
    far leads under the floor before the run ends, and the weights are not known to be able to stop that; else nothing.
    """
    if not when.is_last_of_first or memory.get("is_doubted") or memory.get("is_warned"):
        return ""
    memory["is_doubted"], pace = True, Ledger.pace(memory)
    can_do = line is not None and line.is_known and line.change(raising)[0] >= 0
    if can_do:
        return ""
    if when.since and (batches := round(when.whole / when.since)) < FEW:
        return (
            f"cannot say yet whether it will hold the floor of {floor:.3g} nats: this run makes {batches} generation "
            f"batches, and {UNTIL}"
        )
    if pace is None:
        return ""
    level, slope = pace
    if slope >= 0 or level + slope * (when.whole - when.step) >= floor:
        return ""
    under = when.step + math.ceil(max(level - floor, 0.0) / -slope)
    return (
        f"cannot say yet whether it will hold the floor of {floor:.3g} nats: after {when.step} of {round(when.whole)} "
        f"optimiser steps the entropy is {level:.3g} nats and falls by {-slope:.2g} a step, under the floor at "
        f"step {under}; {UNTIL}"
    )
