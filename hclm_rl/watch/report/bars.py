"""The page's bars: held-out prompts before and after training."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from .figures import BEFORE_COLOUR, STYLE, WIDTH, Section, colours, spaced
from .runs import Run
from .table import MEASURES, Value, by_group, value_of


def bar_series(runs: Sequence[Run]) -> list[tuple[str, str, float, dict[str, Value | None]]]:
    """(label, colour, opacity, values): one grey "before" if all groups started alike, then each group's "after"."""
    groups, palette = by_group(runs), colours(runs)
    values = {
        when: {name: {m: value_of(of, when, m) for m in MEASURES} for name, of in groups.items()}
        for when in ("before", "after")
    }
    starts = [start for start in values["before"].values() if any(start.values())]
    series = []
    if starts and all(start == starts[0] for start in starts):
        series.append(("before", BEFORE_COLOUR, 1.0, starts[0]))
    else:
        known = [name for name in groups if any(values["before"][name].values())]
        series += [(f"{name}, before", palette[name], 0.4, values["before"][name]) for name in known]
    ended = [name for name in groups if any(values["after"][name].values())]
    return series + [(f"{name}, after", palette[name], 1.0, values["after"][name]) for name in ended]


def bars(runs: Sequence[Run]) -> Section | None:
    """Before and after on the held-out prompts."""
    series = bar_series(runs)
    known = [measure for measure in MEASURES if any(values[measure] for _, _, _, values in series)]
    if not known:
        return None
    at_k = [measure for measure in known if measure.startswith("pass@")]
    panels = [at_k] * bool(at_k) + [[measure] for measure in known if measure not in at_k]
    with rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure = Figure(figsize=(WIDTH, 3.3), layout=spaced())
        grid = figure.add_gridspec(1, len(panels), width_ratios=[0.4 + 0.7 * len(of) for of in panels])
        for i, measures in enumerate(panels):
            axes = figure.add_subplot(grid[i])
            width = 0.8 / len(series)
            for j, (label, colour, alpha, values) in enumerate(series):
                places = [k + (j - (len(series) - 1) / 2) * width for k in range(len(measures))]
                both = [(x, values[m]) for x, m in zip(places, measures, strict=True)]
                heights = [(x, value) for x, value in both if value is not None]
                axes.bar(
                    [x for x, _ in heights],
                    [value.mean for _, value in heights],
                    width=width * 0.92,
                    yerr=[value.error or 0.0 for _, value in heights],
                    color=colour,
                    alpha=alpha,
                    error_kw={"linewidth": 1, "ecolor": "#3c4043"},
                    label=label,
                )
            axes.tick_params(axis="x", length=0)
            if i == 0:
                figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=6, frameon=False)
            if measures == at_k:
                axes.set_xticks(range(len(measures)), measures)
                axes.set_ylabel("pass@k")
                axes.set_ylim(0, 1.02)
            else:
                axes.set_xticks([])
                axes.margins(y=0.08)
                axes.set_ylabel(MEASURES[measures[0]])
    return Section(name="measured", title="", figure=figure, caption="")
