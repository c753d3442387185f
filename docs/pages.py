"""Writes the pages that are made from the code: `python docs/pages.py`, after a change of what a term logs."""

from pathlib import Path

from hclm_rl.commands.cli import find_method, known_methods
from hclm_rl.commands.metrics import Metric, own_metrics, terms_metrics, trls_metrics

DOCS = Path(__file__).parent
HEAD = """\
# Every logged metric

Written by `python docs/pages.py` from the lines below `Metrics:` in the docstrings of the code that logs them; do not
edit it by hand. `hclm-rl metrics NAME` shows one, `hclm-rl methods NAME` those of a method.

- A term's metrics stand in the log as `<link>/<name>`; a link has its term's name unless the recipe gives it another.
- Each is a mean over the tokens, or the responses, of the whole optimiser step and all processes, unless it says more.
- `q*` stands for quantiles: `q05`, `q50`, `q95`. In the trace of a run these, and what is a mean over tokens, stand
  token by token ([report.md](report.md)).
- A range stands only where one is known. "Start" is the run's own first steps.
- An evaluation logs its own with `eval_` before the name.
"""


def cell(text: str) -> str:
    """As it may stand in a table; what looks like a tag in code."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def table(metrics: list[Metric]) -> str:
    """One row a metric."""
    rows = [
        f"| `{each.name}` | {cell(each.unit)} | {cell(each.meaning)} | {cell(each.healthy)} | {cell(each.otherwise)} |"
        for each in metrics
    ]
    return "\n".join(["| metric | unit | meaning | healthy | what to do outside |", "|---|---|---|---|---|", *rows])


def metrics_page() -> str:
    """docs/metrics.md."""
    parts = [HEAD, "## Every run", table(own_metrics()), "## TRL and transformers", table(trls_metrics()), "## Terms"]
    silent = []
    for name in known_methods():
        if found := terms_metrics(name):
            parts += [f"### {name}", f"{find_method(name).title}.", table(found)]
        else:
            silent.append(f"`{name}`")
    parts.append(f"{', '.join(silent)} log `coef` and `affected` alone.")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    (DOCS / "metrics.md").write_text(metrics_page(), encoding="utf-8")
