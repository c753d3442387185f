"""Is a policy better, or only less sharp? pass@1 against the area under pass@k as the sampling temperature moves.

A lower temperature trades coverage for pass@1, as training does. So two policies are compared where they have the same
pass@1, each at the temperature that gives it.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from leaderboard_plan import BEFORE, Board, Candidate
from leaderboard_statistics import area_over_log_k, pass_curve
from matplotlib import rc_context
from matplotlib.figure import Figure

from hclm_rl.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of

Point = tuple[float, float]  # pass@1, area under pass@k over log k
Curve = dict[float, Point]  # by temperature, ascending

ALT = "pass@1 against AUC: a ring at the training temperature, colder to the right"
EXPLAINED = """\
Sampling colder trades coverage for pass@1, as training does. Each cell: pass@1, AUC of the same trained policies
sampled at that temperature (trained at {trained:g}), mean over seeds. **Matched**: AUC at the temperature, between the
measured ones, at which the policy has the pass@1 that `{reference}` has at {trained:g} on the same seed, mean ±
deviation over seeds; a dash where it has that at none of them."""


def curve_of(summary: dict, board: Board) -> Curve:
    """At the training temperature and those measured beside it; empty where there are none."""
    beside = {float(at): measured["correct"] for at, measured in summary.get("at_temperature", {}).items()}
    if not beside:
        return {}

    def point(correct: Sequence[int]) -> Point:
        curve = pass_curve(np.array([correct]), board.samples, board.pass_ks)
        return float(curve[0].mean()), float(area_over_log_k(curve, board.pass_ks).mean())

    all_of = beside | {board.trained_at: summary["per_prompt"]["correct"]}
    return {at: point(all_of[at]) for at in sorted(all_of)}


def area_at(curve: Curve, accuracy: float) -> float | None:
    """The area where pass@1 is `accuracy`, between the two neighbours in temperature; None where it is nowhere."""
    points = list(curve.values())
    for (high, area_cold), (low, area_warm) in itertools.pairwise(points):
        if low <= accuracy <= high:
            share = (high - accuracy) / (high - low) if high > low else 0.0
            return area_cold + share * (area_warm - area_cold)
    return None


def curves_of(candidates: Sequence[Candidate], board: Board) -> dict[str, dict[int, Curve]]:
    """Name -> seed -> curve, of those that were measured at other temperatures."""
    found = {}
    for each in candidates:
        curves = {seed: curve_of(of, board) for seed, of in each.summaries(board.seeds, "report").items()}
        if curves := {seed: curve for seed, curve in curves.items() if curve}:
            found[each.name] = curves
    return found


def mean_curve(curves: dict[int, Curve]) -> Curve:
    """At the temperatures that all seeds have."""
    shared = set.intersection(*(set(curve) for curve in curves.values()))
    means = {at: np.mean([curve[at] for curve in curves.values()], axis=0) for at in sorted(shared)}
    return {at: (float(accuracy), float(area)) for at, (accuracy, area) in means.items()}


def matched(curves: dict[int, Curve], reference: dict[int, Curve], trained: float) -> list[float]:
    """Each seed's area at the reference's pass@1; empty unless every seed has it."""
    shared = [seed for seed in curves if seed in reference]
    areas = [area_at(curves[seed], reference[seed][trained][0]) for seed in shared]
    return [area for area in areas if area is not None] if None not in areas else []


def table(found: dict[str, dict[int, Curve]], board: Board) -> list[str]:
    reference = found.get(board.reference, {})
    temperatures = sorted({at for curves in found.values() for at in mean_curve(curves)})
    head = ["entry", "matched", *(f"T {at:g}" for at in temperatures), "seeds"]
    areas = {name: matched(curves, reference, board.trained_at) for name, curves in found.items()}
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in sorted(found, key=lambda name: -statistics.mean(areas[name] or [0.0])):
        curve, of = mean_curve(found[name]), areas[name]
        spread = f" ± {statistics.stdev(of):.3f}" if len(of) > 1 else ""
        cells = [name if name == BEFORE else f"`{name}`", f"{statistics.mean(of):.3f}{spread}" if of else "-"]
        cells += [f"{curve[at][0]:.3f}, {curve[at][1]:.3f}" if at in curve else "-" for at in temperatures]
        lines.append("| " + " | ".join([*cells, ", ".join(map(str, sorted(found[name])))]) + " |")
    return lines


def plot(found: dict[str, dict[int, Curve]], board: Board) -> str:
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
    found = curves_of(candidates, board)
    if not found:
        return []
    picture = page.with_name(f"{page.stem}_{board.task}_{board.setting}_temperatures.svg")
    picture.write_text(plot(found, board))
    explained = EXPLAINED.format(trained=board.trained_at, reference=board.reference)
    return ["", "### At other temperatures", "", explained, "", *table(found, board), "", f"![{ALT}]({picture.name})"]
