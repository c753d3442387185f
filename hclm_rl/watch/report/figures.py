"""How the page's figures look: colours, panels in a grid, SVG and PNG, drawn by matplotlib without a window."""

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from .hover import Numbers, numbers, with_hover
from .meant import Meaning, meanings_of
from .runs import Run
from .table import by_group, group_of

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
BEFORE_COLOUR = "#9aa0a6"
LINES = ("-", "--", ":", "-.")
COMMENT = re.compile("<!--.*?-->", re.DOTALL)  # matplotlib repeats every text in one, where no markup is escaped
SMOOTHED_OVER = 9  # logged steps
OUTER, OUTER_RATIOS = 0.02, 0.1  # share of the logged values left out of the scale on either side
FEW = 4 * SMOOTHED_OVER  # so few points are drawn one by one
COLUMNS = 3
WIDTH, PANEL_HEIGHT = 11.25, 2.9  # inches
STYLE: dict = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5f6368",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "hclm_rl",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: logged quantities over the optimiser steps; the second and later ones in other line styles."""

    label: str
    keys: Sequence[str]
    is_ratio: bool = False  # running medians, since a denominator near 0 drags a mean anywhere


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a figure, and what is to be known to read it. `name` is part of the PNG's name."""

    name: str
    title: str
    figure: Figure
    caption: str
    keys: Sequence[str] = ()  # what the figure is drawn from, by its names in the log

    def svg(self) -> str:
        """The figure as an element of a page, with the values that it shows where one points."""
        return with_hover(svg_of(self.figure), self.figure)

    def meanings(self) -> list[Meaning]:
        """Of each of its quantities, what it is; without those that nobody has described."""
        return [each for key in self.keys for each in meanings_of(key)]

    def numbers(self) -> Numbers | None:
        """Its curves as a table; None where it has none."""
        return numbers(self.figure)

    def png(self, file: Path) -> Path:
        """Writes the figure as a PNG, and gives the file."""
        with rc_context(STYLE):
            self.figure.savefig(file, dpi=150, metadata={"Software": None})
        return file


def svg_of(figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    _, start, rest = buffer.getvalue().partition("<svg")
    return start + COMMENT.sub("", rest)


def spaced() -> ConstrainedLayoutEngine:
    """Panels with room between one's curve and the next one's label."""
    return ConstrainedLayoutEngine(wspace=0.05, hspace=0.05)


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """One colour a group."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(by_group(runs))}


def smoothed(
    values: Sequence[float], width: int = SMOOTHED_OVER, middle: Callable[[Sequence[float]], float] = statistics.fmean
) -> list[float]:
    """Mean (or another middle) of the `width` values around each; fewer at the ends."""
    half = width // 2
    return [middle(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def shown_range(values: Sequence[float], middles: Sequence[float], outer: float) -> tuple[float, float]:
    """Least and largest value to show: the running middle, and the logged values but a share `outer` on either side."""
    ordered = sorted(values)
    left_out = int(outer * len(ordered))
    return min(*middles, ordered[left_out]), max(*middles, ordered[len(ordered) - 1 - left_out])


def draw_curve(
    axes: Axes, run: Run, key: str, colour: str, line: str, is_ratio: bool, name: str
) -> tuple[float, float] | None:
    """The logged values faintly, and smoothed; a few of them one by one. Gives the range to show.

    The logged values carry `name`, by which hover.py finds them.
    """
    steps, values = run.curve(key)
    if not values:
        return None
    if len(values) < FEW:
        axes.plot(steps, values, color=colour, linestyle=line, linewidth=1.4, marker="o", markersize=3, label=name)
        return min(values), max(values)
    middles = smoothed(values, middle=statistics.median if is_ratio else statistics.fmean)
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8, label=name)
    axes.plot(steps, middles, color=colour, linestyle=line, linewidth=1.8)
    return shown_range(values, middles, OUTER_RATIOS if is_ratio else OUTER)


def curve_name(run: Run, key: str, keys: Sequence[str]) -> str:
    """The run's name, and of several quantities in a panel what tells this one from the others."""
    if len(keys) == 1:
        return run.name
    link, _, metric = key.partition("/")
    return f"{run.name}, {link if len({each.partition('/')[0] for each in keys}) > 1 else metric}"


def draw_panel(axes: Axes, runs: Sequence[Run], panel: Panel) -> None:
    """All runs' curves; from 0 where nothing is below it, else with a line at 0."""
    palette = colours(runs)
    drawn = [
        draw_curve(
            axes,
            run,
            key,
            palette[group_of(run.name)],
            LINES[i % len(LINES)],
            panel.is_ratio,
            curve_name(run, key, panel.keys),
        )
        for i, key in enumerate(panel.keys)
        for run in runs
    ]
    ranges = [each for each in drawn if each is not None]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low >= 0:
        axes.set_ylim(0, 1.08 * high or 1.0)
    else:
        margin = 0.08 * (max(high, 0) - low)
        axes.set_ylim(low - margin, max(high, 0) + margin)
        axes.axhline(0, color="#5f6368", linewidth=0.8)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(panel.label)


def legend(figure: Figure, runs: Sequence[Run], keys: Sequence[str], lines: Sequence[str] = ()) -> None:
    """One colour a group that logged one of `keys`, and one line style for each of several quantities of a panel."""
    drawn = {group_of(run.name) for run in runs if any(has([run], key) for key in keys)}
    palette = {name: colour for name, colour in colours(runs).items() if name in drawn}
    handles = [Line2D([], [], color=colour, linewidth=1.8, label=name) for name, colour in palette.items()]
    if len(lines) > 1:
        styles = [Line2D([], [], color="#5f6368", linestyle=LINES[i % 4], label=name) for i, name in enumerate(lines)]
        handles += styles
    figure.legend(handles=handles, loc="outside upper left", ncols=6, frameon=False)


def has(runs: Sequence[Run], key: str) -> bool:
    """Whether some run logged it."""
    return any(run.curve(key)[0] for run in runs)


def grid_of(count: int, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, full rows first."""
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * PANEL_HEIGHT + 0.4), layout=spaced())
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def panels_figure(runs: Sequence[Run], panels: Sequence[Panel], lines: Sequence[str] = ()) -> Figure | None:
    """The panels of which some run logged a quantity; None if there are none."""
    known = [panel for panel in panels if any(has(runs, key) for key in panel.keys)]
    if not known:
        return None
    with rc_context(STYLE):
        figure, axes = grid_of(len(known))
        for panel, own in zip(known, axes, strict=True):
            draw_panel(own, runs, panel)
        legend(figure, runs, [key for panel in known for key in panel.keys], lines)
    return figure
