"""Predicted against seen regimes: the area under the curve, trajectories and effects, worked by hand."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

from predictive import (
    EPS,
    TERMS,
    auroc,
    has_effect,
    judged,
    label,
    predicted,
    tabulate,
    trajectory,
    weak_threshold,
    with_terms,
)

FORCE = {"force_norm": 2.0, "gradient_norm": 0.5, "alignment": -0.2, "live": 0.8, "unsteadiness": 0.1}


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([3.0, 2.0, 1.0], [True, False, False], 1.0),
        ([1.0, 2.0, 3.0], [True, False, False], 0.0),
        ([2.0, 2.0, 2.0, 2.0], [True, True, False, False], 0.5),  # all tied
        # pairs (3, 2), (3, 1), (2, 2), (2, 1): won, won, tied, won
        ([3.0, 2.0, 2.0, 1.0], [True, True, False, False], 3.5 / 4),
        # (2, 2), (2, 3), (2, 1): tied, lost, won
        ([2.0, 2.0, 3.0, 1.0], [True, False, False, False], 1.5 / 3),
        ([-math.inf, math.inf, 0.0], [False, True, True], 1.0),
    ],
)
def test_auroc_by_hand(scores, truth, expected):
    assert auroc(scores, truth) == pytest.approx(expected)


def test_auroc_of_an_empty_class_is_none():
    assert math.isnan(auroc([1.0, 2.0], [True, True])) and math.isnan(auroc([1.0, 2.0], [False, False]))


def log_of(norms, gradients, **more) -> list[dict]:
    return [
        {"gauge/force_norm": norm, "gauge/gradient_norm": gradient, **{f"gauge/{k}": v[i] for k, v in more.items()}}
        for i, (norm, gradient) in enumerate(zip(norms, gradients, strict=True))
    ]


def test_a_trajectory_by_hand():
    log = log_of([1.0, 2.0, 3.0], [10.0, 40.0, 0.0], live=[0.9, 0.5, 0.1], alignment=[-1, -0.95, 0.3], value=[1, 2, 6])
    seen = trajectory(log, coef=0.1)
    # 0.1 * 1 / 10 = 0.01 and 0.1 * 2 / 40 = 0.005; the step without a gradient does not count
    assert seen.ratio == pytest.approx(0.0075)
    assert (seen.live, seen.alignment, seen.value) == (0.5, -0.95, 3.0)
    assert seen.unsteadiness == pytest.approx(0.5)  # 1, 2, 3: deviation 1, mean 2
    assert seen.flags() == {"weak": True, "frozen": False, "misaligned": True, "unstable": False}
    assert seen.regime() == "weak"


def test_a_trajectory_looks_at_the_last_steps_for_steadiness_and_value():
    norms = [1000.0] * 10 + [1.0, 3.0] * 25  # mean 2, deviation sqrt(50 / 49)
    seen = trajectory(log_of(norms, [1.0] * 60, value=[0.0] * 50 + [7.0] * 10), coef=1.0)
    assert seen.unsteadiness == pytest.approx(math.sqrt(50 / 49) / 2) and seen.value == 7
    assert seen.live == 1.0  # the feature softmax logs none
    spiky = trajectory(log_of([0.0] * 40 + [1.0] * 10, [1.0] * 50, value=[0.0] * 50), coef=1.0)
    # mean 0.2, deviation sqrt((40 * 0.04 + 10 * 0.64) / 49) = 0.404
    assert spiky.unsteadiness == pytest.approx(math.sqrt(8 / 49) / 0.2) and spiky.regime() == "weak"
    lost = trajectory(log_of([1.0, math.nan], [1.0, 1.0], value=[0.0, 0.0]), coef=1.0)
    assert lost.flags()["unstable"] and lost.regime() == "unstable"


def test_an_effect_is_three_deviations_of_the_runs_without():
    # 1, 2, 3: deviation 1
    assert not has_effect(4.9, 2.0, [1.0, 2.0, 3.0]) and has_effect(5.1, 2.0, [1.0, 2.0, 3.0])
    assert has_effect(-1.1, 2.0, [1.0, 2.0, 3.0])


def test_the_threshold_is_where_the_doctor_changes_its_mind():
    assert weak_threshold(FORCE) == pytest.approx(0.01 * 0.5 / 2)
    assert predicted(FORCE, 0.99 * weak_threshold(FORCE))["regime"] == "weak"
    assert predicted(FORCE, 1.01 * weak_threshold(FORCE))["regime"] == "healthy"
    assert predicted(FORCE | {"unsteadiness": 1.5}, 1.0)["regime"] == "unstable"
    assert predicted(FORCE | {"live": 0.01}, 1.0)["regime"] == "frozen"
    assert predicted(FORCE, 0.25)["effect"] == pytest.approx(0.0)  # 0.25 * 2 / 0.5 = 1
    assert weak_threshold(FORCE | {"force_norm": 0.0}) == 1.0


def test_judged_runs_and_the_table():
    forces = {name: FORCE for name in TERMS}
    found = {f"doctor_eps{eps:g}_1": {"kind": "doctor", "seed": 1, "forces": forces} for eps in EPS["log_det"]}
    names = [label(name, eps) for name in TERMS for eps in EPS[name]]
    for seed, value in ((1, 2.0), (2, 1.0), (3, 3.0)):
        entry = {f"{name}/{noun}": value for name in names for noun in ("value", "force_norm")}
        found[f"without_{seed}"] = {"kind": "without", "seed": seed, "rate": 1e-4, "log": [entry] * 20}
    for factor, value in ((0.1, 2.5), (10.0, 9.0)):
        coef = factor * weak_threshold(FORCE)
        log = log_of([2.0] * 20, [0.5] * 20, value=[value] * 20)
        own = {"surrogate": "log_det", "eps": 1.0, "coef": coef, "seed": 1, "rate": 1e-4}
        found[f"with_{factor}"] = {"kind": "with", **own, "log": log}
    rows = judged(found)
    assert [row["factor"] for row in rows] == pytest.approx([0.1, 10.0])
    assert [row["flags"]["effect"] for row in rows] == [False, True]
    assert [row["regime"] for row in rows] == ["weak", "healthy"] == [row["predicted"]["regime"] for row in rows]
    table, confusion, told = tabulate(rows)
    assert told == "the same regime in 2 of 2 runs"
    cells = [list(column.cells) for column in table.columns]
    of = {row[0]: row[2:] for row in zip(*cells, strict=True)}
    assert of["weak"] == ("1", "1", "1.000") and of["effect"] == ("1", "1", "1.000")
    assert of["frozen"] == ("0", "2", "none: a class is EMPTY")
    assert list(confusion.columns[1].cells) == ["1", "0", "0", "0", "0"]


def test_the_runs_are_enough_and_their_chains_build():
    from hclm_rl.recipe.config import build_chain

    of = {(name, eps, seed): FORCE for name in TERMS for eps in EPS[name] for seed in (1, 2)}
    jobs = with_terms(of, (0.1, 10.0), (2e-4, 4e-4), 60)
    assert len({job.file(Path()) for job in jobs}) == len(jobs) == 7 * 2 * 2 * 2
    for job in jobs[:14]:
        own, watched = build_chain(job.settings["entropy_terms"]).links
        assert watched.term.surrogate in type(own.term).__module__ and watched.name == "gauge"
