"""How often each problem was answered right, from a file: counts, or the samples that lm-eval or verl wrote.

One JSON object a line; what it is, its keys say:

    {"id": "aime-7", "n": 128, "c": 117}                      n responses to the problem, c of them right
    {"doc_id": 3, "filtered_resps": ["42"], "exact_match": 1.0, ...}          lm-eval, --log_samples
    {"input": "...", "output": "...", "score": 1.0, ...}      verl, validation_data_dir or rollout_data_dir
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

# form -> the keys by which it is known
FORMS = {"counts": ("id", "n", "c"), "lm-eval": ("doc_id", "filtered_resps"), "verl": ("input", "output", "score")}
VERL_METRICS = ("acc", "score")  # acc, where a reward function gives it, is whether the answer is right
MOST = 10**6  # responses to a problem
RIGHT_AT = 1.0  # of a metric or score, at least
EXAMPLE = '{"id": "aime-7", "n": 128, "c": 117}'


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What of a sample file says that a response is right."""

    metric: str | None = None  # the key; None: acc or score of verl, the only metric of lm-eval
    filter: str | None = None  # of lm-eval, whose files hold every response once a filter; None: the only one
    right_at: float = RIGHT_AT

    def __post_init__(self) -> None:
        if not math.isfinite(self.right_at):
            raise ValueError(f"right_at must be a finite number, got {self.right_at}")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of each problem the number of responses and of right ones."""

    name: str  # of the file
    form: str
    problems: tuple[str, ...]
    n: Int[np.ndarray, "P"]
    c: Int[np.ndarray, "P"]

    def of(self, problems: tuple[str, ...]) -> "Counts":
        """The same for these problems, in this order."""
        place = {problem: i for i, problem in enumerate(self.problems)}
        rows = [place[problem] for problem in problems]
        return Counts(name=self.name, form=self.form, problems=problems, n=self.n[rows], c=self.c[rows])


def read_counts(path: Path, reading: Reading | None = None) -> Counts:
    """Of the file's problems, in its order; a line that cannot be counted is refused, as the counts would be wrong."""
    reading = reading or Reading()
    found: dict[str, tuple[int, int]] = {}
    forms, filters = set(), set()
    for where, entry in entries(path):
        forms.add(form := form_of(entry, where))
        if len(forms) > 1:
            raise ValueError(f"{where} has the keys of {form}, lines before it have others: give one kind a file")
        if form == "lm-eval":
            filters.add(own := str(entry.get("filter", "none")))
            if reading.filter not in (None, own):
                continue
            if reading.filter is None and len(filters) > 1:
                names = ", ".join(sorted(filters))
                raise ValueError(f"'{path}' has the lines of several filters ({names}): name one with --filter")
        problem, n, c = counted(entry, where) if form == "counts" else judged(entry, form, reading, where)
        if form == "counts" and problem in found:
            raise ValueError(f"{where}: the problem '{problem}' stands in an earlier line too")
        before = found.get(problem, (0, 0))
        found[problem] = before[0] + n, before[1] + c
    if not found:
        lacks = f"no line of the filter '{reading.filter}', only of {', '.join(filters)}" if filters else "no line"
        raise ValueError(f"'{path}' has {lacks}: give one JSON object a line, such as {EXAMPLE}")
    n, c = np.array(list(found.values())).T
    return Counts(name=str(path), form=forms.pop(), problems=tuple(found), n=n, c=c)


def entries(path: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, the object) of each line that is not empty. Refuses a file that cannot be read."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"'{path}', line {number}"
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not valid JSON ({error.msg} at character {error.pos + 1})") from None
                except (ValueError, RecursionError) as error:  # a whole number of thousands of digits, brackets within
                    raise ValueError(f"{where} cannot be read as JSON ({str(error).partition(';')[0]})") from None
                if not isinstance(entry, dict):
                    raise ValueError(f"{where} must be a JSON object such as {EXAMPLE}, got {line.strip()[:40]}")
                yield where, entry
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' could not be read: {' '.join(str(error).split())}") from None


def form_of(entry: dict, where: str) -> str:
    """The form of the file, told by the keys of a line; a ValueError where no form has them."""
    for form, keys in FORMS.items():
        if all(key in entry for key in keys):
            return form
    known = "; ".join(f"{form}: {', '.join(keys)}" for form, keys in FORMS.items())
    raise ValueError(f"{where} has the keys {', '.join(map(str, entry)) or 'none'}, known are {known}")


def counted(entry: dict, where: str) -> tuple[str, int, int]:
    """(problem, responses, right ones) of a line of counts.

    Refuses counts that are no whole numbers with c in [0, n].
    """
    n, c = entry["n"], entry["c"]
    if type(n) is not int or type(c) is not int or not 1 <= n <= MOST or not 0 <= c <= n:
        raise ValueError(
            f"{where}: n must be a whole number from 1 to {MOST} and c one from 0 to n, got n={n!r}, c={c!r}"
        )
    return name_of(entry["id"], where), n, c


def name_of(given: object, where: str) -> str:
    """A problem's name as text; a ValueError for what is neither text nor a whole number."""
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ValueError(f"{where}: a problem is named by text or a whole number, got {given!r}")
    return str(given)


def judged(entry: dict, form: str, reading: Reading, where: str) -> tuple[str, int, int]:
    """(problem, responses, right ones) of a sample file's line: one response, or several whose metric is a share.

    Refuses a line without the metric.
    """
    responses = [""]
    if form == "verl":
        metric = reading.metric or next(key for key in VERL_METRICS if key in entry)
        problem = name_of(entry["input"], where)
    else:
        metric, problem = reading.metric or only_metric(entry, where), name_of(entry["doc_id"], where)
        match entry["filtered_resps"]:
            case [[*several]] if several and all(isinstance(each, str) for each in several):
                responses = several  # several samples of one request; several requests are a question's choices
    if metric not in entry:
        raise ValueError(f"{where} has no '{metric}', only {', '.join(entry)}")
    value, n = entry[metric], len(responses)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: '{metric}' must be a number, true or false, got {value!r}")
    if n == 1:
        return problem, 1, int(value >= reading.right_at)
    c = round(value * n)
    if abs(value * n - c) > 1e-6 or not 0 <= c <= n or "@" in metric:
        raise ValueError(f"{where}: '{metric}' must be the share of its {n} responses that are right, got {value!r}")
    return problem, n, c


def only_metric(entry: dict, where: str) -> str:
    """The metric of lm-eval's line; a ValueError where there are several or none."""
    names = entry.get("metrics") or [key for key in ("exact_match", "acc") if key in entry]
    if len(names) != 1:
        raise ValueError(f"{where} has the metrics {', '.join(names) or 'none'}: name one with --metric")
    return str(names[0])
