"""What a dotted path may name where custom code is not allowed, and what is imported then: nothing of a stranger's."""

import sys
from pathlib import Path

import pytest

from hclm_rl.responses.answers import extractor
from hclm_rl.responses.names import custom_code, find, find_function
from hclm_rl.testbed import find_task

ANSWERS, REWARD = "function that finds answers", "reward function"


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "stranger_of_names.py").write_text("def f(*_):\n    raise SystemExit\n")
    (tmp_path / "broken_stranger.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return "stranger_of_names"


def test_a_strangers_module_is_not_even_imported(stranger: str):
    with custom_code(False):
        for name in (f"{stranger}.f", "os.system"):
            for look in (
                lambda name: find(name, "entropy term"),
                lambda name: find_function(name, REWARD),
                extractor,
                find_task,
            ):
                with pytest.raises(ValueError, match="is code from outside the library, which a recipe may run only"):
                    look(name)
    assert stranger not in sys.modules
    assert find_function(f"{stranger}.f", REWARD) and stranger in sys.modules  # in Python nothing is asked


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("hclm_rl.answers.boxed", ANSWERS),
        ("hclm_rl.responses.answers.boxed_or_numbers", ANSWERS),
        ("hclm_rl.testbed.coins.correct_payment", REWARD),
        ("hclm_rl.terms.clip_cov.ClipCov", "entropy term"),
    ],
)
def test_the_librarys_own_need_no_flag(path: str, what: str):
    with custom_code(False):
        assert callable(find(path, what))


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("hclm_rl.testbed.coins.random", REWARD),  # a module of another's, seen through one of ours
        ("hclm_rl.responses.names.find_function", ANSWERS),  # would look up what a model wrote
        ("hclm_rl.commands.cli.main", REWARD),
        ("hclm_rl.testbed.policy.main", ANSWERS),
        ("hclm_rl_of_mine.answers.boxed", ANSWERS),
    ],
)
def test_a_name_of_the_library_stands_for_what_it_is_only(path: str, what: str):
    with custom_code(False), pytest.raises(ValueError, match=f"{what}.*'{path}'"):
        find(path, what)


def test_the_librarys_tasks_are_its_make_task():
    with custom_code(False):
        assert find_task("hclm_rl.testbed.coins.make_task", prompts=2, eval_prompts=1)
        with pytest.raises(ValueError, match="made by functions called make_task"):
            find_task("hclm_rl.testbed.smollm2.prepare")


def test_a_module_that_breaks_is_a_sentence(stranger: str):
    with pytest.raises(
        ValueError, match=r"no reward function at 'broken_stranger\.f': its module ends in ZeroDivision"
    ):
        find("broken_stranger.f", REWARD)


@pytest.mark.parametrize("path", ["..", ".", "a.", ".a", "a..b", "a b.c", "1.2"])
def test_no_dotted_path(path: str):
    with pytest.raises(ValueError, match="a dotted path is names with dots between"):
        find(path, REWARD)
