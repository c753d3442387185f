"""`hclm-rl forecast`: from a run folder to the sentence."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the forecast needs the extra `eval`")

from hclm_rl.commands import cli
from hclm_rl.evaluation.forecast import controls, curve_of
from hclm_rl.watch.report.runs import Run


def write_run(folder: Path, least_entropy: float = 0.0, steps: int = 400, **more: float) -> Path:
    """Logged every 5 of 400 steps: R = 0.9 - 0.2 e^H, H from 1 nat to 0, plus a last line as the trainer writes it."""
    folder.mkdir()
    with (folder / "log.jsonl").open("w") as log:
        for step in range(5, steps + 5, 5):
            entropy = 1 - step / 400
            reward = 0.9 - 0.2 * math.exp(entropy) + 0.001 * math.sin(step)
            entry = {"step": step, "max_steps": 400, "entropy": max(entropy, least_entropy), "reward": reward}
            log.write(json.dumps(entry | more) + "\n")
        log.write(json.dumps({"step": steps, "max_steps": 400, "train_runtime": 1.0}) + "\n")
    return folder


def test_the_ceiling_from_the_first_part(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert cli.main(["forecast", str(write_run(tmp_path / "plain"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 points, steps 5 to 60 of 400"  # 15 % of 400
    assert lines[2].startswith("ceiling (H = 0): 0.7") and "95% interval [0." in lines[2]
    assert lines[3].startswith("68 later points") and lines[3].endswith("at step 400")
    assert lines[4].startswith("ceiling by all 80 points: 0.700 [0.")
    assert len(lines) == 5


def test_a_run_under_way_is_forecast_from_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "begun", steps=80)
    assert cli.main(["forecast", str(folder), "--share", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("16 points, steps 5 to 80 of 400\n")


def test_a_controlled_run_is_named_and_gets_no_forecast(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = write_run(tmp_path / "held", 0.6, **{"entropy_bonus/affected": 0.5, "entropy_bonus/coef": 0.1})
    assert cli.main(["forecast", str(folder)]) == 1
    *_, acts, sentence = capsys.readouterr().out.splitlines()
    assert acts == "entropy_bonus acts from step 5: the law is stated for runs without entropy control or KL."
    assert sentence.startswith("The run leaves the curve: from step 205 on entropy no longer falls (mean 0.600 nats)")


def test_diagnostics_and_terms_at_coefficient_0_are_no_control():
    log = [{"step": 1, "force/affected": 0.0, "force/coef": 1.0, "bonus/affected": 1.0, "bonus/coef": 0.0}]
    assert controls(Run(name="", folder=Path(), log=log)) == {}
    log.append({"step": 2, "bonus/affected": 1.0, "bonus/coef": 0.1})
    assert controls(Run(name="", folder=Path(), log=log)) == {"bonus": 2}


def test_trls_own_kl_and_bonus_are_controls():
    log = [{"step": 1, "kl": 0.0, "entropy_coef": 0.0}, {"step": 2, "kl": 1e-3}, {"step": 3, "entropy_coef": 0.01}]
    found = controls(Run(name="", folder=Path(), log=log))
    assert found == {"the KL to the start (beta)": 2, "TRL's entropy bonus": 3}


def test_a_score_of_its_own_line_takes_the_nearest_entropy_and_what_is_not_finite_is_left_out():
    log = [{"step": s, "entropy": 1 - s / 10} for s in (1, 2, 3, 4)]
    log += [{"step": 3, "eval_reward": 0.5}, {"step": 4, "eval_reward": math.nan}, {"step": 9, "eval_reward": 0.7}]
    curve = curve_of(Run(name="", folder=Path(), log=log), reward="eval_reward")
    assert (curve.steps, curve.entropy, curve.reward) == ([3, 9], [0.7, 0.6], [0.5, 0.7])


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = str(write_run(tmp_path / "run"))
    for arguments, sentence in [
        ([folder, "--share", "15"], "--share must be in (0, 1], got 15.0"),
        ([folder, "--level", "95"], "--level must be in (0, 1), got 95.0"),
        ([folder, "--reward", "score"], "has no values of 'score': logged are entropy, reward, train_runtime"),
        ([str(tmp_path / "none")], "does not exist: there is nothing to show."),
    ]:
        assert cli.main(["forecast", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1


def test_the_table_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    plain, held = write_run(tmp_path / "plain"), write_run(tmp_path / "held", 0.6)
    monkeypatch.setattr(sys, "argv", ["law.py", str(plain), str(held)])
    runpy.run_path(str(Path(__file__).parents[2] / "eval" / "law.py"), run_name="__main__")
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].rpartition("/")[2] for row in rows] == ["plain", "held"]
    # the last eight of 80 rewards lie at H = 35/400 ... 0: mean of 0.9 - 0.2 e^H = 0.6908
    assert rows[0][7] == "0.691" and rows[0][9] == "applies" and rows[1][9].startswith("The run leaves the curve")
