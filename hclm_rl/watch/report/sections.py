"""The page's figures, one function a section: what it shows, or None where no run logged it."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import chain

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .figures import (
    COLUMNS,
    PANEL_HEIGHT,
    STYLE,
    WIDTH,
    Panel,
    Section,
    colours,
    draw_panel,
    grid_of,
    has,
    legend,
    panels_figure,
    spaced,
)
from .levels import draw_levels
from .runs import STATE, Run
from .table import by_group, group_of

STATES = (
    ("healthy", "#b7dfc3"),
    ("warning", "#f6c343"),
    ("collapsing", "#d55e00"),
    ("exploding", "#7b3294"),
    ("collapsed", "#8c1c13"),
)
FORCES = {
    "force_norm": "force norm $\\|F\\|$",
    "rho": "force over its bound, $\\rho$",
    "dof": "live directions (dof)",
    "alignment_at_states": "alignment at the hidden states",
    "critical_coef_at_states": "balance at the hidden states",
    "certified": "share of the first $\\|F\\|$ that is certain",
    "burning": "share of tokens burning entropy",
    "dead": "share of dead directions",
    "weak": "share of weak directions",
}
SPECTRA = {
    "effective_rank": "effective rank",
    "rank_me": "RankMe",
    "participation_ratio": "participation ratio",
    "alpha": "decay exponent $\\alpha$",
    "diffusion_entropy": "diffusion entropy (nats)",
    "diffusion_entropy_within": "the same within a prompt (nats)",
}
CURVES = {
    "entropy": "token entropy (nats)",
    "reward": "mean reward",
    "completions/mean_length": "mean length (tokens)",
}


def keys_ending(runs: Sequence[Run], metric: str) -> list[str]:
    """Every `<link>/<metric>` that some run logged."""
    keys = {key for run in runs for entry in run.log for key in entry}
    return sorted(key for key in keys if key.partition("/")[2] == metric and has(runs, key))


def logged(runs: Sequence[Run], keys: Iterable[str]) -> list[str]:
    """Those of the names that some run logged."""
    return [key for key in keys if has(runs, key)]


def drawn_in(runs: Sequence[Run], panels: Sequence[Panel]) -> list[str]:
    """Those that the panels show."""
    return logged(runs, chain.from_iterable(panel.keys for panel in panels))


def links_of(keys: Sequence[str]) -> list[str]:
    """The links that the metrics belong to, in order."""
    return sorted({key.partition("/")[0] for key in keys})


def by_metric(runs: Sequence[Run], metrics: dict[str, str]) -> tuple[list[Panel], list[str]]:
    """A panel a metric, its lines one a link that logged it; and the links, in the order of their line styles."""
    found = {metric: keys_ending(runs, metric) for metric in metrics}
    links = links_of([key for keys in found.values() for key in keys])
    panels = [
        Panel(label=label, keys=[f"{link}/{metric}" for link in links], is_ratio=metric == "critical_coef_at_states")
        for metric, label in metrics.items()
    ]
    return panels, links


def stretches(run: Run) -> list[tuple[int, float, float]]:
    """(state, from step, to step): neighbours in the same state in one stretch."""
    steps, states = run.curve(STATE)
    found: list[tuple[int, float, float]] = []
    for i, (step, value) in enumerate(zip(steps, states, strict=True)):
        state, end = min(max(round(value), 0), len(STATES) - 1), steps[i + 1] if i + 1 < len(steps) else step
        if found and found[-1][0] == state:
            found[-1] = (state, found[-1][1], end)
        else:
            found.append((state, step, end))
    return found


def curves(runs: Sequence[Run]) -> Section | None:
    """Entropy, reward and length; behind a single run's, the stretches in which the detector was not at ease."""
    figure = panels_figure(runs, [Panel(label=label, keys=[key]) for key, label in CURVES.items()])
    if figure is None:
        return None
    caption = "Thin: as logged, on the training prompts. Thick: running mean."
    if drawn := draw_levels(figure.axes[0], runs, CURVES["entropy"]):
        caption += f" Dashed: {'; '.join(drawn)}."
    alarming = [each for each in stretches(runs[0]) if each[0]] if len(runs) == 1 else []
    for axes in figure.axes if alarming else []:
        for state, start, end in alarming:
            axes.axvspan(start, end, color=STATES[state][1], alpha=0.15, linewidth=0)
    if alarming:
        caption += " Shaded: the stretches of an alarm, in its colour below."
    return Section(name="training", title="During training", figure=figure, caption=caption, keys=logged(runs, CURVES))


def alarms(runs: Sequence[Run]) -> Section | None:
    """A band a run in the colours of the detector's states, and what it looks at."""
    watched = [run for run in runs if run.curve(STATE)[0]]
    keys = sorted({key for run in runs for entry in run.log for key in entry if key.startswith("collapse/")})
    panels = [Panel(label=key.partition("/")[2].replace("_", " "), keys=[key]) for key in keys if key != STATE]
    panels = [panel for panel in panels if has(runs, panel.keys[0])]
    if not watched:
        return None
    with rc_context({**STYLE, "axes.grid": False}):
        rows = -(-len(panels) // COLUMNS)
        heights = [0.5 + 0.3 * len(watched), *[PANEL_HEIGHT] * rows]
        figure = Figure(figsize=(WIDTH, sum(heights) + 0.4), layout=spaced())
        grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=heights)
        draw_bands(figure.add_subplot(grid[0, :]), watched)
        patches = [Patch(color=colour, label=f"entropy {name}") for name, colour in STATES]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(STATES), frameon=False)
    with rc_context(STYLE):
        for i, panel in enumerate(panels):
            draw_panel(figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]), runs, panel)
    caption = "What the detector said of each run's entropy, and the quantities it looks at."
    return Section(name="alarms", title="Alarms", figure=figure, caption=caption, keys=keys)


def draw_bands(axes: Axes, runs: Sequence[Run]) -> None:
    """A row a run, in the colours of the detector's states."""
    for row, run in enumerate(runs):
        for state, start, end in stretches(run):
            axes.broken_barh([(start, max(end - start, 0.5))], (row - 0.35, 0.7), color=STATES[state][1], linewidth=0)
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser step")


def terms(runs: Sequence[Run]) -> Section | None:
    """The strengths that change during training, and the share of tokens each term changed."""
    strengths = [key for key in keys_ending(runs, "coef") if any(len(set(run.curve(key)[1])) > 1 for run in runs)]
    shares = keys_ending(runs, "affected")
    idle = [key for key in shares if not any(any(run.curve(key)[1]) for run in runs)]
    panels = [Panel(label=f"coefficient of {link}", keys=[f"{link}/coef"]) for link in links_of(strengths)]
    panels += [
        Panel(label=f"tokens changed by {key.partition('/')[0]}", keys=[key]) for key in shares if key not in idle
    ]
    figure = panels_figure(runs, panels)
    if figure is None:
        return None
    caption = "A constant coefficient is not drawn."
    if idle:
        caption += f" Changed no token: {', '.join(links_of(idle))}."
    keys = drawn_in(runs, panels)
    return Section(name="terms", title="Entropy terms", figure=figure, caption=caption, keys=keys)


def forces(runs: Sequence[Run]) -> Section | None:
    """The information force and its regimes."""
    panels, links = by_metric(runs, FORCES)
    figure = panels_figure(runs, panels, links)
    if figure is None:
        return None
    caption = (
        "Alignment and balance (the coefficient at which force and gradient are at right angles) are those at the "
        "hidden states, which no optimiser moves; what a step does to the surrogate, `hclm-rl doctor --try` tells. The "
        "balance is a noisy ratio, so its thick line is a running median and its scale leaves extremes out. A dead "
        "direction has a variance below eps, a weak one far above; docs/methods.md has the formulas."
    )
    keys = drawn_in(runs, panels)
    return Section(name="forces", title="Information force", figure=figure, caption=caption, keys=keys)


def spectra(runs: Sequence[Run]) -> Section | None:
    """Ranks and decay of the hidden states."""
    panels, links = by_metric(runs, SPECTRA)
    figure = panels_figure(runs, panels, links)
    caption = "Of the last hidden states of the response tokens. Compare runs only at equal numbers of tokens."
    keys = drawn_in(runs, panels)
    return figure and Section(
        name="spectra", title="Spectra of the hidden states", figure=figure, caption=caption, keys=keys
    )


def pairs_of(runs: Sequence[Run], link: str) -> list[tuple[float, float]]:
    """(predicted, realised) of the logged steps that have both."""
    return [pair for run in runs for pair in run.pairs(f"{link}/predicted_change", f"{link}/realised_change")]


def agreement(pairs: Sequence[tuple[float, float]]) -> str:
    """Correlation and how often the signs agree, in words."""
    predicted, realised = zip(*pairs, strict=True)
    same = sum((a > 0) == (b > 0) for a, b in pairs) / len(pairs)
    said = f"same sign in {100 * same:.0f} % of {len(pairs)} logged steps"
    if len(set(predicted)) > 1 and len(set(realised)) > 1:
        said += f", correlation {statistics.correlation(predicted, realised):.2f}"
    return said.replace("-", "\u2212")


def draw_scatter(axes: Axes, runs: Sequence[Run], link: str) -> None:
    """Realised against predicted, with the line on which they are equal."""
    palette = colours(runs)
    for run in runs:
        both = pairs_of([run], link)
        predicted, realised = [pair[0] for pair in both], [pair[1] for pair in both]
        axes.plot(predicted, realised, "o", markersize=3, alpha=0.5, color=palette[group_of(run.name)])
    axes.axline((0, 0), slope=1, color="#5f6368", linewidth=0.8)
    axes.set_xlabel("predicted (nats per step)")
    axes.set_ylabel("realised (nats per step)")


def predictions(runs: Sequence[Run]) -> Section | None:
    """Predicted and realised entropy change of every link that logs both, over time and against each other."""
    links = [link for link in links_of(keys_ending(runs, "predicted_change")) if pairs_of(runs, link)]
    if not links:
        return None
    with rc_context(STYLE):
        figure, axes = grid_of(2 * len(links), columns=2)
        drawn = [[f"{link}/realised_change", f"{link}/predicted_change"] for link in links]
        for i, (link, changes) in enumerate(zip(links, drawn, strict=True)):
            draw_panel(axes[2 * i], runs, Panel(label=f"{link} (nats per step)", keys=changes))
            draw_scatter(axes[2 * i + 1], runs, link)
        keys = [f"{link}/predicted_change" for link in links]
        legend(figure, runs, keys, ["realised", "predicted"])
    known = [(name, link, pairs_of(of, link)) for name, of in by_group(runs).items() for link in links]
    said = [f"{name}, {link}: {agreement(pairs)}." for name, link, pairs in known if pairs]
    caption = "Change of the token entropy in an optimiser step, as predicted and as realised. " + " ".join(said)
    return Section(
        name="predictions",
        title="Predicted and realised entropy change",
        figure=figure,
        caption=caption,
        keys=list(chain.from_iterable(drawn)),
    )


SECTIONS = (curves, alarms, terms, forces, predictions, spectra)
