"""A result as a table for the terminal and as one self-contained page."""

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from .compare import budgets
from .evaluate import Result
from .statistics import Estimate

TEMPLATE = "page.html.j2"
LABELS = {
    "token_entropy": "token entropy (nats)",
    "answer_entropy": "answer entropy (nats)",
    "wrong_entropy": "  of wrong answers",
    "right_entropy": "  of right answers",
    "distinct_right": "distinct right answers",
    "unanswered": "unreadable (share)",
    "truncated": "cut off (share)",
    "length": "length (tokens)",
}
Row = tuple[str, list[str]]


def written(value: Estimate, *, is_change: bool = False) -> str:
    """Mean and 95 % interval; "-" where the quantity is not defined."""
    if value.mean != value.mean:
        return "-"
    largest = max(abs(number) for number in (value.mean, value.lower, value.upper) if number == number)
    digits, sign = 3 if largest < 10 else 1, "+" if is_change else ""
    mean, lower, upper = (f"{number:{sign}.{digits}f}" for number in (value.mean, value.lower, value.upper))
    return mean if value.lower != value.lower else f"{mean} [{lower}, {upper}]"


def columns(result: Result) -> list[str]:
    return ["base", "trained", "change"] if result.comparison else ["model"]


def rows(result: Result) -> list[Row]:
    """Every quantity with its value in each column; for two models also what the answer entropy's change is made of."""
    found = []
    for name, value in result.trained.items():
        if value.mean != value.mean and not result.comparison:
            continue
        if result.comparison:
            cells = [written(result.comparison.base[name]), written(value)]
            cells.append(written(result.comparison.change[name], is_change=True))
        else:
            cells = [written(value)]
        found.append((LABELS.get(name, name), cells))
        if name == "answer_entropy" and result.comparison:  # what its change is made of
            parts = {"by accuracy": result.comparison.sharpening, "by diversity": result.comparison.diversity}
            found += [(f"  change {part}", ["", "", written(value, is_change=True)]) for part, value in parts.items()]
    return found


def support_line(result: Result) -> str:
    assert result.comparison is not None
    found = result.comparison.support
    covered = found.kept + found.gained + found.lost
    ratios = f"retained {found.retention:.3f}, net change {found.net_change:+.3f}, " if covered else ""
    return (
        f"Problems with a right answer in {found.samples} responses: {found.kept} of both, {found.gained} gained, "
        f"{found.lost} lost, {found.neither} of neither; {ratios}McNemar p = {found.mcnemar:.2g}. An answer not seen "
        f"has, at 95 % confidence, a probability of at most {found.detectable:.2g}."
    )


def settings_line(result: Result) -> str:
    drawn = result.sampling
    return (
        f"{result.problems} problems of {result.task}, {drawn.samples} responses each, temperature {drawn.temperature}"
        f", top-p {drawn.top_p}, at most {drawn.max_new_tokens} tokens, seed {drawn.seed}; {len(result.skipped)} "
        "skipped. Intervals: 95 %, bootstrap over problems."
    )


def terminal_table(result: Result) -> Table:
    table = Table(title=escape(settings_line(result)), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns(result):
        table.add_column(column, justify="right")
    for label, cells in rows(result):
        # in a narrow window a cell breaks between mean and interval, not within the interval
        table.add_row(label, *(escape(cell.replace(", ", ",")) for cell in cells))
    return table


def pass_curves(result: Result) -> str:
    """pass@k over k with its band, for both models."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hclm_rl.watch.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of

    curves = [("base", BEFORE_COLOUR, result.comparison.base)] if result.comparison else []
    curves.append(("trained" if result.comparison else "model", COLOURS[1], result.trained))
    ks = budgets(result.sampling.samples)
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for label, colour, found in curves:
            values = [found[f"pass@{k}"] for k in ks]
            axes.plot(ks, [value.mean for value in values], color=colour, marker="o", markersize=3.5, label=label)
            axes.fill_between(
                ks, [value.lower for value in values], [value.upper for value in values], color=colour, alpha=0.18
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("k responses")
        axes.set_ylabel("pass@k")
        axes.legend(frameon=False, loc="lower right")
        return svg_of(figure)


def write_page(result: Result, out: Path) -> Path:
    """One HTML page: no network, no script, nothing beside it. Needs the extra `report`."""
    try:
        import jinja2
        import markupsafe

        figure = pass_curves(result)
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'hclm-rl[report]'") from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        TEMPLATE
    )
    page = template.render(
        result=result,
        columns=columns(result),
        rows=rows(result),
        settings=settings_line(result),
        support=support_line(result) if result.comparison else None,
        figure=markupsafe.Markup(figure),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
