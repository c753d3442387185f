"""The recipes and accelerate configurations that come with the library: in a clone, and inside the wheel."""

from pathlib import Path

HERE = Path(__file__).parents[1]


def shipped_folder() -> Path:
    """`recipes` beside the package in a clone; inside it where it was installed from a wheel."""
    return next((each for each in (HERE / "recipes", HERE.parent / "recipes") if each.is_dir()), HERE / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """{name: file}; no two have the same name."""
    return {file.stem: file for file in sorted(shipped_folder().rglob("*.yaml"))}


def recipe_at(given: Path) -> Path:
    """The file; where there is none, the shipped one of that path (recipes/methods/qae.yaml), else `given` again."""
    if given.exists() or given.parts[:1] != ("recipes",):
        return given
    shipped = shipped_folder().joinpath(*given.parts[1:])
    return shipped if shipped.is_file() else given


def about(file: Path) -> str:
    """The first sentence of its header."""
    first: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not (words := line.strip("# ")):
            break
        first.append(words)
    return " ".join(first).partition(". ")[0].rstrip(".")
