"""`make quickstart`, shortened: both runs, the table, the page; and what happens when a run dies."""

import subprocess
import sys
from pathlib import Path

import pytest

from .commands.test_launch import ROOT, environment, log_of, summary_of

pytestmark = pytest.mark.slow  # two trainings


def quickstart(out: Path, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "recipes/quickstart.py", "--out", str(out), "--max_steps", "10", "--eval_samples", "8"]
    return subprocess.run([*command, *more], cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_both_runs_of_all_seeds_the_table_and_the_page(tmp_path: Path):
    done = quickstart(tmp_path, "--seeds", "1", "2")
    assert done.returncode == 0, done.stderr
    for seed in (1, 2):
        plain, controlled = (tmp_path / f"seed-{seed}" / name for name in ("plain", "controlled"))
        assert summary_of(plain)["terms"] == [] and len(summary_of(controlled)["terms"]) == 1
        assert summary_of(plain)["before"] == summary_of(controlled)["before"]
        assert [entry["step"] for entry in log_of(plain)] == [entry["step"] for entry in log_of(controlled)]
    assert "plain, after" in done.stdout and "controlled, after" in done.stdout
    assert "standard deviation over 2 seeds" in " ".join(done.stdout.split())
    assert "\x1b[" not in done.stdout  # no terminal, no control codes
    page = (tmp_path / "report.html").read_text()
    assert "plain, seed 1" in page and page.count("<svg") == 2


def test_a_run_that_dies_is_reported_and_the_other_one_stopped(tmp_path: Path):
    done = quickstart(tmp_path, "--lerning_rate", "1")
    assert done.returncode == 1
    assert "run failed" in done.stderr and "unknown key 'lerning_rate' on the command line" in done.stderr
    assert not (tmp_path / "report.html").exists()
