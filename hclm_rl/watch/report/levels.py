"""The levels that a run was told to hold, for the entropy's curve: targets and floors of its terms and of TRL."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from .figures import colours
from .runs import Run, is_number
from .table import group_of

TRLS = "entropy_target"
FIRST_STEPS = 5  # logged ones whose mean is the start, of which a floor is a share


@dataclass(frozen=True)
class Level:
    """A level of entropy that the run was to hold, and what to call it."""

    nats: float
    label: str


def levels_of(run: Run) -> list[Level]:
    """What its terms and settings name; of a floor that is a share of the start, the nats it means here."""
    known = run.summary or run.about
    found = list(of_terms(known.get("terms") or [], run))
    settings = run.about.get("settings")
    if isinstance(settings, Mapping) and settings.get("use_adaptive_entropy") and is_number(settings.get(TRLS)):
        found.append(Level(settings[TRLS], f"TRL's target {settings[TRLS]:g}"))
    return found


def of_terms(terms: Sequence[object], run: Run) -> Iterator[Level]:
    """The targets, floors and ceilings of entropy terms."""
    for term in terms:
        for name, given in term.items() if isinstance(term, Mapping) else ():
            given = given if isinstance(given, Mapping) else {}
            coef = given.get("coef")
            if isinstance(coef, Mapping) and is_number(coef.get("target")):
                yield Level(coef["target"], f"target of {name}, {coef['target']:g}")
            for side in ("floor", "ceiling"):
                if is_number(given.get(side)) and given.get("unit") == "nats":
                    yield Level(given[side], f"{side} of {name}, {given[side]:g}")
                elif is_number(given.get(side)) and (start := start_of(run)) is not None:
                    yield Level(given[side] * start, f"{side} of {name}, {given[side]:g} of the start")


def start_of(run: Run) -> float | None:
    """The mean entropy of the first logged steps."""
    values = run.curve("entropy")[1][:FIRST_STEPS]
    return sum(values) / len(values) if values else None


def draw_levels(axes: Axes, runs: Sequence[Run], label: str) -> list[str]:
    """Lines at the levels that the runs were told to hold, on axes of this label; gives what they are, each once."""
    if axes.get_ylabel() != label:
        return []
    palette, said = colours(runs), []
    for run in runs:
        for level in levels_of(run):
            text = level.label if len(runs) == 1 else f"{group_of(run.name)}: {level.label}"
            if text not in said:
                said.append(text)
                axes.axhline(level.nats, color=palette[group_of(run.name)], linestyle=(0, (6, 3)), linewidth=1)
    top = max((level.nats for run in runs for level in levels_of(run)), default=0.0)
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.08 * top))
    return said
