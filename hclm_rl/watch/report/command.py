"""`hclm-rl report RUN [RUN ...]`"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import write_report
from .runs import REPORT_NAME


def named(given: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of FOLDER or NAME=FOLDER; a folder is called by the end of its path that no other shares.

    Refuses a name twice.
    """
    folders = [Path(each) if Path(each).exists() else Path(each.rpartition("=")[2]) for each in given]
    names = ["" if Path(each).exists() else each.rpartition("=")[0] for each in given]
    ends = [folder.resolve().parts for folder in folders]
    longest = max(map(len, ends))
    for i, end in enumerate(ends):
        if not names[i]:
            others = [other for j, other in enumerate(ends) if j != i]
            taken = next((k for k in range(1, longest) if all(other[-k:] != end[-k:] for other in others)), longest)
            names[i] = "/".join(end[-taken:])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two runs are called '{twice}': name each folder once, or give names as in NAME=FOLDER")
    return dict(zip(names, folders, strict=True))


def main(arguments: Sequence[str]) -> int:
    """Writes the page of the runs that the command line names."""
    parser = argparse.ArgumentParser(prog="hclm-rl report", description="One self-contained HTML page of runs.")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's output_dir, or NAME=FOLDER; several stand side by side, and names such as `plain, seed 1` and "
        "`plain, seed 2` make one curve's seeds",
    )
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run")
    parser.add_argument("--png", action="store_true", help="write every figure as a PNG beside the page too")
    options = parser.parse_args(arguments)
    runs = named(options.runs)
    first = next((folder for folder in runs.values() if folder.is_dir()), None)
    if first is None:
        raise ValueError(f"no run at {', '.join(map(str, runs.values()))}: RUN is the output_dir of a run")
    try:
        page = write_report(runs, options.out or first / REPORT_NAME, png=options.png)
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(page)
    return 0
