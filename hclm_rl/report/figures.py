"""The page's figures as inline SVG, drawn by matplotlib without a window."""

import io
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .runs import Run
from .table import MEASURES, by_group, group_of, value_of

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: told apart by everyone
BEFORE_COLOUR = "#9aa0a6"
SMOOTHED_OVER = 9  # logged steps
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


def svg_of(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def spaced() -> ConstrainedLayoutEngine:
    """Panels with room between one's curve and the next one's label."""
    return ConstrainedLayoutEngine(wspace=0.05)


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """One colour a group."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(by_group(runs))}


def smoothed(values: Sequence[float], width: int = SMOOTHED_OVER) -> list[float]:
    """Mean over the `width` values around each; fewer at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw_curve(axes: Axes, runs: Sequence[Run], quantity: str, label: str) -> None:
    """The logged values faintly, and smoothed."""
    palette, named = colours(runs), set()
    for run in runs:
        steps, values = run.curve(quantity)
        group = group_of(run.name)
        axes.plot(steps, values, color=palette[group], alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed(values), color=palette[group], linewidth=1.8, label=None if group in named else group)
        named.add(group)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1e-6))


def curves(runs: Sequence[Run]) -> str | None:
    """Token entropy, reward and the strength of each term over training; None if nothing was logged."""
    runs = [run for run in runs if run.log]
    if not runs:
        return None
    strengths = sorted({key for run in runs for entry in run.log for key in entry if key.endswith("/coef")})
    panels = [("entropy", "token entropy (nats)"), ("reward", "mean reward")]
    panels += [(key, f"coefficient of {key.removesuffix('/coef')}") for key in strengths[:2]]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.75 * len(panels), 3.3), layout=spaced())
        for i, (quantity, label) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            draw_curve(axes, runs, quantity, label)
            if i == 0:
                axes.legend(frameon=False)
        return svg_of(figure)


def bars(runs: Sequence[Run]) -> str | None:
    """Before and after on the held-out prompts; None if nothing was measured."""
    groups, palette = by_group(runs), colours(runs)
    panels = [("pass@1", "pass@8", "pass@32"), ("distinct_correct",), ("token_entropy",), ("answer_entropy",)]
    before = {measure: value_of(runs[:1], "before", measure) for measure in MEASURES}
    after = {name: {m: value_of(of, "after", m) for m in MEASURES} for name, of in groups.items()}
    series = [("before", BEFORE_COLOUR, before), *((f"{name}, after", palette[name], after[name]) for name in groups)]
    if not any(value for _, _, values in series for value in values.values()):
        return None
    with rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(11.25, 3.3), layout=spaced())
        grid = figure.add_gridspec(1, len(panels), width_ratios=[2.4, 1, 1, 1])
        for i, measures in enumerate(panels):
            axes = figure.add_subplot(grid[i])
            width = 0.8 / len(series)
            for j, (label, colour, values) in enumerate(series):
                places = [k + (j - (len(series) - 1) / 2) * width for k in range(len(measures))]
                known = [(x, values[m]) for x, m in zip(places, measures, strict=True)]
                heights = [(x, value) for x, value in known if value is not None]
                axes.bar(
                    [x for x, _ in heights],
                    [value.mean for _, value in heights],
                    width=width * 0.92,
                    yerr=[value.error for _, value in heights],
                    color=colour,
                    error_kw={"linewidth": 1, "ecolor": "#3c4043"},
                    label=label,
                )
            axes.tick_params(axis="x", length=0)
            if len(measures) > 1:
                axes.set_xticks(range(len(measures)), measures)
                axes.set_ylabel("pass@k")
                axes.set_ylim(0, 1.02)
                figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False)
            else:
                axes.set_xticks([])
                axes.margins(y=0.08)
                axes.set_ylabel(MEASURES[measures[0]])
        return svg_of(figure)
