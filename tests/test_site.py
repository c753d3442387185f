"""The documentation as a site: pages made from the code are up to date, every link leads somewhere, it builds."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", flags=re.DOTALL)


@pytest.fixture(scope="module")
def pages() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    import pages  # pyright: ignore[reportMissingImports]

    yield pages
    sys.path.remove(str(DOCS))


def kept() -> dict[str, str]:
    """{path from the root: text} of every page in the repository."""
    found = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in found}


def anchors(text: str) -> set[str]:
    """Of the headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.+?)\s*$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def dead(texts: dict[str, str], made: dict[str, str]) -> Iterator[str]:
    """Links of `texts` that lead to no file, or to no heading of a page; `made` are further pages."""
    for page, text in texts.items():
        for link in LINK.findall(CODE.sub("", text)):
            if re.match(r"\w+:|<", link):
                continue
            path, _, anchor = link.partition("#")
            target = normpath(join(dirname(page), path)) if path else page
            there = made.get(target)
            if there is None and (ROOT / target).exists() and target.endswith(".md"):
                there = (ROOT / target).read_text(encoding="utf-8")
            if not ((ROOT / target).exists() or target in made):
                yield f"{page}: {link}"
            elif anchor and there is not None and anchor not in anchors(there):
                yield f"{page}: {link}, which has no such heading"


def test_a_dead_link_is_found():
    made = {"docs/b.md": "# B\n\n## Two words, here\n"}
    text = "[a](b.md) [b](b.md#two-words-here) [c](c.md) [d](b.md#three) `[e](e.md)` [f](https://example.org)"
    assert list(dead({"docs/a.md": text}, made)) == [
        "docs/a.md: c.md",
        "docs/a.md: b.md#three, which has no such heading",
    ]


def test_every_link_of_the_repository_leads_somewhere():
    assert not list(dead(kept(), {}))


def test_every_link_of_the_made_pages_leads_somewhere(pages: ModuleType):
    made = {f"docs/{name}": text for name, text in pages.made_pages().items()}
    assert not list(dead(made, made))


@pytest.mark.parametrize("name", ["metrics.md", "command_line.md", "recipe_keys.md", "integrations_terms.md"])
def test_a_page_made_from_the_code_is_that_of_the_code(name: str, pages: ModuleType):
    assert (DOCS / name).read_text() == pages.KEPT[name](), "run `python docs/pages.py`"


def test_a_method_has_a_page_with_use_parameters_evidence_and_source(pages: ModuleType):
    text = pages.made_pages()["methods/clip_cov.md"]
    assert "  - clip_cov: {ratio: 0.02, lower: 0.5}" in text  # the recipe's entry
    assert "| `ratio` | `float` | `0.0002` | of all response tokens, in (0, 1]; the paper's value |" in text
    assert "For 7B: `clip" in text or "For 7B: clip\\_cov" in text
    assert "| `candidates` | share |" in text
    assert "| coins, off_policy | `clip_cov` |" in text and "| coins, off_policy | `plain` |" in text
    assert "](https://arxiv.org/abs/2505.22617)" in text


def test_the_table_of_methods_leads_to_the_pages_in_the_site_and_to_the_recipes_elsewhere(pages: ModuleType):
    text = (DOCS / "methods.md").read_text()
    assert "| [`clip_cov`](../recipes/methods/clip_cov.yaml) | " in text
    made = pages.with_pages(text)
    # of what is no term, a key of a recipe or a rollout, there is no page
    assert set(re.findall(r"\(methods/(\w+)\.md\)", made)) == set(pages.known_methods())
    assert "| [`clip_cov`](methods/clip_cov.md) | " in made and "| [`decay_to_start`](../recipes/methods/" in made


def test_the_rows_of_the_table_of_methods_are_short_and_its_numbers_are_on_the_pages(pages: ModuleType):
    """A cell of 120 letters is seven lines in a column of a fifth of 900 pixels."""
    table = (DOCS / "methods.md").read_text().split("\n\n")[2].splitlines()
    assert table[0].startswith("| name |") and len(table) > 60
    long = [line for line in table for each in line.split("|") if len(re.sub(r"\]\([^)]*\)", "]", each).strip()) > 120]
    assert not long
    text = pages.made_pages()["methods/max_rl.md"]
    assert "| coins | better | +0.058 ▲ | +0.001 | +0.084 ▲ | 5 | 0.93 |" in text
    assert "**better**: coins, coins on-policy; too few seeds" in text
    with (DOCS / "verdicts.csv").open(newline="") as file:
        of_file = {row["name"] for row in csv.DictReader(file)}
    of_table = {found[1] for line in table if (found := re.match(r"\| \[`(\w+)`\].*(better|worse|shown|seeds)", line))}
    # what is no term stands in the page's other table, in words
    beside = set(re.findall(r"^\| `(\w+)`", (DOCS / "methods.md").read_text(), re.MULTILINE))
    assert of_table <= of_file <= of_table | beside


def test_code_in_a_cell_may_break_between_words_and_nothing_else_changes(pages: ModuleType):
    html = '<p><code>a_b</code></p><td class="x"><code>terms/no_loss.py::b</code> and a_b</td>'
    made = pages.with_breaks(html)
    assert "<code>terms/<wbr>no_<wbr>loss.<wbr>py::<wbr>b</code> and a_b</td>" in made
    assert made.replace("<wbr>", "") == html and made.startswith("<p><code>a_b</code></p>")


def test_the_navigation_has_every_page(pages: ModuleType):
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"'([\w/]+\.md)'", str(nav)))
    there = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")} | {"index.md"}
    assert named == there - {"methods.md"}  # docs/hooks.py puts that before the pages of the methods


def test_no_page_is_wider_than_its_column():
    """A cell of code does not break on GitHub: two long ones in a row and the table scrolls."""
    wide = []
    for page in ("README.md", "docs/data.md", "docs/troubleshooting.md", "docs/run_folder.md", "docs/howto/gpus.md"):
        for line in (ROOT / page).read_text().splitlines():
            if line.startswith("|"):
                longest = [max(map(len, re.findall(r"`[^`]*`|\S+", cell)), default=0) for cell in line.split("|")]
                if sum(longest) > 110:  # of about 9 pixels each
                    wide.append(f"{page}: {line[:60]}")
    assert not wide


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build  # pyright: ignore[reportMissingImports]
    from mkdocs.config import load_config  # pyright: ignore[reportMissingImports]

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    page = (tmp_path / "methods" / "right_anchor.html").read_text()
    assert "What was once sampled and right" in page
    assert 'href="https://github.com/hclm-rl/hclm-rl/blob/main/SECURITY.md"' in (tmp_path / "start.html").read_text()
