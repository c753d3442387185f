"""The page and what it reads: whole runs, seeds, and runs that broke off."""

import json
from pathlib import Path

import pytest

from hclm_rl.report import read_run, write_report
from hclm_rl.report.figures import smoothed
from hclm_rl.report.runs import Run, read_log
from hclm_rl.report.table import changes, compare

MEANS = {"token_entropy": 0.4, "pass@1": 0.5, "distinct_correct": 12.0}
ERRORS = {"token_entropy": 0.01, "pass@1": 0.02, "distinct_correct": 0.5}


def summary(**after: float) -> dict:
    measured = {"prompts": 3, "samples": 8, "standard_errors": ERRORS}
    return {
        "algorithm": "grpo",
        "model": "testbed",
        "terms": [{"entropy_bonus": {"coef": 0.1}}],
        "seed": 1,
        "steps": 20,
        "before": {**measured, "means": MEANS},
        "after": {**measured, "means": MEANS | after},
        "seconds": {"all": 9.0, "training": 7.0},
        "versions": {"trl": "1.16.0"},
    }


def write_run(folder: Path, **after: float) -> Path:
    folder.mkdir(parents=True)
    entries = [{"step": s, "max_steps": 20, "entropy": 0.4 - s / 100, "reward": s / 20} for s in range(5, 25, 5)]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "summary.json").write_text(json.dumps(summary(**after)))
    (folder / "recipe.yaml").write_text("# <script>alert('& more')</script>\ntask: coins\n")
    return folder


def test_the_page_stands_alone_and_holds_table_curves_and_recipe(tmp_path: Path):
    runs = {"plain": write_run(tmp_path / "plain", token_entropy=0.1), "controlled": write_run(tmp_path / "controlled")}
    page = write_report(runs, tmp_path / "new" / "report.html")
    text = page.read_text()
    assert page == tmp_path / "new" / "report.html"
    assert "0.100 ± 0.010" in text and "12.00 ± 0.50" in text  # after, plain; before
    assert "3 prompts, 8 responses each" in text and "standard error over prompts" in text
    assert text.count("<svg") == 2
    assert "&lt;script&gt;alert(&#39;&amp; more&#39;)" in text and "<script" not in text
    assert text.count("task: coins") == 1  # the same recipe of both runs, once
    for outside in ("<link", "src=", "@import", "url(http"):
        assert outside not in text


def test_a_log_cut_in_the_middle_of_a_line_is_shown_up_to_there(tmp_path: Path):
    folder = write_run(tmp_path / "plain")
    log = folder / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + b"\xff")  # of four lines, the last loses its end
    (folder / "summary.json").unlink()
    run = read_run("plain", folder)
    assert run.curve("reward") == ([5, 10, 15], [0.25, 0.5, 0.75])
    assert run.problems == [
        "log.jsonl breaks off after step 15: line 4 is incomplete.",
        "summary.json is missing: the run has not ended.",
    ]
    text = write_report({"plain": folder}, tmp_path / "report.html").read_text()
    assert "log.jsonl breaks off after step 15" in text
    assert text.count("<svg") == 1  # the curves up to step 15; nothing was measured


@pytest.mark.parametrize(("make", "state"), [(True, "is empty"), (False, "does not exist")])
def test_a_folder_without_a_run_is_one_sentence_beside_the_other_run(make: bool, state: str, tmp_path: Path):
    nothing = tmp_path / "nothing"
    if make:
        nothing.mkdir()
    whole = write_run(tmp_path / "whole", token_entropy=0.1)
    text = write_report({"nothing": nothing, "whole": whole}, tmp_path / "report.html").read_text()
    assert text.count('class="problem"') == 1
    assert f"The folder {nothing} {state}: there is nothing to show." in text
    assert "0.100 ± 0.010" in text and text.count("<svg") == 2


def test_nothing_logged_yet_is_said(tmp_path: Path):
    (tmp_path / "log.jsonl").touch()
    assert read_log(tmp_path / "log.jsonl") == ([], "log.jsonl is empty: the run has not logged a step.")
    assert read_log(tmp_path / "other.jsonl") == ([], "other.jsonl is missing: the run has not logged a step.")


def test_no_run_at_all_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report({}, tmp_path / "report.html")


def test_seeds_of_one_name_make_one_column_with_their_spread(tmp_path: Path):
    runs = [
        Run(name=f"plain, seed {seed}", folder=tmp_path, summary=summary(token_entropy=entropy))
        for seed, entropy in ((1, 0.1), (2, 0.2), (3, 0.6))
    ]
    table = compare(runs)
    assert table is not None and table.columns == ["before", "plain, after"]
    label, values = table.rows[0]
    # mean (0.1 + 0.2 + 0.6) / 3; deviations -0.2, -0.1, 0.3, so variance (0.04 + 0.01 + 0.09) / 2 = 0.07
    assert (label, values[1]) == ("token entropy (nats)", "0.300 ± 0.265")
    assert "standard deviation over 3 seeds" in table.caption
    # from 0.4 to 0.3 is a quarter less; success and diversity are as before
    assert changes(runs) == [("plain", "token entropy \u221225 %, pass@1 +0 %, distinct right answers per prompt +0 %")]


def test_runs_that_started_differently_keep_their_own_before(tmp_path: Path):
    other = summary(token_entropy=0.1)
    other["before"] = {**other["before"], "means": MEANS | {"token_entropy": 0.9}}
    runs = [Run(name="a", folder=tmp_path, summary=summary()), Run(name="b", folder=tmp_path, summary=other)]
    table = compare(runs)
    assert table is not None and table.columns == ["a, before", "b, before", "a, after", "b, after"]
    assert table.rows[0][1] == [f"{x} ± 0.010" for x in ("0.400", "0.900", "0.400", "0.100")]


def test_smoothing_is_a_centred_mean_that_shrinks_at_the_ends():
    # width 3: (0 + 3) / 2, (0 + 3 + 6) / 3, (3 + 6 + 3) / 3, (6 + 3) / 2
    assert smoothed([0.0, 3.0, 6.0, 3.0], width=3) == [1.5, 3.0, 4.0, 4.5]
