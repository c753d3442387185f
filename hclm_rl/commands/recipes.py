"""`hclm-rl recipes`: the recipes and accelerate configurations that come with the library, to list and to copy."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hclm_rl.recipe.shipped import about, shipped_folder, shipped_recipes
from hclm_rl.responses.names import nearest


def show(console: Console) -> None:
    """One line each, by folder."""
    table = Table(title="Recipes: hclm-rl recipes copy NAME puts one here", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    by_folder = sorted(shipped_recipes().items(), key=lambda item: (item[1].parent != shipped_folder(), item[1]))
    for name, file in by_folder:
        kind = "accelerate: " if file.parent.name == "accelerate" else ""
        table.add_row(name, escape(kind + about(file)))
    console.print(table)


def copy(name: str, to: Path | None) -> str:
    """Writes the recipe beside the user's files, and says how to run it."""
    known = shipped_recipes()
    if name not in known:
        raise ValueError(f"no recipe '{name}'; the nearest are {nearest(name, known)}; `hclm-rl recipes` lists all")
    target = to or Path(f"{name}.yaml")
    target = target / f"{name}.yaml" if target.is_dir() else target
    if target.exists():
        raise ValueError(f"'{target}' is there already: give another file with --to")
    if not target.parent.is_dir():
        raise ValueError(f"no folder '{target.parent}' to put the recipe into: make it first")
    shutil.copyfile(known[name], target)
    is_accelerate = known[name].parent.name == "accelerate"
    verb = known[name].parent.name if known[name].parent.name in ("sft", "generate") else "grpo"
    return f"{target}\nhclm-rl {verb} " + ("--accelerate_config" if is_accelerate else "--config") + f" {target}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hclm-rl recipes", description="Lists the recipes, or copies one.")
    parser.add_argument("action", nargs="?", choices=("list", "copy"), default="list")
    parser.add_argument("name", nargs="?", help="of the recipe to copy")
    parser.add_argument("--to", type=Path, help="file or folder of the copy; default: NAME.yaml here")
    options = parser.parse_args(arguments)
    if options.action == "copy":
        if options.name is None:
            raise ValueError("hclm-rl recipes copy needs a NAME; `hclm-rl recipes` lists them")
        print(copy(options.name, options.to))
    else:
        show(Console())
    return 0
