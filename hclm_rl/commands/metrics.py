"""`hclm-rl metrics NAME ...`: what logged numbers mean."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hclm_rl.responses.names import nearest
from hclm_rl.watch.meanings import known_metrics, logged_as, meanings, probably_meant


def main(arguments: Sequence[str]) -> int:
    """`hclm-rl metrics NAME ...`: what logged numbers mean."""
    parser = argparse.ArgumentParser(prog="hclm-rl metrics", description="What a number in the log of a run means.")
    parser.add_argument("names", nargs="*", help="as in the log, such as entropy or right_anchor/lost; none: all")
    names = parser.parse_args(arguments).names
    console = Console()
    for name in names:
        if not (found := meanings(name)):
            close = nearest(name, [logged_as(*each) for each in known_metrics()])
            raise ValueError(f"no metric '{name}' is known; the nearest are {close}")
        if meant := probably_meant(name, found):
            link, _, rest = name.partition("/")
            print(f"'{link}' is no known name; '{meant}/{rest}' was probably meant", file=sys.stderr)
            found = sorted(found, key=lambda each: each[0] != meant)
        for who, each in found:
            console.print(f"[bold]{escape(name)}[/bold] ({each.unit}, logged by {who}): {escape(each.told)}")
    if not names:
        table = Table("metric", "unit", "meaning")
        for who, each in known_metrics():
            table.add_row(*map(escape, (logged_as(who, each), each.unit, each.meaning)))
        console.print(table)
    return 0
