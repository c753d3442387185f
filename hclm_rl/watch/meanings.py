"""What a logged number means: read from the `Metrics:` sections of docstrings, which stand beside what logs it.

A line of such a section is `name (unit): meaning. Healthy: range. Else: what to do`; the last two may be left out. In a
term's class the name stands without its link; `/q*` stands for the quantiles of a `Quantiles`, `<k>` for any text.
"""

import ast
import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from docstring_parser import Docstring, ParseError, google

HOUSE: Final = Path(__file__).parents[1]
CLOSE: Final = 0.85  # difflib's ratio: a letter of seven is wrong, and my_log_det is a name of its own
METRIC: Final = "key"  # docstring-parser's word for a section whose lines may have a type
# what a docstring says of fields and of what is logged; all else in it is shown as it stands
SECTIONS: Final = google.GoogleParser(
    [
        google.Section(title, key, google.SectionType.MULTIPLE)
        for title, key in (("Args", "param"), ("Attributes", "attribute"), ("Metrics", METRIC))
    ]
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number in the log of a run, in words."""

    name: str
    unit: str
    meaning: str
    healthy: str = "-"  # where it is known
    otherwise: str = "-"  # what to do when it leaves that

    @property
    def told(self) -> str:
        """All but name and unit, for a cell or a paragraph."""
        healthy = f" Healthy: {self.healthy}." if self.healthy != "-" else ""
        return f"{self.meaning}.{healthy}" + (f" Else: {self.otherwise}." if self.otherwise != "-" else "")

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that a log may have for it."""
        parts = re.split(r"(<\w+>|q\*)", self.name)
        return re.compile("".join(r"q\d\d" if p == "q*" else ".+" if p[:1] == "<" else re.escape(p) for p in parts))


def read_docstring(of: ast.ClassDef | ast.FunctionDef | ast.Module) -> Docstring:
    """What it does, apart from what its sections say of fields and of what is logged. Refuses a line without a name."""
    try:
        return SECTIONS.parse(ast.get_docstring(of))
    except ParseError as error:
        name = getattr(of, "name", "the module")
        raise ValueError(
            f"{name}: a line below `Args:` must be `name: meaning`, got {error} (`name (unit): meaning` for `Metrics:`)"
        ) from error


def metrics_of(docstring: Docstring) -> list[Metric]:
    """The lines below `Metrics:`, in their order. Refuses one without unit or meaning."""
    found = []
    for each in docstring.params:
        if each.args[0] != METRIC:
            continue
        meaning, _, rest = " ".join((each.description or "").split()).partition(" Healthy: ")
        healthy, _, otherwise = rest.partition(" Else: ")
        if not (each.type_name and meaning) or "Else: " in meaning:
            raise ValueError(
                f"the metric '{each.arg_name}' must stand as `name (unit): meaning. Healthy: range. Else: what to do`"
            )
        said = {"healthy": healthy.rstrip("."), "otherwise": otherwise}
        found.append(
            Metric(
                name=each.arg_name,
                unit=each.type_name,
                meaning=meaning.rstrip("."),
                **{name: text for name, text in said.items() if text},
            )
        )
    return found


def terms_metrics(name: str, room: str = "terms") -> list[Metric]:
    """Those of a shipped term, without its link, or of a rollout, without its name."""
    module = ast.parse((HOUSE / room / f"{name}.py").read_text(encoding="utf-8"))
    return [each for node in module.body if isinstance(node, ast.ClassDef) for each in metrics_of(read_docstring(node))]


def rollouts_metrics() -> dict[str, list[Metric]]:
    """Those of the shipped rollouts, by name."""
    files = sorted((HOUSE / "rollouts").glob("[!_]*.py"))
    return {file.stem: found for file in files if (found := terms_metrics(file.stem, "rollouts"))}


def own_metrics() -> list[Metric]:
    """Those that the trainers, the detector and the evaluation log, whatever the terms."""
    found = []
    for file in sorted(HOUSE.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if (
            file.parent.name in ("terms", "rollouts")
            or file.name == "trl_metrics.py"
            or "\n    Metrics:\n" not in source
        ):
            continue
        documented = (ast.ClassDef, ast.FunctionDef)
        nodes = [node for node in ast.parse(source).body if isinstance(node, documented)]
        found += [each for node in nodes for each in metrics_of(read_docstring(node))]
    return found


def trls_metrics() -> list[Metric]:
    """Those of TRL and transformers."""
    file = HOUSE / "watch" / "trl_metrics.py"
    return metrics_of(read_docstring(ast.parse(file.read_text(encoding="utf-8"))))


@functools.cache
def known_metrics() -> tuple[tuple[str, Metric], ...]:
    """(who logs it, the metric), of all that the library knows; a term's name stands for its link."""
    terms = sorted(file.stem for file in (HOUSE / "terms").glob("[!_]*.py"))
    who = {"every run": own_metrics(), "TRL": trls_metrics(), **{name: terms_metrics(name) for name in terms}}
    for name, found in rollouts_metrics().items():
        who[name] = who.get(name, []) + found  # a term may have the same name
    return tuple((name, each) for name, metrics in who.items() for each in metrics)


def logged_as(who: str, metric: Metric) -> str:
    """Its name in a log, where a term's link has the term's name."""
    return metric.name if who in ("every run", "TRL") else f"{who}/{metric.name}"


def meanings(logged: str) -> list[tuple[str, Metric]]:
    """What the name in a log may mean, as (who logs it, the metric); of all terms where a link has a name of its own.

    An evaluation's `eval_` stands before the name that the same number has in training.
    """
    known = known_metrics()
    link, _, name = logged.partition("/")
    terms = {who for who, _ in known} - {"every run", "TRL"}
    general = [
        (who, each)
        for who, each in known
        if who not in terms and any(each.pattern.fullmatch(n) for n in (logged, logged.removeprefix("eval_")))
    ]
    if general:
        return general
    found = [(who, each) for who, each in known if who in terms and each.pattern.fullmatch(name)]
    return [(who, each) for who, each in found if who == link] or found


def probably_meant(logged: str, found: Sequence[tuple[str, Metric]]) -> str | None:
    """The name that the link's is close to; None where the link's is known, or one's own such as log_det_2."""
    link, slash, _ = logged.removeprefix("eval_").partition("/")
    known = {file.stem for room in ("terms", "rollouts") for file in (HOUSE / room).glob("[!_]*.py")}
    if not slash or any(each.name.startswith(f"{link}/") for _, each in found):
        return None
    if any(link == who or re.match(rf"{who}[_\d]", link) for who in known):
        return None
    is_of_any = any(each.name.startswith("<") for _, each in found)  # `<link>/coef`
    close = difflib.get_close_matches(link, known if is_of_any else {who for who, _ in found}, n=1, cutoff=CLOSE)
    return next(iter(close), None)
