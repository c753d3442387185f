"""The scripts that train as the board does: the SFT stage before RL, and rollouts at plain sampling's token budget."""

import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "eval"))  # scripts, not a package

import cells  # noqa: E402
import many_runs  # noqa: E402
import rollouts_table  # noqa: E402
import sft_then_rl  # noqa: E402

from .test_leaderboard import WRITTEN  # noqa: E402


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny board; runs are made in this process."""
    file = tmp_path / "board.yaml"
    written = {**WRITTEN, "recipes": str(tmp_path), "entries": {}, "grids": {}, "also": {}}
    written["base"] = {**written["base"], "use_cpu": True}
    file.write_text(yaml.safe_dump(written))

    def over_processes(attempt, runs, where, processes) -> list:
        failed = [(run, error) for run in runs if (error := attempt(run))]
        assert not failed, failed[0][1]
        return []

    monkeypatch.setattr(many_runs, "over_processes", over_processes)
    return file


def test_a_start_is_made_once_and_trained_on(config: Path, tmp_path: Path, monkeypatch, capsys):
    short = ["--sft_steps", "2", "--lessons", "16", "--temperatures", "0.5", "--config", str(config)]
    line = [*short, "--methods", "em_ft", "--tasks", "coins", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert sft_then_rl.main(line) == 0
    said = capsys.readouterr().out
    rows = [row for row in said.splitlines() if row.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["plain_sft", "em_ft"]
    made = json.loads((tmp_path / "out/coins-em_ft_1.json").read_text())
    # em_ft sharpens the plain start of the same seed
    recipe = yaml.safe_load((tmp_path / "out/starts/coins-em_ft_1.yaml").read_text())
    assert recipe["model_name_or_path"] == str(tmp_path / "out/starts/coins-plain_sft_1")
    assert (made["start"]["steps"], made["after"]["steps"]) == (0, 2)
    assert made["start"]["model"] == str(tmp_path / "out/starts/coins-em_ft_1")
    monkeypatch.setattr(sft_then_rl, "make", lambda job, folder: pytest.fail("made again"))
    assert sft_then_rl.main(line) == 0 and capsys.readouterr().out == said
    with pytest.raises(SystemExit, match="was made with other settings"):
        sft_then_rl.main([*line, "--sft_steps", "3"])


def test_a_rollout_stops_when_it_has_drawn_what_plain_sampling_drew(config: Path, tmp_path: Path, capsys):
    line = ["--rollouts", "cure", "--seeds", "1", "--out", str(tmp_path), "--config", str(config), "--temperatures"]
    assert rollouts_table.main(line) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["plain", "cure"]
    plain, cure = (json.loads((tmp_path / f"{name}_1.json").read_text()) for name in ("plain", "cure"))
    assert plain["after"]["steps"] == 2 and plain["tokens"]["drawn"] == plain["tokens"]["returned"] > 0
    drawn, steps = cure["tokens"]["drawn"], cure["after"]["steps"]
    assert drawn < cure["tokens"]["returned"] and cure["tokens"]["reused"] > 0
    # it ends with the generation batch that reaches the budget, or with three times plain's steps
    assert drawn >= plain["tokens"]["drawn"] or steps == 6
    assert steps in (3, 5, 6)


def test_a_mean_without_a_spread_and_with_one():
    assert cells.spread([0.5]) == "0.500" and cells.spread([]) == "-"
    assert cells.spread([0.25, 0.75]) == "0.500 ± 0.354"  # sqrt(2 * 0.0625)
