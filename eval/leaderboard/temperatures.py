"""Is a policy better, or only less sharp? pass@1 against the area under pass@k as the sampling temperature moves.

A lower temperature trades coverage for pass@1, as training does. So two policies are compared where they have the same
pass@1, each at the temperature that gives it.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy import ndarray

from hclm_rl.watch.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of

from .plan import BEFORE, Board, Candidate
from .statistics import Difference, area_over_log_k, paired_difference, pass_curve


@dataclass(frozen=True, kw_only=True)
class Point:
    accuracy: float  # pass@1, mean over prompts
    areas: Float[ndarray, "P"]  # under pass@k over log k, of each prompt

    @property
    def area(self) -> float:
        return float(self.areas.mean())


Curve = dict[float, Point]  # by temperature, ascending
Curves = dict[int, Curve]  # by seed
Areas = dict[int, Float[ndarray, "P"]]  # by seed, where policies have the same pass@1

ALT = "pass@1 against AUC: a ring at the training temperature, colder to the right"
EXPLAINED = """\
Sampling colder trades coverage for pass@1, as training does. Each cell: pass@1, AUC of the same trained policies
sampled at that temperature (trained at {trained:g}), mean over seeds. **Matched**: AUC at the temperature, between the
measured ones, at which the policy has the pass@1 that `{reference}` has at {trained:g} on the same seed, mean ±
deviation over seeds (`{reference}` itself: all of its); a dash where it has that at none of them. **Δ**: its difference
from `{reference}` and from the first row, paired as above (the temperature is taken as known; not corrected for the
number of rows)."""


def curve_of(summary: dict, board: Board) -> Curve:
    """At the training temperature and those measured beside it."""
    beside = {float(at): measured["correct"] for at, measured in summary.get("at_temperature", {}).items()}

    def point(correct: Sequence[int]) -> Point:
        curve = pass_curve(np.array([correct]), board.samples, board.pass_ks)
        return Point(accuracy=float(curve[0].mean()), areas=area_over_log_k(curve, board.pass_ks)[0])

    all_of = beside | {board.trained_at: summary["per_prompt"]["correct"]}
    return {at: point(all_of[at]) for at in sorted(all_of)}


def areas_at(curve: Curve, accuracy: float) -> Float[ndarray, "P"] | None:
    """Where pass@1 is `accuracy`, between the two neighbours in temperature; None where it is nowhere."""
    for cold, warm in itertools.pairwise(curve.values()):
        if warm.accuracy <= accuracy <= cold.accuracy:
            width = cold.accuracy - warm.accuracy
            share = (cold.accuracy - accuracy) / width if width > 0 else 0.0
            return cold.areas + share * (warm.areas - cold.areas)
    return None


def curves_of(candidates: Sequence[Candidate], board: Board) -> dict[str, Curves]:
    """Name -> those of its seeds, one temperature or more."""
    return {
        each.name: {seed: curve_of(of, board) for seed, of in each.summaries(board.seeds, "report").items()}
        for each in candidates
    }


def at_several(found: dict[str, Curves]) -> dict[str, Curves]:
    """What was measured beside the training temperature."""
    kept = {name: {seed: of for seed, of in curves.items() if len(of) > 1} for name, curves in found.items()}
    return {name: curves for name, curves in kept.items() if curves}


def mean_curve(curves: Curves) -> dict[float, tuple[float, float]]:
    """pass@1 and area at the temperatures that all seeds have."""
    shared = set.intersection(*(set(curve) for curve in curves.values()))
    points = {at: [curve[at] for curve in curves.values()] for at in sorted(shared)}
    return {
        at: (statistics.mean(each.accuracy for each in of), statistics.mean(each.area for each in of))
        for at, of in points.items()
    }


def matched(curves: Curves, reference: dict[int, Point]) -> Areas:
    """Those at the reference's pass@1 on the same seed; empty unless every seed has it."""
    found = {seed: areas_at(curve, reference[seed].accuracy) for seed, curve in curves.items() if seed in reference}
    areas = {seed: of for seed, of in found.items() if of is not None}
    return areas if len(areas) == len(found) else {}


def difference(ours: Areas, others: Areas) -> Difference | None:
    """On the seeds of both; None where there is none."""
    shared = sorted(ours.keys() & others.keys())
    if ours is others or not shared:
        return None
    left, right = (np.stack([of[seed] for seed in shared]) for of in (ours, others))
    return paired_difference(left, right)


def written(of: Difference | None) -> str:
    return "-" if of is None else of.written(3, "+")


def table(found: dict[str, Curves], reference: dict[int, Point], board: Board) -> list[str]:
    temperatures = sorted({at for curves in found.values() for at in mean_curve(curves)})
    areas = {name: matched(curves, reference) for name, curves in found.items()}
    areas[board.reference] = {seed: point.areas for seed, point in reference.items()}
    means = {name: [float(area.mean()) for area in of.values()] for name, of in areas.items()}
    names = sorted(found, key=lambda name: -statistics.mean(means[name] or [0.0]))
    head = ["entry", "matched", f"Δ `{board.reference}`", "Δ first", *(f"T {at:g}" for at in temperatures), "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        curve, of = mean_curve(found[name]), means[name]
        spread = f" ± {statistics.stdev(of):.3f}" if len(of) > 1 else ""
        cells = [name if name == BEFORE else f"`{name}`", f"{statistics.mean(of):.3f}{spread}" if of else "-"]
        cells += [written(difference(areas[name], areas[other])) for other in (board.reference, names[0])]
        cells += [f"{curve[at][0]:.3f}, {curve[at][1]:.3f}" if at in curve else "-" for at in temperatures]
        lines.append("| " + " | ".join([*cells, ", ".join(map(str, sorted(found[name])))]) + " |")
    return lines


def plot(found: dict[str, Curves], board: Board) -> str:
    """A line each, cold at the right; the ring is the training temperature."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for i, (name, curves) in enumerate(found.items()):
            colour = BEFORE_COLOUR if name == BEFORE else COLOURS[i % len(COLOURS)]
            curve = mean_curve(curves)
            axes.plot(*zip(*curve.values(), strict=True), "o-", color=colour, markersize=3, label=name)
            axes.plot(*curve[board.trained_at], "o", color=colour, markersize=9, fillstyle="none")
        axes.set_xlabel(f"pass@{min(board.pass_ks)}")
        axes.set_ylabel("AUC of pass@k over log k")
        axes.legend(fontsize=7)
        return svg_of(figure)


def section(candidates: Sequence[Candidate], board: Board, page: Path) -> list[str]:
    """Its lines on the page, with the plot beside it; none where nothing was measured so."""
    curves = curves_of(candidates, board)
    if not (found := at_several(curves)):
        return []
    reference = {seed: of[board.trained_at] for seed, of in curves.get(board.reference, {}).items()}
    picture = page.with_name(f"{page.stem}_{board.task}_{board.setting}_temperatures.svg")
    picture.write_text(plot(found, board))
    explained = EXPLAINED.format(trained=board.trained_at, reference=board.reference)
    return [
        "",
        "### At other temperatures",
        "",
        explained,
        "",
        *table(found, reference, board),
        "",
        f"![{ALT}]({picture.name})",
    ]
