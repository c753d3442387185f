"""Leads and false alarms of made-up runs, worked by hand; many_runs' files."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

import early_warning
from early_warning import alarms, choose, collapse_step, grid, halves, lowest, score
from many_runs import Job, read, run_all, write

from hclm_rl.watch.collapse import CollapseDetector, Verdict


@dataclass(frozen=True, kw_only=True)
class ByLevel:
    """Stands in for the detector: nothing but the level counts, so that alarms can be worked by hand."""

    collapsing_below: float = 0.3
    warning_below: float = 0.5
    memory: int = 1  # steps of the level, each of weight 1 / memory

    def judge(self, log):
        level, found = log[0]["entropy"], []
        for entry in log:
            level += (entry["entropy"] - level) / self.memory
            bad = "collapsing" if level < self.collapsing_below else "warning"
            found.append((entry["step"], Verdict(state=bad if level < self.warning_below else "healthy")))
        return found


BY_LEVEL = ByLevel()


def log_of(*pieces: tuple[float, int], every: int = 1, **more: float) -> list[dict]:
    entropies = [value for value, count in pieces for _ in range(count)]
    return [{"step": 1 + every * i, "entropy": value, **more} for i, value in enumerate(entropies)]


def test_collapse_is_a_smoothed_fifth_of_the_start():
    # k steps at 0.1 after steps at 1: mean of the last ten (10 - k + 0.1 k) / 10 = 1 - 0.09 k < 0.2 from k = 9 on
    assert collapse_step(log_of((1.0, 20), (0.1, 20))) == 29
    assert collapse_step(log_of((1.0, 20), (0.1, 8), (1.0, 12))) is None
    # twice the entropy throughout is the same
    assert collapse_step(log_of((2.0, 20), (0.2, 20))) == 29


def test_collapse_counts_optimiser_steps_where_only_every_second_is_logged():
    # steps 1, 3, ..., 39 at 1, then 0.1 from step 41; ten steps hold five entries: 1 - 0.18 k < 0.2 from k = 5 on
    assert collapse_step(log_of((1.0, 20), (0.1, 20), every=2)) == 49
    # the start is the mean over steps 1, 3, 5: (1 + 1 + 4) / 3 = 2, so 0.39 is under a fifth of it and 0.41 is not;
    # five entries of 4 or 0.39: (4 + 4 * 0.39) / 5 > 0.4, so all five must be low: steps 7 to 15
    assert collapse_step(log_of((1.0, 2), (4.0, 1), (0.39, 20), every=2)) == 15
    assert collapse_step(log_of((1.0, 2), (4.0, 1), (0.41, 20), every=2)) is None


def test_logs_of_any_runs_are_read_where_they_are_long_enough(tmp_path):
    for name, entries in (("a/seed-1", 60), ("a/seed-2", 59)):
        (tmp_path / name).mkdir(parents=True)
        lines = [json.dumps(entry) for entry in [{"loss": 1.0}, *log_of((1.0, entries), every=5)]]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    found = early_warning.logs_below(tmp_path)
    assert list(found) == ["a/seed-1"] and [entry["step"] for entry in found["a/seed-1"]][:2] == [1, 6]


def test_how_near_to_collapse():
    # five of ten steps at 0.25: (5 + 1.25) / 10
    assert lowest(log_of((1.0, 20), (0.25, 5), (1.0, 20))) == pytest.approx(0.625)


def test_leads_by_hand():
    runs = {
        "early": log_of((1.0, 20), (0.25, 2), (1.0, 5), (0.1, 20)),  # alarms at 21 and 28; T = 27 + 9 = 36
        "late": log_of((1.0, 20), (0.1, 20)),  # alarm at 21; T = 29
    }
    truth = {name: collapse_step(log) for name, log in runs.items()}
    assert truth == {"early": 36, "late": 29}
    assert alarms(runs["early"], BY_LEVEL) == [21, 28]
    found = score(runs, truth, BY_LEVEL, "collapsing")
    assert found.leads == pytest.approx((15 / 36, 8 / 29)) and found.lasting == pytest.approx((8 / 36, 8 / 29))
    assert found.missed == 0 and found.median_lead == pytest.approx((15 / 36 + 8 / 29) / 2)
    assert found.healthy == 0 and found.false_rate == 0


def test_an_alarm_after_the_collapse_is_a_missed_one():
    log = log_of((1.0, 20), (0.1, 20))
    blind = ByLevel(memory=40)
    # level after k steps 0.1 + 0.9 * 0.975^k < 0.3 from k = ln(4.5) / -ln(0.975) = 59.4 on: never within 40 steps
    assert alarms(log, blind) == []
    found = score({"run": log}, {"run": 29}, blind, "collapsing")
    assert found.leads == (0.0,) and found.missed == 1


def test_false_alarms_by_hand():
    dips = log_of((1.0, 20), (0.25, 5), (1.0, 20), (0.25, 5), (1.0, 10))
    lull = log_of((1.0, 20), (0.4, 20))  # between collapsing_below and warning_below
    runs = {"dips": dips, "lull": lull}
    truth = {name: collapse_step(log) for name, log in runs.items()}
    assert set(truth.values()) == {None}
    found = score(runs, truth, BY_LEVEL, "collapsing")
    assert (found.false, found.steps, found.alarmed, found.healthy) == (2, 100, ("dips",), 2)
    assert found.false_rate == pytest.approx(20)
    warned = score(runs, truth, BY_LEVEL, "warning")  # `collapsing` is a warning too, and one alarm while it lasts
    assert (warned.false, warned.alarmed) == (3, ("dips", "lull"))


def test_other_signs_change_no_alarm():
    log = log_of((1.0, 20), (0.4, 20))
    for entry in log[10:]:
        entry["clip_ratio/region_mean"] = 0.9
    assert alarms(log, CollapseDetector(), "warning") == alarms(
        log_of((1.0, 20), (0.4, 20)), CollapseDetector(), "warning"
    )


def test_halves_alternate_within_each_side():
    truth = {"a_1": 5, "a_2": 6, "b_1": 7, "c_1": None, "c_2": None, "d_1": None, "d_2": 9}
    assert halves(truth) == ({"a_1", "b_1", "c_1", "d_1"}, {"a_2", "d_2", "c_2"})
    # by settings: a, b, d collapse (d for one of its seeds), c does not
    assert halves(truth, "settings") == ({"a_1", "a_2", "d_1", "d_2", "c_1", "c_2"}, {"b_1"})


def test_the_grid_chooses_no_missed_run_and_the_longest_lead_within_the_limit():
    falling = log_of((1.0, 20), (0.45, 10), (0.28, 10), (0.1, 20))
    dip = log_of((1.0, 20), (0.35, 5), (1.0, 75))
    runs, truth = {"falling": falling, "dip": dip}, {"falling": collapse_step(falling), "dip": None}
    points = [ByLevel(collapsing_below=below) for below in (0.25, 0.3, 0.4)]
    # 0.25 alarms at 41, 0.3 at 31; 0.4 at 31 too and once falsely in 100 steps
    assert choose(runs, truth, points, most_false=5).collapsing_below == 0.3
    assert choose(runs, truth, points[2:], most_false=5).collapsing_below == 0.4  # none keeps to the limit
    assert len(grid({"warning_below": (0.1, 0.5), "patience": (0.5, 1.0)})) == 2  # the impossible left out


def test_the_table_reads_runs_and_names_the_false_alarms(tmp_path):
    of = {
        "a_1": log_of((1.0, 20), (0.1, 30)),
        "a_2": log_of((1.0, 20), (0.1, 30)),
        "b_1": log_of((1.0, 20), *((1 - 0.027 * i, 1) for i in range(1, 29)), (0.24, 30)),
        "b_2": log_of((1.0, 50)),
    }
    for name, log in of.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"job": {}, "h": log}))
    runs = {name: found["h"] for name, found in read([tmp_path]).items()}
    table, notes = early_warning.tabulate(runs, "runs", most_false=0.5)
    assert table.title == "2 collapsing runs, 2 others; halves by runs" and table.row_count == 8
    assert "collapse at steps 29, 29" in notes
    assert notes[-1] == "false alarm in b_1, whose entropy came down to 24 %"


def made(job: Job, folder: Path) -> dict:
    if job.settings.get("fails"):
        raise ValueError("as it should")
    return {"twice": 2 * job.seed}


def test_finished_runs_are_not_made_again_and_a_failure_ends_no_other(tmp_path):
    jobs = [Job(name="run", seed=seed, settings={"fails": seed == 2}) for seed in (1, 2, 3)]
    write(jobs[0].file(tmp_path), {"twice": "kept"})  # of an earlier version, which did not say how it was made
    failed = run_all(made, jobs, tmp_path, processes=1)
    assert [job.seed for job in failed] == [2]
    assert "as it should" in (tmp_path / "run_2.out").read_text()
    found = read([tmp_path])
    assert {name: each["twice"] for name, each in found.items()} == {"run_1": "kept", "run_3": 6}
    other = [Job(name="run", seed=3, settings={"fails": False, "max_steps": 5})]
    with pytest.raises(SystemExit, match=r"run_3\.json was made with other settings"):
        run_all(made, other, tmp_path, processes=1)
    with pytest.raises(SystemExit, match="--jobs must be at least 1, got 0"):
        run_all(made, [Job(name="run", seed=4, settings={})], tmp_path, processes=0)


def test_every_job_of_the_list_has_a_file_of_its_own_and_a_recipe_that_builds():
    from many_runs import QUIET, flags, recipe

    from hclm_rl.recipe.arguments import parse

    jobs = early_warning.jobs((1, 2, 3), 400)
    assert len({job.file(Path()) for job in jobs}) == len(jobs) >= 54
    _, config, _, _ = parse("grpo", [*recipe(jobs[16]), *flags(QUIET)])
    assert (config.logging_steps, config.per_device_train_batch_size, config.seed) == (1, 64, 1)
