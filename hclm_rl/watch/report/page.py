"""One HTML page of runs side by side: no network, no script, nothing beside it."""

import json
import shlex
from pathlib import Path

from ..secrets import hide, hide_in_line, hide_in_yaml
from .runs import STATE, Run, read_run
from .table import LOGGED, at_equal_steps, changes, compare
from .text import as_link, shown, visible
from .tokens import tokens

TEMPLATE = "page.html.j2"


def overrides_of(run: Run) -> str:
    """What the command line added to the run's recipe, without the tokens and keys of a summary from elsewhere."""
    try:
        words = shlex.split((run.summary or run.about).get("overrides") or "")
    except ValueError:
        return "-"
    return shlex.join(hide_in_line(words)) or "-"


def terms_of(run: Run) -> str:
    """The run's entropy terms as its recipe names them."""
    known = run.summary or run.about
    if not known:
        return "unknown"
    terms = known.get("terms") or []
    return "; ".join(term if isinstance(term, str) else json.dumps(hide(term)) for term in terms) or "none"


def recipes_of(runs: list[Run]) -> list[tuple[list[str], str]]:
    """(names of the runs, recipe), the same recipe once."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run.recipe:
            names.setdefault(hide_in_yaml(run.recipe), []).append(run.name)
    return [(of, recipe) for recipe, of in names.items()]


def as_csv(runs: list[Run]) -> str:
    """What the curves are drawn from, as a link that holds it: run, step, quantity, value."""
    rows: list[list[object]] = [["run", "step", "quantity", "value"]]
    for run in runs:
        for key in (*LOGGED, STATE):
            rows += [[run.name, step, key, value] for step, value in zip(*run.curve(key), strict=True)]
    return as_link(rows)


def versions_of(runs: list[Run]) -> str:
    """Of the first run that says them."""
    found = next((known for run in runs if (known := (run.summary or run.about).get("versions"))), {})
    return ", ".join(f"{name} {number}" for name, number in found.items())


def commits_of(runs: list[Run]) -> list[tuple[str, str]]:
    """(names of the runs, commit of the folder where they were started), of those that say it."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if isinstance(commit := run.about.get("commit"), str):
            names.setdefault(commit, []).append(run.name)
    return [(" and ".join(of), commit) for commit, of in names.items()]


def links_of(runs: list[Run]) -> list[tuple[str, str, str]]:
    """(run, tracker, address) of the runs that a tracker has too; an address from elsewhere may be no script."""
    found = [(run.name, run.about.get("trackers")) for run in runs]
    return [
        (name, str(tracker), url)
        for name, trackers in found
        for tracker, url in (trackers.items() if isinstance(trackers, dict) else ())
        if isinstance(url, str) and url.startswith(("https://", "http://"))
    ]


def write_report(runs: dict[str, Path], out: Path, *, png: bool = False) -> Path:  # long: one page, part by part
    """Writes the page of the run folders {name: folder} to the file `out`; a broken run is shown as far as it goes.

    Runs called "plain, seed 1", "plain, seed 2" are taken as seeds of one. With `png`, every figure is also a file
    beside the page: report-training.png and so on. Needs the extra `report`.

    Refuses no runs.
    """
    try:
        import jinja2
        import markupsafe

        from .bars import bars
        from .sections import SECTIONS
    except ImportError as error:
        raise ImportError(f"the report needs {error.name}: pip install 'hclm-rl[report]'") from error
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    read = [read_run(visible(name), Path(folder)) for name, folder in runs.items()]
    measured = bars(read)
    sections = [section for section in (draw(read) for draw in SECTIONS) if section is not None]
    of_tokens = tokens(read)
    problems = [(run.name, problem) for run in read for problem in run.problems]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        runs=read,
        changes=changes(read),
        table=compare(read),
        equal=at_equal_steps(read),
        data=as_csv(read),
        versions=versions_of(read),
        commits=commits_of(read),
        links=links_of(read),
        terms={run.name: terms_of(run) for run in read},
        overrides={run.name: overrides_of(run) for run in read},
        recipes=recipes_of(read),
        measured=markupsafe.Markup(measured.svg()) if measured else None,
        sections=[(section, markupsafe.Markup(section.svg())) for section in sections],
        tokens=of_tokens,
        problems=problems + (of_tokens.problems if of_tokens else []),
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")
    for section in [*([measured] if measured else []), *sections] if png else []:
        section.png(out.with_name(f"{out.stem}-{section.name}.png"))
    return out
