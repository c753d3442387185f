"""A result as a table for the terminal and as one self-contained page."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from hclm_rl.watch.report.text import as_link
from hclm_rl.watch.report.text import shown as text_shown
from hclm_rl.watch.versions import commit_of, now, versions

from .compare import budgets
from .counted import CountedResult
from .lost import SHOWN, lost_problems, next_steps
from .statistics import Estimate, Support

if TYPE_CHECKING:  # imports transformers, which counts do without
    from .evaluate import Result

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


def columns(result: "Result") -> list[str]:
    """The heads of the table's columns."""
    return ["base", "trained", "change"] if result.comparison else ["model"]


def rows(result: "Result") -> list[Row]:
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


def support_line(found: Support) -> str:
    """Support in a sentence."""
    covered = found.kept + found.gained + found.lost
    ratios = f"retained {found.retention:.3f}, net change {found.net_change:+.3f}, " if covered else ""
    return (
        f"Problems with a right answer in {found.samples} responses: {found.kept} of both, {found.gained} gained, "
        f"{found.lost} lost, {found.neither} of neither; {ratios}McNemar p = {found.mcnemar:.2g}. An answer not seen "
        f"has, at 95 % confidence, a probability of at most {found.detectable:.2g}."
    )


def settings_line(result: "Result") -> str:
    """What was evaluated, in a sentence."""
    drawn = result.sampling
    return (
        f"{result.problems} problems of {result.task}, {drawn.samples} responses each, temperature {drawn.temperature}"
        f", top-p {drawn.top_p}, at most {drawn.max_new_tokens} tokens, seed {drawn.seed}; {len(result.skipped)} "
        "skipped. Intervals: 95 %, bootstrap over problems."
    )


def terminal_table(result: "Result") -> Table:
    """Every quantity, for the terminal."""
    table = Table(title=escape(settings_line(result)), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns(result):
        table.add_column(column, justify="right")
    for label, cells in rows(result):
        # in a narrow window a cell breaks between mean and interval, not within the interval
        table.add_row(label, *(escape(cell.replace(", ", ",")) for cell in cells))
    return table


def counted_table(result: CountedResult) -> Table:
    """pass@k of both files and its change, each with its band."""
    table = Table(title=escape(counted_settings(result)), title_justify="left")
    table.add_column("", no_wrap=True)
    for column in result.curves:
        table.add_column(column, justify="right")
    for label, cells in counted_rows(result):
        table.add_row(label, *(escape(cell.replace(", ", ",")) for cell in cells))
    return table


def counted_rows(result: CountedResult) -> list[Row]:
    """pass@k in each column of a comparison of counts."""
    cells = [[written(value, is_change=role == "change") for value in of] for role, of in result.curves.items()]
    return [(f"pass@{k}", list(row)) for k, *row in zip(budgets(result.most), *cells, strict=True)]


def counted_settings(result: CountedResult) -> str:
    """What was compared, in a sentence."""
    return (
        f"{len(result.base.problems)} problems, counts of '{result.base.name}' and '{result.trained.name}'. Bands for "
        "all k at once: 95 %, bootstrap over problems."
    )


def pass_curves(curves: dict[str, list[Estimate]], ks: list[int]) -> str:
    """pass@k over k with its band, for one model or for base and trained."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from hclm_rl.watch.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of
    from hclm_rl.watch.report.hover import with_hover

    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for label, values in curves.items():
            colour = BEFORE_COLOUR if label == "base" else COLOURS[1]
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
        return with_hover(svg_of(figure), figure, unit="k =")


def as_csv(estimates: dict[str, dict[str, Estimate]]) -> str:
    """The page's numbers for a link that holds them: model, quantity, mean, lower, upper; empty where not defined."""
    rows: list[list[object]] = [["model", "quantity", "mean", "lower", "upper"]]
    for role, of in estimates.items():
        for name, value in of.items():
            numbers = (value.mean, value.lower, value.upper)
            rows.append([role, name, *("" if math.isnan(each) else each for each in numbers)])
    return as_link(rows)


def made_line() -> str:
    """When the page was made, at which commit of the folder it was made in, with which versions."""
    commit = commit_of(Path.cwd())
    found = [now(), *([f"commit {commit}"] if commit else [])]
    return f"Made {', '.join([*found, *(f'{name} {number}' for name, number in versions().items())])}."


def write_page(result: "Result", out: Path) -> Path:
    """One HTML page: no network, no script, nothing beside it. Needs the extra `report`."""
    ks, comparison = budgets(result.sampling.samples), result.comparison
    models = {"base": comparison.base, "trained": result.trained} if comparison else {"model": result.trained}
    lost = lost_problems(result.samples["base"], result.samples["model"], result.prompts) if comparison else []
    return render(
        out,
        curves={role: [of[f"pass@{k}"] for k in ks] for role, of in models.items()},
        ks=ks,
        band="95 % interval over problems",
        data=as_csv(models | ({"change": comparison.change} if comparison else {})),
        title=f"{result.model} on {result.task}",
        model=result.model,
        base=result.base,
        verdict=result.verdict,
        notes=result.notes,
        skipped=result.skipped,
        columns=columns(result),
        rows=rows(result),
        settings=settings_line(result),
        support=support_line(comparison.support) if comparison else None,
        lost=lost[:SHOWN],
        more_lost=max(len(lost) - SHOWN, 0),
        next_steps=next_steps(result.verdict, result.trained, result.sampling.samples),
    )


def write_counted_page(result: CountedResult, out: Path) -> Path:
    """The same of two files of counts."""
    found = result.support
    return render(
        out,
        curves={role: result.curves[role] for role in ("base", "trained")},
        ks=budgets(result.most),
        band="95 %, for all k at once, over problems",
        data=as_csv(
            {
                role: {f"pass@{k}": value for k, value in zip(budgets(result.most), of, strict=True)}
                for role, of in result.curves.items()
            }
        ),
        title=f"{result.trained.name} beside {result.base.name}",
        model=result.trained.name,
        base=result.base.name,
        verdict=result.verdict,
        notes=result.notes,
        skipped=[],
        columns=list(result.curves),
        rows=counted_rows(result),
        settings=counted_settings(result),
        support=found if isinstance(found, str) else support_line(found),
        lost=[],
        more_lost=0,
        lost_names=result.moved.get("lost", []),
        next_steps=next_steps(result.verdict, {}, result.most),
    )


def render(out: Path, curves: dict[str, list[Estimate]], ks: list[int], **shown: object) -> Path:
    """Fills the page; `shown` are its other names. Refuses where the extra `report` is not installed."""
    try:
        import jinja2
        import markupsafe

        figure = pass_curves(curves, ks)
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install 'hclm-rl[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=text_shown,
    )
    page = environment.get_template(TEMPLATE).render(figure=markupsafe.Markup(figure), made=made_line(), **shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    return out
