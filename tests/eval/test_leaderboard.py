"""The leaderboard on made-up runs: statistics worked by hand, what is trained again and what is not, the page."""

import contextlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from transformers import TrainerCallback

from hclm_rl.commands import launch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "eval"))  # scripts, not a package

import front  # noqa: E402
from leaderboard import page as leaderboard_page  # noqa: E402
from leaderboard import run as leaderboard  # noqa: E402  (only now on the path)
from leaderboard import stamp as leaderboard_stamp  # noqa: E402
from leaderboard import temperatures as leaderboard_temperatures  # noqa: E402
from leaderboard.plan import BEFORE, Board, Run, chosen, is_finished, point_scores  # noqa: E402
from leaderboard.statistics import (  # noqa: E402
    area_over_log_k,
    bootstrap_interval,
    holm,
    paired_difference,
    pass_curve,
)

WRITTEN = yaml.safe_load("""
recipes: recipes
seeds: [1, 2, 3]
grid_seeds: [11]
splits: {report: {eval_split: test}, choose: {eval_split: validation}}
samples: 4
pass_ks: [1, 2, 4]
reference: plain
base: {num_generations: 4, bf16: false, gradient_checkpointing: false, logging_steps: 1, warmup_steps: 0}
tasks:
  coins:
    task: coins
    task_kwargs: {prompts: 8, eval_prompts: 2}
    model_name_or_path: testbed
    max_steps: 2
    learning_rate: 1.0e-3
    per_device_train_batch_size: 8
settings:
  off_policy: {steps_per_generation: 2, num_iterations: 1}
  on_policy: {steps_per_generation: 1, num_iterations: 1}
entries:
  adaptive: {use_adaptive_entropy: true}
coef_factors: [0.5, 1, 2]
share_factors: [0.25, 0.5, 1]
grids:
  adaptive: [{}, {entropy_target: 0.1}, {entropy_target: 0.3}]
  clip_cov: [{}, {ratio: 0.02, lower: 0.5}, {ratio: 0.002}]
also:
  adaptive: [{entropy_target: 0.1}]
""")


def board_in(folder: Path, **given) -> Board:
    written = {**WRITTEN, "recipes": str(folder / "recipes")}
    return Board.read(written, **({"out": folder / "runs"} | given))


def entry_of(board: Board, name: str):
    return next(entry for entry in board.entries() if entry.name == name)


def pretend(
    run: Run, correct: list[int], at_temperature: dict[str, list[int]] | None = None, affected: float | None = None
) -> None:
    """A finished run's summary without a run."""
    run.folder.mkdir(parents=True, exist_ok=True)
    prompts = len(correct)
    per_prompt = {
        "correct": correct,
        "distinct_correct": [min(1, c) for c in correct],
        "token_entropy": [0.25] * prompts,
        "answer_entropy": [0.5] * prompts,
    }
    summary = {
        "settings": run.settings,
        "steps": 2,
        "device": "cpu",
        "affected": {} if affected is None else {run.entry: affected},
        "per_prompt": per_prompt,
        "at_temperature": {at: {"correct": counts} for at, counts in (at_temperature or {}).items()},
        "seconds": {"all": 3.0, "training": 2.0, "training_cpu": 1.0},
        "versions": {"torch": "2.13.0"},
        "machine": "an abacus, 2 rows",
        "date": "2026-11-22",
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))


# ---- statistics


def test_pass_at_k_of_two_seeds_and_two_prompts():
    # n = 4. c = 1: pass@1 1/4, pass@2 1 - C(3,2)/C(4,2) = 1 - 3/6, pass@4 1. c = 2: 1/2, 1 - 1/6, 1
    curve = pass_curve(np.array([[0, 1], [2, 4]]), samples=4, ks=[1, 2, 4])
    np.testing.assert_allclose(curve[:, 0, 1], [1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(curve[:, 1, 0], [1 / 2, 5 / 6, 1])
    assert curve.shape == (3, 2, 2) and not curve[:, 0, 0].any() and (curve[:, 1, 1] == 1).all()


def test_area_over_log_k():
    # k = 1, 2, 4 lie at 0, 1, 2 of log2: (1/4 + 1/2)/2 + (1/2 + 1)/2 = 9/8, over the width 2
    assert area_over_log_k(np.array([1 / 4, 1 / 2, 1]), [1, 2, 4]) == pytest.approx(9 / 16)
    # k = 1, 2, 8 at 0, 1, 3: (0 + 1)/2 * 1 + (1 + 1/2)/2 * 2 = 2, over the width 3
    assert area_over_log_k(np.array([0, 1, 1 / 2]), [1, 2, 8]) == pytest.approx(2 / 3)


def test_paired_difference_by_the_table_of_variance():
    plain = np.array([[0.5, 0.1], [0.2, 0.3], [0.4, 0.6]])
    # differences by seed: 1 3 / 2 6 / 3 9, mean 4; seed means 2 4 6, prompt means 2 6
    # SS_seed = 2 * (4 + 0 + 4) = 16, SS_prompt = 3 * (4 + 4) = 24, residuals +-1, 0, -+1: SS_rest = 4
    # MS = 16/2, 24/1, 4/2 = 8, 24, 2; Var = (8 + 24 - 2)/6 = 5
    # df = 30^2 / (8^2/2 + 24^2/1 + 2^2/2) = 900/610
    ours = plain + np.array([[1, 3], [2, 6], [3, 9]])
    result = paired_difference(ours, plain)
    assert result.mean == pytest.approx(4)
    assert result.p == pytest.approx(2 * scipy.stats.t.sf(4 / math.sqrt(5), 900 / 610))
    half = scipy.stats.t.ppf(0.975, 900 / 610) * math.sqrt(5)
    assert (result.low, result.high) == (pytest.approx(4 - half), pytest.approx(4 + half))


def test_a_difference_that_only_varies_with_the_seed_is_the_paired_t_test_over_seeds():
    plain = np.random.default_rng(0).random((5, 40))
    of_seed = np.array([0.1, 0.3, -0.1, 0.2, 0.4])
    result = paired_difference(plain + of_seed[:, None], plain)
    assert result.p == pytest.approx(scipy.stats.ttest_1samp(of_seed, 0).pvalue)


def test_no_difference_no_spread_and_too_few_seeds():
    same = np.full((3, 4), 0.5)
    assert paired_difference(same, same).p == 1.0
    assert paired_difference(same + 0.25, same).p == 0.0
    two = paired_difference(np.ones((2, 4)), np.zeros((2, 4)))
    assert two.mean == 1 and math.isnan(two.p) and math.isnan(two.low)


def test_holm():
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, never below the one before: .04 .06 .06 .06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    # what has no test yet counts in the family: 3 x 0.02 and 2 x 0.03
    assert holm([math.nan, 0.02, 0.03])[1:] == pytest.approx([0.06, 0.06])
    assert math.isnan(holm([math.nan, 0.02])[0]) and holm([]) == []


def test_the_bootstrap_draws_seeds_and_prompts():
    source = np.random.default_rng(1)
    of_seed, of_prompt = source.normal(size=(30, 1)), source.normal(size=(1, 200))
    result = bootstrap_interval(of_seed + of_prompt)
    # for an additive table the variance of the mean is Var_seed/S + Var_prompt/P (variances with divisor S and P)
    error = math.sqrt(of_seed.var() / 30 + of_prompt.var() / 200)
    assert result.mean == pytest.approx((of_seed + of_prompt).mean())
    # 10,000 resamples: the quantiles' own error is about 1.5 % of the width
    assert result.high - result.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert bootstrap_interval(np.full((1, 5), 0.3)).low == pytest.approx(0.3)


# ---- which runs there are


def test_entries_are_the_reference_the_files_the_recipes_and_the_other_terms_that_train(tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    own = {"entropy_terms": [{"qae": {"quantile_k": 0.6}}], "epsilon_high": 0.28, "learning_rate": 7, "output_dir": "x"}
    (tmp_path / "recipes" / "qae.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "recipes" / "watch.yaml").write_text("entropy_terms: [information_force]")
    names = [entry.name for entry in board_in(tmp_path).entries()]
    assert names[:4] == [BEFORE, "plain", "adaptive", "qae"] and {"clip_cov", "log_det"} <= set(names)
    assert not {"information_force", "spectrum", "watch"} & set(names)  # diagnostics
    default = entry_of(board_in(tmp_path), "qae").default
    settings = default.run(1, "report").settings
    assert settings["entropy_terms"][0]["qae"]["quantile_k"] == 0.6
    assert settings["learning_rate"] == 1e-3 and "output_dir" not in settings  # the board's, and how a run is measured
    assert default.brings() == {"epsilon_high": 0.28} and settings["epsilon_high"] == 0.28
    assert settings["task_kwargs"] == {"prompts": 8, "eval_prompts": 2, "eval_split": "test"}


def test_a_method_of_several_updates_is_left_out_on_policy(tmp_path: Path):
    clipping = {"clip_higher": {"epsilon_high": 0.28}, "clip_and_kl": {"epsilon_high": 0.28, "beta": 0.1}}
    with_terms = {"kl_cov_and_kl": {"entropy_terms": ["kl_cov"], "beta": 0.1}}  # the KL acts with one update, too
    (tmp_path / "clips.yaml").write_text("{epsilon: 0.1, learning_rate: 7, output_dir: x}")
    written = {**WRITTEN, "recipes": str(tmp_path), "entries": WRITTEN["entries"] | clipping | with_terms}
    on, off = (Board.read(written, setting=setting, out=tmp_path) for setting in ("on_policy", "off_policy"))
    assert on.left_out() == ["clip_higher", "clips", "bapo", "kl_cov"] and off.left_out() == []
    assert not {"clip_higher", "clips", "kl_cov"} & {entry.name for entry in on.entries()}


def test_a_task_leaves_entries_out_changes_them_and_some_stop_early(tmp_path: Path):
    own = {"pear": {"entropy_terms": [{"pear": {"think_end": [3]}}]}}
    task = {**WRITTEN["tasks"]["coins"], "without": ["tool_bonus"], "entries": own}
    written = {**WRITTEN, "tasks": {"coins": task}, "stops_early": {"em_rl": 1, "tea": 9}}
    board = Board.read({**written, "recipes": str(tmp_path)}, out=tmp_path)
    assert "tool_bonus" not in [entry.name for entry in board.entries()]
    settings = {name: entry_of(board, name).default.run(1, "report").settings for name in ("pear", "em_rl", "tea")}
    assert settings["pear"]["entropy_terms"][0]["pear"]["think_end"] == [3]
    assert "without" not in settings["pear"] and "entries" not in settings["pear"]
    assert [settings[name]["max_steps"] for name in ("pear", "em_rl", "tea")] == [2, 1, 2]


def test_the_points_of_grids(tmp_path: Path):
    board = board_in(tmp_path)
    points = {entry.name: [point.point for point in entry.grid] for entry in board.entries()}
    assert points["clip_cov"] == ["default", "ratio=0.02,lower=0.5", "ratio=0.002"]
    assert points["adaptive"] == ["default", "entropy_target=0.1", "entropy_target=0.3"]
    assert points["entropy_bonus"] == ["coef=0.0025", "default", "coef=0.01"]  # 0.005 times 0.5, 1, 2
    assert points["forking_tokens"] == ["coef=0.25", "coef=0.5", "default"]  # a share of the way: no extrapolation
    assert points["plain"] == points[BEFORE] == []
    changed = entry_of(board, "clip_cov").grid[1].run(11, "choose").settings
    assert (
        changed["entropy_terms"][0]["clip_cov"]["ratio"] == 0.02
        and changed["task_kwargs"]["eval_split"] == "validation"
    )
    assert entry_of(board, "adaptive").grid[1].run(11, "choose").settings["entropy_target"] == 0.1


def test_grids_of_unequal_size_shared_seeds_and_unknown_names_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="the grid of qae must have as many points as coef_factors, got 1"):
        Board.read({**WRITTEN, "grids": {"qae": [{}]}}, out=tmp_path).entries()
    with pytest.raises(ValueError, match=r"seeds and grid_seeds must differ, both have \[11\]"):
        board_in(tmp_path, seeds=[1, 11])
    with pytest.raises(ValueError, match=r"temperatures must be above 0, got 0\.0"):
        board_in(tmp_path, temperatures=[0.5, 0.0])
    with pytest.raises(ValueError, match="no entry 'clip_cv': clip_cov"):
        board_in(tmp_path, only=["clip_cv"]).entries()
    with pytest.raises(ValueError, match="no 'coin' among tasks: coins"):
        board_in(tmp_path, task="coin")
    with pytest.raises(ValueError, match="entry bad: qae has no hyper-parameter 'quantile'"):
        Board.read(
            {**WRITTEN, "entries": {"bad": {"entropy_terms": [{"qae": {"quantile": 1}}]}}}, out=tmp_path
        ).entries()
    with pytest.raises(ValueError, match="unknown key 'sample'"):
        Board.read({**WRITTEN, "sample": 3}, out=tmp_path)


def test_a_single_point_is_trained_by_its_name_on_the_page_without_its_entry_or_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained = []
    monkeypatch.setattr(leaderboard, "train_all", lambda runs, jobs: trained.extend(runs) or [])
    leaderboard.train_board(board_in(tmp_path, only=["adaptive, entropy_target=0.1"], seeds=[1]), 1, has_grids=True)
    assert [(run.entry, run.settings.get("entropy_target")) for run in trained] == [
        (BEFORE, None),
        ("plain", None),
        ("adaptive", 0.1),
    ]
    with pytest.raises(ValueError, match=r"no point 'adaptive, target=1' under also: 'adaptive, entropy_target=0\.1'"):
        board_in(tmp_path, only=["adaptive, target=1"]).entries()
    with pytest.raises(ValueError, match="no point 'plain, coef=1' under also: it has none"):
        board_in(tmp_path, only=["plain, coef=1"]).entries()
    cannot_run = replace(board_in(tmp_path, only=["adaptive, entropy_target=0.1"]), without=("adaptive",))
    assert [entry.name for entry in cannot_run.entries()] == [BEFORE, "plain"]  # as by the entry's own name


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(tmp_path: Path):
    board = board_in(tmp_path, only=["plain"])
    defaults = [entry.default for entry in board.entries()]
    runs = leaderboard.pending(defaults, board.seeds, "report")
    assert [(run.entry, run.settings["seed"]) for run in runs] == [
        (entry, seed) for seed in (1, 2, 3) for entry in (BEFORE, "plain")
    ]
    pretend(runs[0], [1, 2])
    runs[1].folder.mkdir(parents=True)
    (runs[1].folder / "log.jsonl").write_text('{"step": 1}\n')  # killed in the middle
    assert leaderboard.pending(defaults, board.seeds, "report") == runs[1:]


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path):
    run = entry_of(board_in(tmp_path), "clip_cov").default.run(1, "report")
    pretend(run, [1, 2])
    assert is_finished(run)
    with pytest.raises(ValueError, match=r"was made with other settings \(max_steps 2 -> 5\)"):
        is_finished(entry_of(board_in(tmp_path, steps=5), "clip_cov").default.run(1, "report"))


def test_a_hyper_parameter_that_is_new_leaves_the_runs_before_it_as_they_are(tmp_path: Path):
    run = entry_of(board_in(tmp_path), "clip_cov").default.run(1, "report")
    pretend(run, [1, 2])
    summary = run.folder / "summary.json"
    written = json.loads(summary.read_text())
    [term] = written["settings"]["entropy_terms"]
    del term["clip_cov"]["lower"]
    summary.write_text(json.dumps(written))
    assert is_finished(run)
    term["clip_cov"]["lower"] = 3.0  # not the default
    summary.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"was made with other settings \(entropy_terms"):
        is_finished(run)
    term["clip_cov"] |= {"lower": run.settings["entropy_terms"][0]["clip_cov"]["lower"], "of_old": 1}
    summary.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"was made with other settings \(entropy_terms"):
        is_finished(run)


def test_the_best_point_of_a_grid_needs_all_its_runs(tmp_path: Path):
    board = board_in(tmp_path)
    entry = entry_of(board, "clip_cov")
    for point, correct in zip(entry.grid, ([1, 1], [2, 1], [1, 2]), strict=True):
        assert chosen(entry, board) is None
        pretend(point.run(11, "choose"), correct)
    # areas by hand: c = 1: (1/4 + 1/2)/2 + (1/2 + 1)/2 over 2 = 9/16; c = 2: (1/2 + 5/6)/2 + (5/6 + 1)/2 over 2 = 19/24
    scores = point_scores(entry, board)
    assert scores["default"] == pytest.approx(9 / 16)
    assert scores["ratio=0.002"] == pytest.approx((9 / 16 + 19 / 24) / 2)
    best = chosen(entry, board)
    assert best is not None and best.point == "ratio=0.02,lower=0.5"  # the earlier of a tie


# ---- the page


def test_the_page_from_made_up_runs(tmp_path: Path):
    board = board_in(tmp_path)
    for seed in board.seeds:
        pretend(entry_of(board, "plain").default.run(seed, "report"), [1, 1, 0, 1])
        pretend(entry_of(board, "clip_cov").default.run(seed, "report"), [2, 2, 1, 2], affected=0.125)
    page = tmp_path / "docs" / "page.md"
    leaderboard_page.write([board], page)
    text = page.read_text()
    [plain] = [line for line in text.splitlines() if line.startswith("| `plain`")]
    [ours] = [line for line in text.splitlines() if line.startswith("| `clip_cov`")]
    # AUC 9/16 on three prompts and 0 on one: 27/64; ours 19/24 on three and 9/16 on one: 47/64
    assert plain.startswith("| `plain` | - | 0.422 [") and ours.startswith("| `clip_cov` | +0.312 [")
    assert " 0.734 [" in ours and ours.endswith("| 0.12 | 2 | 1 | 3 |") and plain.endswith("| - | 2 | 1 | 3 |")
    # pass@1: + 1/4 on all prompts and seeds, without spread: significant
    assert "| 0.438 [0.312, 0.500] ▲ |" in ours and "▲" not in plain
    assert text.index("| `clip_cov`") < text.index("| `plain`")
    assert "Not run: `before training`, `adaptive`, `adaptive, entropy_target=0.1`" in text
    assert "### Best of" not in text
    assert (tmp_path / "docs" / "page_coins_off_policy.svg").read_text().startswith("<svg")
    assert "Passed by no other in both AUC and pass@1 (means, not tested): `clip_cov`." in text
    # right on two of four prompts in all samples, on the others in none: pass@1 1/2, AUC 1/2
    pretend(entry_of(board, "qae").default.run(1, "report"), [4, 4, 0, 0])
    leaderboard_page.write([board], page)
    assert "in both AUC and pass@1 (means, not tested): `clip_cov`, `qae`." in page.read_text()


def test_areas_are_read_between_two_temperatures():
    values = {0.5: (0.6, [0.9, 0.5]), 1.0: (0.5, [0.8, 0.8]), 1.5: (0.3, [0.8, 0.72])}
    curve = {
        at: leaderboard_temperatures.Point(accuracy=accuracy, areas=np.array(areas))
        for at, (accuracy, areas) in values.items()
    }
    assert leaderboard_temperatures.areas_at(curve, 0.5) == pytest.approx([0.8, 0.8])
    assert leaderboard_temperatures.areas_at(curve, 0.575) == pytest.approx([0.875, 0.575])  # a quarter of the way
    assert leaderboard_temperatures.areas_at(curve, 0.35) == pytest.approx([0.8, 0.74])
    assert [leaderboard_temperatures.areas_at(curve, beyond) for beyond in (0.61, 0.2)] == [None, None]


def test_differences_at_equal_accuracy_are_those_of_the_table_of_variance(tmp_path: Path):
    board = board_in(tmp_path, seeds=[1, 2, 3])
    for seed, ours, colder in ((1, [1, 0], [2, 0]), (2, [0, 0], [2, 2]), (3, [0, 1], [0, 2])):
        beside = {"0.5": [2, 2]} if seed < 3 else None  # plain's pass@1 at 1 is known without them
        pretend(entry_of(board, "plain").default.run(seed, "report"), [1, 1], beside)
        pretend(entry_of(board, "clip_cov").default.run(seed, "report"), ours, {"0.5": colder})
    page = tmp_path / "page.md"
    leaderboard_page.write([board], page)
    # of 4 samples, c = 1 has AUC 9/16 and c = 2 19/24. Plain's pass@1 of 1/4 is that of seeds 1 and 3 at 0.5 and lies
    # half way between 1/2 and 0 on seed 2
    areas = np.array([[19 / 24, 0], [19 / 48, 19 / 48], [0, 19 / 24]])
    said = paired_difference(areas, np.full((3, 2), 9 / 16))
    written = f"{said.mean:+.3f} [{said.low:+.3f}, {said.high:+.3f}]"
    behind = (tmp_path / "page_all.md").read_text()
    assert f"| `clip_cov` | 0.396 ± 0.000 | {written} | {written} | " in behind
    assert "| `plain` | 0.562 ± 0.000 | - | - | " in behind
    # the main table: the same means, three seeds, a spread over them
    assert "| `clip_cov` | 0.396 ± 0.000 (3) |" in page.read_text()
    assert "| `plain` | **0.562 ± 0.000** (3) |" in page.read_text()


def test_policies_are_compared_at_the_references_accuracy(tmp_path: Path):
    board = board_in(tmp_path, seeds=[1])
    plain, ours = (entry_of(board, name).default.run(1, "report") for name in ("plain", "clip_cov"))
    pretend(plain, [1, 1], {"0.5": [2, 2]})
    pretend(ours, [0, 1], {"0.5": [2, 1]})
    page = tmp_path / "page.md"
    leaderboard_page.write([board], page)
    text = (tmp_path / "page_all.md").read_text()
    # of 4 samples, c = 1 has AUC 9/16, c = 2 19/24, c = 0 none. Ours has pass@1 3/8 at 0.5 and 1/8 at 1, so 1/4
    # half way between, at AUC (65/96 + 27/96) / 2
    assert "| `plain` | 0.562 | - | - | 0.500, 0.792 | 0.250, 0.562 | 1 |" in text
    assert "| `clip_cov` | 0.479 | -0.083 | -0.083 | 0.375, 0.677 | 0.125, 0.281 | 1 |" in text
    assert text.index("| `plain` | 0.562") < text.index("| `clip_cov` | 0.479")
    assert (tmp_path / "page_coins_off_policy_temperatures.svg").read_text().startswith("<svg")
    assert "at 1 on the same seed" in text


def test_the_main_table_says_who_is_ahead_at_the_references_accuracy_on_every_task(tmp_path: Path):
    noisy = {**WRITTEN["tasks"]["coins"], "task": "coins_noisy"}
    written = {**WRITTEN, "tasks": {**WRITTEN["tasks"], "coins_noisy": noisy}}
    written["recipes"] = str(tmp_path / "recipes")
    boards = [Board.read(written, task, out=tmp_path / "runs") for task in ("coins", "coins_noisy")]
    for board, ours in zip(boards, ([0, 0], [2, 0]), strict=True):
        for seed in board.seeds:
            pretend(entry_of(board, "plain").default.run(seed, "report"), [1, 1])
            pretend(entry_of(board, "clip_cov").default.run(seed, "report"), [2, 2], {"2.0": ours})
    pretend(entry_of(boards[0], "qae").default.run(1, "report"), [1, 1])  # at one temperature: not in the table
    page = tmp_path / "page.md"
    leaderboard_page.write(boards, page)
    text = page.read_text()
    assert "| entry | coins | coins_noisy |" in text and "| `qae` |" not in text
    # of 4 samples, c = 1 has AUC 9/16, c = 2 19/24. On coins ours has pass@1 1/2 at 1 and 0 at 2, so plain's 1/4 half
    # way, with half of 19/24 on either prompt: significant; on coins_noisy at 2, with 19/24 on one prompt and 0 on one
    assert "| `plain` | **0.562 ± 0.000** (3) | **0.562 ± 0.000** (3) |" in text
    assert "| `clip_cov` | 0.396 ± 0.000 ▼ (3) | 0.396 ± 0.000 (3) |" in text
    assert "| `clip_cov` | 0.500, 0.792, 1.0 | 0.500, 0.792, 1.0 | 1.0 |" in text
    lines = (tmp_path / "page.csv").read_text().splitlines()
    head = lines[0].split(",")
    said = [dict(zip(head, each.split(","), strict=True)) for each in lines]
    [line] = [each for each in said if each["task"] == "coins_noisy" and each["entry"] == "clip_cov"]
    assert (line["auc_at_plains_pass_1"], line["over_plain"], line["best_other"]) == ("0.3958", "-0.1667", "plain")


def test_the_readmes_picture_has_the_mean_pass_at_k_of_each_seed(tmp_path: Path):
    board = board_in(tmp_path, seeds=[1, 2])
    for seed, correct in ((1, [1, 1]), (2, [2, 0])):
        pretend(entry_of(board, "plain").default.run(seed, "report"), correct)
    # of 4 samples: c = 1: 1/4, 1/2, 1; c = 2: 1/2, 5/6, 1; c = 0: 0
    np.testing.assert_allclose(front.curves(board, "plain"), [[1 / 4, 1 / 2, 1], [1 / 4, 5 / 12, 1 / 2]])
    [axes] = front.draw([board], ["plain"]).axes
    [line] = axes.lines
    np.testing.assert_allclose(line.get_ydata(), [1 / 4, 11 / 24, 3 / 4])
    assert axes.get_title() == "a start that has coverage"


def test_a_point_beside_an_entry_is_trained_with_the_defaults_and_is_the_grids_own(tmp_path: Path):
    board = board_in(tmp_path, only=["adaptive"], seeds=[1])
    entry = entry_of(board, "adaptive")
    default, beside = entry.shown
    assert beside == entry.grid[1] and beside.name == "adaptive, entropy_target=0.1"
    runs = leaderboard.pending(entry.shown, board.seeds, "report")
    assert [run.settings.get("entropy_target") for run in runs] == [None, 0.1]
    pretend(entry_of(board, "plain").default.run(1, "report"), [1, 1])
    pretend(default.run(1, "report"), [2, 1])
    pretend(beside.run(1, "report"), [2, 2])
    for point, right in zip(entry.grid, (1, 3, 2), strict=True):
        pretend(point.run(11, "choose"), [right, right])
    page = tmp_path / "page.md"
    leaderboard_page.write([board], page)
    at_the_recipes, best = page.read_text().split("### Best of 3")
    line = "| `adaptive, entropy_target=0.1` | +0."
    assert at_the_recipes.count(line) == best.count(line) == 1 and "| `adaptive` |" in at_the_recipes
    assert "| `adaptive` | +" not in best
    with pytest.raises(ValueError, match="no entry 'adptive': adaptive"):
        Board.read({**WRITTEN, "also": {"adptive": [{}]}}, out=tmp_path).entries()


def test_an_archive_gives_the_same_page_elsewhere(tmp_path: Path):
    config = tmp_path / "board.yaml"
    config.write_text(yaml.safe_dump({**WRITTEN, "recipes": str(tmp_path / "recipes")}))
    pretend(entry_of(board_in(tmp_path), "plain").default.run(1, "report"), [1, 0])
    pretend(entry_of(board_in(tmp_path), "qae").default.run(1, "report"), [2, 1], affected=0.5)
    line = ["--config", str(config), "--table", "--out"]
    here, there = tmp_path / "page.md", tmp_path / "elsewhere" / "page.md"
    assert leaderboard.main([*line, str(tmp_path / "runs"), "--page", str(here)]) == 0
    archive = tmp_path / "page_runs.tar.xz"
    assert leaderboard.main([*line, str(tmp_path / "new"), "--page", str(there), "--runs", str(archive)]) == 0
    assert there.read_text() == here.read_text()
    assert there.with_name("page_runs.tar.xz").read_bytes() == archive.read_bytes()
    assert "an abacus, 2 rows" in here.read_text() and "2026-11-22" in here.read_text()
    archive.write_text("no archive")
    assert leaderboard.main([*line, str(tmp_path / "new"), "--page", str(there), "--runs", str(archive)]) == 2


RECIPE = """# What it does.
#
# About a minute.
# Numbers: not measured yet
task: coins
entropy_terms:
- clip_cov: {ratio: 0.02}
# For 7B: as it is.
"""


def test_what_was_seen_is_stamped_into_recipes_and_the_table_of_methods(tmp_path: Path):
    methods, recipes = tmp_path / "methods.md", tmp_path / "recipes"
    recipes.mkdir()
    methods.write_text(
        "| name |\n| [`clip_cov`](../recipes/methods/clip_cov.yaml) | p | k | n | not measured yet |\n| `qae` | p |\n"
    )
    (recipes / "clip_cov.yaml").write_text(RECIPE)
    (recipes / "qae.yaml").write_text(RECIPE.replace("clip_cov: {ratio: 0.02}", "qae"))  # not run
    board = board_in(tmp_path)
    for seed, ours in zip(board.seeds, ([2, 2], [2, 2], [2, 1]), strict=True):
        pretend(entry_of(board, "plain").default.run(seed, "report"), [1, 1])
        pretend(entry_of(board, "clip_cov").default.run(seed, "report"), ours, affected=0.125)
    rows = leaderboard_page.write([board], tmp_path / "page.md")
    assert leaderboard_stamp.write(rows, methods) == ["clip_cov"]
    text = (recipes / "clip_cov.yaml").read_text()
    # pass@1 of the seeds 1/2, 1/2, 3/8: mean 11/24, deviation sqrt(1/192)
    assert "0.458 ± 0.072" in text and "not measured" not in text and "Affected: 0.12" in text
    assert text.startswith("# What it does.\n#\n# About a minute.\n# Numbers: seeds 1, 2, 3, 2 held-out prompts x 4")
    assert yaml.safe_load(text) == yaml.safe_load(RECIPE) and text.endswith("# For 7B: as it is.\n")
    [row] = [line for line in methods.read_text().splitlines() if "clip_cov" in line]
    assert row == "| [`clip_cov`](../recipes/methods/clip_cov.yaml) | p | k | n | no difference shown: coins |"
    # pass@1 0.458 - 0.25
    said = (tmp_path / "verdicts.csv").read_text()
    assert "\nclip_cov,coins,no difference shown," in said and ",+0.208," in said and said.endswith(",3,0.12\n")
    assert "| `qae` | p |\n" in methods.read_text() and (recipes / "qae.yaml").read_text().count("not measured") == 1
    once = text, methods.read_text(), said
    leaderboard_stamp.write(rows, methods)
    assert once == (
        (recipes / "clip_cov.yaml").read_text(),
        methods.read_text(),
        (tmp_path / "verdicts.csv").read_text(),
    )
    leaderboard_stamp.write([*rows, *rows], methods)  # the verdicts of all boards, the numbers of the first
    assert once[0] == (recipes / "clip_cov.yaml").read_text()
    [both] = [line for line in methods.read_text().splitlines() if "clip_cov" in line]
    assert both.endswith("| no difference shown: coins, coins |") and both.count("|") == row.count("|")
    assert (tmp_path / "verdicts.csv").read_text().count(",+0.208,") == 2
    [ours] = [each for each in rows[0] if each.name == "clip_cov"]
    elsewhere = replace(ours, candidate=replace(ours.candidate, board=replace(board, setting="on_policy")))
    assert leaderboard_stamp.verdict(elsewhere, rows[0])[0] == "coins on-policy"


def test_a_board_without_a_run_of_the_seeds_is_left_out_of_the_page(tmp_path: Path):
    config, page = tmp_path / "board.yaml", tmp_path / "page.md"
    config.write_text(yaml.safe_dump({**WRITTEN, "recipes": str(tmp_path / "recipes")}))
    pretend(entry_of(board_in(tmp_path), "plain").default.run(1, "report"), [1, 0])
    pretend(entry_of(board_in(tmp_path, setting="on_policy"), "plain").default.run(2, "report"), [1, 0])
    line = ["--config", str(config), "--out", str(tmp_path / "runs"), "--page", str(page), "--table", "--seeds"]
    assert leaderboard.main([*line, "2"]) == 0
    assert "## coins, on_policy" in page.read_text() and "## coins, off_policy" not in page.read_text()


def test_runs_of_the_archive_are_not_lost_to_a_page_of_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, page = tmp_path / "board.yaml", tmp_path / "page.md"
    config.write_text(yaml.safe_dump({**WRITTEN, "recipes": str(tmp_path / "recipes")}))
    line = ["--config", str(config), "--page", str(page), "--table", "--out"]
    pretend(entry_of(board_in(tmp_path), "plain").default.run(1, "report"), [1, 1])
    assert leaderboard.main([*line, str(tmp_path / "runs")]) == 0
    before = page.read_text(), (tmp_path / "page_runs.tar.xz").read_bytes()
    assert leaderboard.main([*line, str(tmp_path / "fresh")]) == 2
    assert "holds 1 run that" in (err := capsys.readouterr().err) and f"--runs {tmp_path / 'page_runs.tar.xz'}" in err
    assert before == (page.read_text(), (tmp_path / "page_runs.tar.xz").read_bytes())
    archive = str(tmp_path / "page_runs.tar.xz")
    assert leaderboard.main([*line, str(tmp_path / "fresh"), "--runs", archive]) == 0
    assert before == (page.read_text(), (tmp_path / "page_runs.tar.xz").read_bytes())


def test_seeds_and_steps_of_one_board_leave_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, page = tmp_path / "board.yaml", tmp_path / "page.md"
    config.write_text(yaml.safe_dump({**WRITTEN, "recipes": str(tmp_path / "recipes")}))
    for seed in board_in(tmp_path).seeds:
        for name, right in (("plain", [1, 1]), ("qae", [2, 1])):
            pretend(entry_of(board_in(tmp_path), name).default.run(seed, "report"), right)
    line = ["--config", str(config), "--out", str(tmp_path / "runs"), "--page", str(page)]
    assert leaderboard.main([*line, "--table"]) == 0
    [before, *_] = page.read_text().split("\n## ")[1:]

    def trained(board: Board, jobs: int, has_grids: bool) -> list:
        pretend(entry_of(board, "plain").default.run(9, "report"), [1, 0])
        return []

    monkeypatch.setattr(leaderboard, "train_board", trained)
    line += ["--setting", "on_policy", "--no-grid"]
    assert leaderboard.main([*line, "--seeds", "9", "--steps", "5"]) == 0
    [after, other] = page.read_text().split("\n## ")[1:]
    assert after.strip() == before.strip() and other.startswith("coins, on_policy") and "seeds 9" in other
    monkeypatch.setattr(leaderboard, "train_board", lambda *_: [])
    pretend(entry_of(board_in(tmp_path, setting="on_policy"), "plain").default.run(1, "report"), [1, 1])
    assert leaderboard.main([*line, "--seeds", "9", "--steps", "5"]) == 2  # seed 1 was made at the file's steps


def test_the_command_line_writes_the_page_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, page = tmp_path / "board.yaml", tmp_path / "page.md"
    config.write_text(yaml.safe_dump({**WRITTEN, "recipes": str(tmp_path / "recipes")}))
    line = ["--config", str(config), "--out", str(tmp_path / "runs"), "--page", str(page), "--table"]
    assert leaderboard.main(line) == 2
    assert capsys.readouterr().err == "leaderboard: there is no finished run to make a page from\n"
    pretend(entry_of(board_in(tmp_path), "plain").default.run(1, "report"), [1, 1])
    assert leaderboard.main(line) == 0 and page.is_file()
    assert leaderboard.main([*line, "--steps", "5"]) == 2
    assert "max_steps 2 -> 5" in capsys.readouterr().err


# ---- training


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_trains_measures_and_does_not_depend_on_the_run_before_it(tmp_path: Path):
    board = board_in(tmp_path, only=["clip_cov"])
    entries = {entry.name: entry.default.run(1, "report") for entry in board.entries()}
    leaderboard.train(entries["clip_cov"])
    first = json.loads((entries["clip_cov"].folder / "summary.json").read_text())
    log = (entries["clip_cov"].folder / "log.jsonl").read_text()
    leaderboard.train(entries[BEFORE])
    leaderboard.train(replace(entries["clip_cov"], temperatures=(1.0, 0.1)))
    again = json.loads((entries["clip_cov"].folder / "summary.json").read_text())
    assert first["per_prompt"] == again["per_prompt"] and first["steps"] == 2
    beside = again["at_temperature"]
    assert beside["1.0"]["correct"] == again["per_prompt"]["correct"] and not first["at_temperature"]
    assert beside["0.1"]["token_entropy"] < beside["1.0"]["token_entropy"]
    keys = ("reward", "entropy", "loss")
    entropies = [[json.loads(line).get(key) for key in keys] for line in log.splitlines()]
    repeated = (entries["clip_cov"].folder / "log.jsonl").read_text().splitlines()
    assert [[json.loads(line).get(key) for key in keys] for line in repeated] == entropies
    before = json.loads((entries[BEFORE].folder / "summary.json").read_text())
    assert before["steps"] == 0 and before["per_prompt"] != first["per_prompt"]
    assert all(0 <= c <= 4 for c in first["per_prompt"]["correct"]) and first["after"]["samples"] == 4
    assert set(first["affected"]) == {"clip_cov"}
    assert is_finished(entries["clip_cov"]) and is_finished(entries[BEFORE]) and not is_finished(entries["plain"])


def test_a_run_does_what_its_recipe_says_of_weights_and_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = {"sigma_reparam": True, "reset_reference": {"every": 1}, "beta": 0.1}
    seen = []

    class Reset(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            seen.append("step")

    monkeypatch.setattr(launch, "sigma_reparam", lambda model: seen.append("sigma") or contextlib.nullcontext())
    monkeypatch.setattr(launch, "reset_of", lambda given: seen.append(given) or Reset())
    written = {**WRITTEN, "recipes": str(tmp_path), "entries": {"own": own}, "grids": {}, "also": {}}
    leaderboard.train(entry_of(Board.read(written, out=tmp_path), "own").default.run(1, "report"))
    assert seen == [{"every": 1}, "sigma", "step", "step"]


def test_the_control_without_training_is_the_start_itself_and_its_sharpened_texts(tmp_path: Path):
    written = {**WRITTEN, "recipes": str(tmp_path), "entries": {"sharp": {"power": {"moves": 2, "blocks": 2}}}}
    board = Board.read({**written, "grids": {}, "also": {}}, out=tmp_path, temperatures=(0.01,))
    run, before = (entry_of(board, name).default.run(1, "report") for name in ("sharp", BEFORE))
    for each in (run, before):
        leaderboard.train(each)
    sharp, start = (json.loads((each.folder / "summary.json").read_text()) for each in (run, before))
    assert sharp["steps"] == 0 and is_finished(run)
    assert sharp["settings"]["power"] == {"moves": 2, "blocks": 2} and "power" not in run.recipe
    assert sharp["per_prompt"] == start["per_prompt"]
    # at p^100 all four texts to a prompt are the likeliest one: none or all of them are right
    assert {*sharp["at_temperature"]["0.01"]["correct"]} <= {0, 4}


def test_a_failed_run_is_told_and_left_for_the_next_start(tmp_path: Path):
    good, bad = (entry_of(board_in(tmp_path), name).default.run(1, "report") for name in (BEFORE, "plain"))
    bad.recipe["task"] = "no_such_task"
    assert [run.folder for run in leaderboard.train_all([bad, good], jobs=1)] == [bad.folder]
    assert "no task 'no_such_task'" in (bad.folder / "error.txt").read_text()
    assert not is_finished(bad) and is_finished(good)
