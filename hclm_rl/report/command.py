"""`hclm-rl report RUN [RUN ...]`"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import write_report


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hclm-rl report", description="One self-contained HTML page of runs.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir; several stand side by side"
    )
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run")
    options = parser.parse_args(arguments)
    names = {str(folder): folder for folder in options.runs}
    try:
        page = write_report(names, options.out or options.runs[0] / "report.html")
    except ImportError as error:
        raise ValueError(str(error)) from error
    print(page)
    return 0
