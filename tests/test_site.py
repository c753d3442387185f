"""The documentation as a site: pages made from the code are up to date, every link leads somewhere, it builds."""

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


def test_the_table_of_methods_is_narrow_in_the_site(pages: ModuleType):
    said = (
        "**better**: AUC +0.065 ▲, pass@1 -0.012 (5 seeds, coins); no difference shown: AUC -0.003 (5 seeds, products)"
    )
    assert pages.in_short(said) == "**better**: coins; no difference shown: products"
    assert pages.in_short("changes nothing; says the drift") == "changes nothing; says the drift"
    text = pages.narrow_methods((DOCS / "methods.md").read_text())
    # of what is no term, a key of a recipe or a rollout, there is no page
    assert set(re.findall(r"\(methods/(\w+)\.md\)", text)) == set(pages.known_methods())
    [row] = [line for line in text.splitlines() if line.startswith("| [`clip_cov`](methods/clip_cov.md) | ")]
    assert row.endswith("| token mask | scores | **better**: coins, coins on-policy; no difference shown: products |")


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
