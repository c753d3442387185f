"""What a run says that it was made with."""

import subprocess
from pathlib import Path

import pytest
import trl

from hclm_rl.watch.versions import commit_of, said_by_git, versions


def test_versions_are_those_of_the_packages():
    assert versions()["trl"] == trl.__version__


def test_the_commit_is_that_of_the_repository_and_says_what_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_of(tmp_path) is None  # no repository
    said_by_git(tmp_path, "init", "-q")
    assert commit_of(tmp_path) is None  # none yet
    (tmp_path / "a.py").write_text("a")
    said_by_git(tmp_path, "add", "a.py")
    said_by_git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "first")
    head = subprocess.run(["git", "-C", tmp_path, "log", "--format=%H"], capture_output=True, text=True).stdout.strip()
    (tmp_path / "folder").mkdir()
    assert commit_of(tmp_path) == commit_of(tmp_path / "folder") == head and len(head) == 40
    (tmp_path / "a.py").write_text("b")
    assert commit_of(tmp_path) == f"{head}, with changes"
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) is None  # no git
