"""The list of mutants fits the tree: every text stands exactly once, every test is there. None is run here."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

from mutants import BEGIN, END, Mutant, Outcome, faults, read, run_all, write_page

SMALL = {
    "hclm_rl/__init__.py": "",
    "hclm_rl/sums.py": "def add(a, b):\n    return a + b\n\n\ndef twice(a):\n    return a + a\n",
    "tests/__init__.py": "",
    "tests/test_sums.py": "from hclm_rl.sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n",
    "pyproject.toml": "",
}


def entry(before: str, after: str, tests: str = "tests/test_sums.py::test_add") -> Mutant:
    return Mutant(file="hclm_rl/sums.py", before=before, after=after, tests=tests, why="sums are sums")


@pytest.fixture()
def small(tmp_path: Path) -> Path:
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_entry_fits_the_tree():
    assert faults(read()) == []


def test_the_list_covers_what_it_is_to_cover():
    mutants = read()
    files = {mutant.file.removeprefix("hclm_rl/") for mutant in mutants}
    assert len(mutants) >= 60 and len({mutant.named + mutant.after for mutant in mutants}) == len(mutants)
    assert sum(file.startswith("terms/") for file in files) >= 15
    rooms = {file.partition("/")[0] for file in files}
    assert rooms >= {"trainer", "chain", "equations", "watch", "evaluation", "responses", "terms"}
    assert files >= {"chain/metrics.py", "chain/coefficients.py", "equations/flow.py", "watch/collapse.py"}


def test_an_entry_that_does_not_fit_is_named(small: Path):
    found = faults([entry("a * b", "a"), entry("return a", "return"), entry("a + b", "a + b")], small)
    assert found == [
        "hclm_rl/sums.py: 'a * b' must stand there exactly once, and stands there 0 times",
        "hclm_rl/sums.py: 'return a' must stand there exactly once, and stands there 2 times",
        "hclm_rl/sums.py: 'a + b': before and after are the same",
    ]
    named = entry("a + b", "a - b", "tests/test_sums.py::test_mul tests/test_none.py tests/test_sums.py::test_add[1]")
    assert faults([named], small) == [
        "hclm_rl/sums.py: 'a + b': there is no test tests/test_sums.py::test_mul",
        "hclm_rl/sums.py: 'a + b': there is no test tests/test_none.py",
    ]
    gone = Mutant(file="hclm_rl/none.py", before="x", after="y", tests="tests/test_sums.py", why="")
    assert faults([gone], small) == ["hclm_rl/none.py: 'x': there is no such file"]


def test_the_page_gets_the_table_between_its_marks(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Head\n{BEGIN}\nold\n{END}\ntail\n")
    write_page(page, [Outcome(mutant=entry("a + b", "a - b"), word="survived", seconds=1.0, told="")])
    text = page.read_text()
    assert text.startswith(f"# Head\n{BEGIN}\n0 of 1 mutants are caught") and text.endswith(f"{END}\ntail\n")
    assert "| `sums.py` | sums are sums | `test_sums.py::test_add` | survived |" in text and "old" not in text


@pytest.mark.slow
def test_caught_survived_hung_and_broken(small: Path):
    mutants = [
        entry("a + b", "a - b"),
        entry("a + a", "a - a"),
        entry("    return a + b", "    while True: pass"),
        entry("def twice", "def def twice"),
    ]
    before = {name: (small / name).read_text() for name in SMALL}
    found = run_all(mutants, small, jobs=1, limit=20.0, say=lambda outcome: None)
    assert [each.word for each in found] == ["caught", "survived", "caught by the clock", "error"]
    assert {name: (small / name).read_text() for name in SMALL} == before
    (small / "tests/test_sums.py").write_text(SMALL["tests/test_sums.py"].replace("== 5", "== 6"))
    with pytest.raises(SystemExit, match="The tests do not pass on the tree as it is"):
        run_all(mutants[:1], small, jobs=1, limit=20.0, say=lambda outcome: None)
