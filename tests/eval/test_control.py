"""Errors of a held entropy and fits of predicted changes, worked by hand."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

from control import (
    by_name,
    changes,
    control_table,
    first_rollout,
    fit,
    held,
    held_out_table,
    in_windows,
    jobs,
    prediction_table,
    spread,
)


def log_of(entropies, **more) -> list[dict]:
    """Two optimiser steps a rollout: the reward, and what is given, at every first of them."""
    log = [{"step": i + 1, "entropy": entropy} for i, entropy in enumerate(entropies)]
    for i, entry in enumerate(log[::2]):
        entry |= {"reward": 0.5, **{name: values[i] for name, values in more.items()}}
    return log


def test_the_target_is_a_share_of_the_first_rollout():
    assert first_rollout(log_of([1.0, 3.0, 9.0, 9.0])) == 2.0
    assert first_rollout(log_of([1.0, 3.0])) == 2.0  # a single rollout


def test_errors_of_the_second_half_by_hand():
    # target 0.5 * 1; second half: ten steps of 0.6 and 0.4 by turns, then ten of 0.6
    found = held(log_of([1.0] * 20 + [0.6, 0.4] * 5 + [0.6] * 10), floor=0.5)
    assert found.target == pytest.approx(0.5)
    assert found.by_step == pytest.approx(0.1 / 0.5)
    assert found.by_mean == pytest.approx((0.0 + 0.1) / 2 / 0.5)
    assert found.bias == pytest.approx(0.05 / 0.5)


def test_changes_are_per_optimiser_step_and_of_the_steps_before():
    nothing = math.nan  # the first rollout has no step before it
    log = log_of([1.0] * 8, predicted_change=[nothing, 0.1, 0.2, 0.3], realised_change=[nothing, 1.0, 2.0, 3.0])
    assert changes(log) == [(3, 0.2, 2.0), (5, 0.4, 4.0), (7, pytest.approx(0.6), 6.0)]


def test_windows_sum_and_leave_out_what_is_not_full():
    of = [(3 + 2 * i, 1.0 * i, 10.0 * i) for i in range(25)]  # steps 3 to 51: 3 to 21, 23 to 41, and five more
    assert in_windows(of) == [(3, 45.0, 450.0), (23, 145.0, 1450.0)]


def test_a_fit_by_hand():
    # y = 2 x + 1 exactly; as it is: misses 2, 3, 4, squares 29, around the mean of 5: 8
    found = fit([(1, 1.0, 3.0), (2, 2.0, 5.0), (3, 3.0, 7.0)])
    assert (found.r2, found.slope, found.as_it_is) == pytest.approx((1.0, 2.0, 1 - 29 / 8))
    # x = -1, 0, 1 and y = 0, 1, 0: no line
    assert fit([(1, -1.0, 0.0), (2, 0.0, 1.0), (3, 1.0, 0.0)]).r2 == pytest.approx(0.0)
    assert math.isnan(fit([(1, 0.0, 1.0), (2, 0.0, 2.0), (3, 0.0, 3.0)]).r2)  # one prediction for all
    assert math.isnan(fit([(1, 0.0, 1.0)]).r2)


def test_spread_of_seeds():
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and spread([2.0]) == "2.000"


def run(name: str, seed: int, floor: float | None, right: float) -> dict:
    series = [0.01 * (i % 3) for i in range(30)]
    return {
        "name": name,
        "seed": seed,
        "floor": floor,
        "log": log_of([1.0] * 60, predicted_change=series, realised_change=[2 * x for x in series]),
        "means": {"pass@1": right},
        "per_prompt": {"pass@1": [right, right]},
    }


def test_tables_pair_runs_of_the_same_seed():
    # plain has a seed of its own, which must not count: 0.4 for seeds 1 to 3, 0.0 for seed 9
    found = [run("floor0.5", seed, 0.5, 0.5) for seed in (3, 1, 2)]
    found += [run("plain", seed, None, 0.4 if seed < 9 else 0.0) for seed in (1, 2, 3, 9)]
    of = by_name(found)
    assert list(of) == ["plain", "floor0.5"] and [each["seed"] for each in of["floor0.5"]] == [1, 2, 3]
    cells = [list(column.cells) for column in held_out_table(of).columns]
    assert cells[0] == ["plain", "floor0.5", "  - plain, 3 seeds"]
    assert [column[1] for column in cells] == ["floor0.5", "-", "0.500 ± 0.000", "-", "-", "-"]  # pass@1 alone
    assert cells[2][2].startswith("+0.100 (+0.100 to +0.100)") and cells[1][2] == cells[3][2] == "-"
    # entropy 1 throughout against a target of 0.5: off by as much as the target
    assert [list(column.cells)[1] for column in control_table(of).columns][3:6] == ["1.000 ± 0.000"] * 3
    cells = [list(column.cells) for column in prediction_table(of).columns]
    assert cells[4][0] == "2.000 ± 0.000"  # realised twice what was predicted


def test_jobs_are_paired_and_build():
    from many_runs import QUIET, flags, recipe

    from hclm_rl.recipe.arguments import parse
    from hclm_rl.recipe.config import build_chain

    found = jobs([0.4, 0.7], [1, 2], steps=400, prompts=384, samples=64)
    assert {(job.name, job.seed) for job in found} == {
        (n, s) for n in ("plain", "floor0.4", "floor0.7") for s in (1, 2)
    }
    arguments, config, _, _ = parse("grpo", [*recipe(found[-1]), *flags(QUIET)])
    assert arguments.task_kwargs == {"prompts": 256, "eval_prompts": 384, "eval_split": "test"}
    assert (config.steps_per_generation, config.per_device_train_batch_size) == (2, 128)
    [link] = build_chain(config.entropy_terms).links
    assert link.term.floor == 0.7 and arguments.task == "coins"
    noisy = jobs([0.5], [1], steps=400, prompts=384, samples=64, task="coins_noisy")[0]
    assert parse("grpo", [*recipe(noisy), *flags(QUIET)])[0].task == "coins_noisy"
