"""One HTML page of runs side by side: no network, no script, nothing beside it."""

import json
from pathlib import Path

from .runs import Run, read_run
from .table import changes, compare

TEMPLATE = "page.html.j2"


def terms_of(run: Run) -> str:
    """The run's entropy terms as its recipe names them."""
    if not run.summary:
        return "unknown"
    terms = run.summary.get("terms") or []
    return "; ".join(term if isinstance(term, str) else json.dumps(term) for term in terms) or "none"


def recipes_of(runs: list[Run]) -> list[tuple[str, str]]:
    """(names of the runs, recipe), the same recipe once."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.recipe:
            names.setdefault(run.recipe, []).append(run.name)
    return [(" and ".join(of), recipe) for recipe, of in names.items()]


def write_report(runs: dict[str, Path], out: Path) -> Path:
    """Writes the page of the run folders {name: folder} to the file `out`; a broken run is shown as far as it goes.

    Runs called "plain, seed 1", "plain, seed 2" are taken as seeds of one. Needs the extra `report`.
    """
    try:
        import jinja2
        import markupsafe

        from .figures import bars, curves
    except ImportError as error:
        raise ImportError(f"the report needs {error.name}: pip install 'hclm-rl[report]'") from error
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    read = [read_run(name, Path(folder)) for name, folder in runs.items()]
    figures = {"curves": curves(read), "bars": bars(read)}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        TEMPLATE
    )
    page = template.render(
        runs=read,
        changes=changes(read),
        table=compare(read),
        terms={run.name: terms_of(run) for run in read},
        recipes=recipes_of(read),
        figures={name: markupsafe.Markup(svg) if svg else None for name, svg in figures.items()},
        problems=[(run.name, problem) for run in read for problem in run.problems],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out
