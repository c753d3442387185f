"""What mkdocs does with docs/: adds the pages made from the code, links to the repository, lets tables be narrow."""

import posixpath
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(\]\()(\.\./[^)\s]+)")
WIDE = ("leaderboard_all.md", "log.md")  # whose tables take the room of the contents


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The methods' part of the navigation."""
    assert config.nav is not None
    for part in config.nav:
        if "Methods" in part:
            part["Methods"] = [{"All methods": "methods.md"}, *(f"methods/{name}.md" for name in pages.known_methods())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages that exist in the site alone."""
    for uri, text in pages.made_pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a file beside docs/ becomes one to the repository; the table of methods one to its pages."""
    folder = posixpath.dirname(page.file.src_uri)

    def outside(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[2]))
        return match[0] if target.startswith("docs/") else f"{match[1]}{pages.REPOSITORY}/blob/main/{target}"

    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    markdown = LINK.sub(outside, markdown)
    if page.file.src_uri == "methods.md":
        markdown = pages.with_pages(markdown)
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return pages.with_breaks(html)
