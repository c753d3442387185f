"""How the front pages read: the measure, worked by hand, and the pages held to it (docs/prose.py)."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prose() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "docs"))
    import prose  # pyright: ignore[reportMissingImports]

    yield prose
    sys.path.remove(str(ROOT / "docs"))


def test_lix_of_two_sentences(prose: ModuleType):
    # 5 and 3 words in 2 sentences: 4 a sentence; "entropy" and "remains" have seven letters: 2 of 8, 25 %
    assert prose.read("The entropy of it falls. It remains so.").lix == 4 + 25
    # code is a short word, a link its text, a number none: "Take code from the docs", one sentence of five words
    found = prose.read("Take `hold_coverage_of_everything` from [the docs](https://example.org/entropy), 0.5. ")
    assert (found.words, found.sentences, found.lix) == (5, 1, 5.0)


def test_code_tables_and_headings_do_not_count(prose: ModuleType):
    text = "# A heading of words\n\n```\nsome code here\n```\n\n| a | table |\n|---|---|\n\n    indented code\n\n"
    assert prose.read(text).words == 0
    assert prose.read(text + "- One item\n- Another one here.\n").sentences == 2


def test_long_sentences_and_words_of_other_houses_are_named(prose: ModuleType):
    found = prose.read("word " * 41 + "end. We utilize it, e.g. in order to win. `behavior` is code.")
    assert [len(prose.words_of(each)) for each in found.too_long] == [42]
    assert found.strange == ["utilize: say use", "in order to: say to", "e.g.: say such as, that is"]
    assert not found.is_fine and prose.read("Short words do.").is_fine


def test_the_front_pages_read_well(prose: ModuleType):
    pages = prose.front_pages()
    assert {"README.md", "docs/start.md", "docs/extending.md", "docs/howto/watch.md"} <= set(pages)
    for page in pages:
        reading = prose.read((ROOT / page).read_text(encoding="utf-8"))
        assert reading.is_fine, (page, round(reading.lix, 1), reading.too_long, reading.strange)
