"""What a figure's curves say at a step, without a script: a box where one points or taps, and a table beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .text import visible

STRIPS, LINES, NAME = 40, 10, 34  # shown at most: steps a panel, values a step, characters of a name
COLUMNS = 6  # steps in the table
POINTS = 72  # an inch, in the units of matplotlib's SVG
LINE_HEIGHT, LETTER = 11.0, 5.2  # of the text in a box, in points


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve of a figure as it was drawn."""

    name: str
    values: dict[float, float]  # step -> as logged


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The curves as a table: (quantity, run, a value or "" for each step)."""

    steps: list[int]
    rows: list[tuple[str, str, list[str]]]


def curves_on(axes: Axes) -> list[Curve]:
    """The curves that were drawn with a name; matplotlib gives the others names of its own."""
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_child")]
    drawn = [
        (str(line.get_label()), *(np.asarray(part, dtype=float).tolist() for part in line.get_data())) for line in named
    ]
    return [Curve(name=name, values=dict(zip(xs, ys, strict=True))) for name, xs, ys in drawn]


def spaced(steps: Sequence[float], count: int) -> list[float]:
    """The first, the last, and evenly between: `count` of them at most."""
    if len(steps) <= count:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def steps_of(curves: Sequence[Curve], count: int) -> list[float]:
    """Steps of the curves, `count` of them at most."""
    return spaced(sorted({step for curve in curves for step in curve.values}), count)


def said_at(step: float, curves: Sequence[Curve], unit: str) -> list[str]:
    """The lines of the box at a step."""
    known = [f"{visible(each.name)[:NAME]} {each.values[step]:.4g}" for each in curves if step in each.values]
    more = [f"and {len(known) - LINES} more"] if len(known) > LINES else []
    return [f"{unit} {step:g}", *known[:LINES], *more]


def box(x: float, top: float, width: float, lines: Sequence[str]) -> str:
    """A box with text at `x`, on the side where a figure of this width has room."""
    wide = 8 + LETTER * max(map(len, lines))
    left = x + 4 if x + 4 + wide < width else max(x - 4 - wide, 0)
    texts = "".join(
        f'<tspan x="{left + 4:.1f}" y="{top + LINE_HEIGHT * (i + 1):.1f}">{escape(line)}</tspan>'
        for i, line in enumerate(lines)
    )
    return (
        f'<rect class="box" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" '
        f'height="{LINE_HEIGHT * len(lines) + 5:.1f}"/><text>{texts}</text>'
    )


def strips(axes: Axes, width: float, height: float, unit: str = "step") -> list[str]:
    """One invisible strip a step over the panel, with the box that it shows; for a figure of this size in points."""
    curves = curves_on(axes)
    steps = steps_of(curves, STRIPS)
    place = axes.get_position()
    left, right, top = place.x0 * width, place.x1 * width, (1 - place.y1) * height
    tall = place.height * height
    shares = axes.transAxes.inverted().transform(axes.transData.transform([(step, 1.0) for step in steps]))[:, 0]
    xs = [left + float(share) * (right - left) for share in shares]
    edges = [left, *((a + b) / 2 for a, b in pairwise(xs)), right]
    found = []
    for step, x, (start, end) in zip(steps, xs, pairwise(edges), strict=True):
        found.append(
            f'<g class="at" tabindex="-1"><rect class="strip" x="{start:.1f}" y="{top:.1f}" '
            f'width="{max(end - start, 0):.1f}" height="{tall:.1f}"/><g class="said">'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{top + tall:.1f}"/>'
            f"{box(x, top + 2, width, said_at(step, curves, unit))}</g></g>"
        )
    return found


def with_hover(svg: str, figure: Figure, unit: str = "step") -> str:
    """The drawn figure, with a strip a step (or what else `unit` counts) over every panel that has named curves."""
    width, height = (POINTS * float(side) for side in figure.get_size_inches())
    over = "".join(strip for axes in figure.axes if curves_on(axes) for strip in strips(axes, width, height, unit))
    before, end, rest = svg.rpartition("</svg>")
    return f"{before}{over}{end}{rest}"


def numbers(figure: Figure) -> Numbers | None:
    """The curves of all panels at a few steps, as far as their run goes; None where none has a name."""
    panels = [(axes.get_ylabel().replace("$", "").replace("\\", ""), curves_on(axes)) for axes in figure.axes]
    steps = steps_of([curve for _, of in panels for curve in of], COLUMNS)
    if not steps:
        return None
    reached: dict[str, float] = {}  # the last step of a run, in any panel
    for _, of in panels:
        for curve in of:
            reached[curve.name] = max([reached.get(curve.name, 0), *curve.values])
    rows = []
    for label, of in panels:
        for curve in of:
            # not every quantity is logged at every step: the last value up to there, but none after the run's end
            before = [[at for at in curve.values if at <= step <= reached[curve.name]] for step in steps]
            known = [max(each, default=None) for each in before]
            values = ["" if at is None else f"{curve.values[at]:.4g}" for at in known]
            rows.append((label, curve.name, values))
    return Numbers(steps=[int(step) for step in steps], rows=rows)
