"""Strength and steadiness of forces along a run, worked by hand; a few steps of the supervised run."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))  # scripts, not a package

import forces
from forces import WITHOUT, claim, coefficient, gaussian_classes, steadiness, supervised, tabulate, variation

from hclm_rl.equations.forces import SURROGATES, step_force


def test_variation_by_hand():
    assert variation([1.0, 2.0, 3.0]) == pytest.approx(0.5)  # deviation 1, mean 2
    assert variation([5.0]) == variation([0.0, 0.0]) == 0.0


def test_steadiness_by_hand():
    # 100 steps: 1 for the first window of 50, then 2, 4, 2, 4, ...
    series = [(step, 1.0 if step <= 50 else 2.0 + 2 * (step % 2)) for step in range(1, 101)]
    found = steadiness(series)
    assert (found.start, found.end, found.least, found.greatest) == (1.0, 3.0, 1.0, 4.0)
    # the second window has mean 3 and deviation sqrt(50 / 49); the first none
    assert found.within == pytest.approx(math.sqrt(50 / 49) / 3 / 2)
    # all: mean 2; squares 50 * 1 + 25 * 0 + 25 * 4 = 150 over 99
    assert found.variation == pytest.approx(math.sqrt(150 / 99) / 2)


def test_steadiness_counts_optimiser_steps_where_few_are_logged():
    series = [(1 + 5 * i, float(i)) for i in range(1, 21)]  # steps 6, 11, ..., 101
    found = steadiness(series)
    assert (found.start, found.end) == (1.5, 19.5)  # steps 6 and 11; 96 and 101
    assert (found.least, found.greatest) == (pytest.approx(1 / 1.5), pytest.approx(20 / 1.5))
    # windows of steps 6 to 55 and 56 to 105, ten values each: deviation sqrt(82.5 / 9), means 5.5 and 15.5
    deviation = math.sqrt(82.5 / 9)
    assert found.within == pytest.approx((deviation / 5.5 + deviation / 15.5) / 2)


def test_the_coefficient_is_of_the_second_half_and_by_windows():
    log = [{"step": step, "log_det/critical_coef_at_states": 1.0 if step <= 100 else 0.2} for step in range(1, 201)]
    for entry in log:
        entry |= {"log_det/force_norm": 2.0, "log_det/gradient_norm": 1.0}
    coef, why = coefficient(log, "log_det")
    assert coef == pytest.approx(0.22) and why == "1.1 x the critical coefficient"
    for entry in log:
        entry["log_det/critical_coef_at_states"] = -0.2
    # 1.1 x 0.01 x 1 / 2: the least that is not weak
    assert coefficient(log, "log_det")[0] == pytest.approx(0.0055)


def test_the_term_has_the_gradient_of_its_surrogate(monkeypatch):
    # -c <F, z> with F detached: d/dz = -c F, so after one step of plain descent of rate 1 on z alone H has risen
    z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for name in SURROGATES:
        whole = step_force(name, z.detach(), lambda x: x, {})
        assert whole is not None
        [gradient] = torch.autograd.grad(-0.5 * (whole.force(z.detach()) * z).sum(), z)
        torch.testing.assert_close(gradient, -0.5 * whole.force(z.detach()))


def test_classes_are_the_same_for_all_seeds_and_samples_are_not():
    (x, y), (other_x, other_y) = gaussian_classes(4000, 1), gaussian_classes(4000, 2)
    assert not torch.equal(x, other_x)
    for label in range(10):
        means = x[y == label].mean(dim=0), other_x[other_y == label].mean(dim=0)
        # each feature of a mean has deviation sqrt(1 / 400); of the difference 0.07, and 32 features
        assert (means[0] - means[1]).norm() < 3 * 0.07 * math.sqrt(32)


def test_a_few_supervised_steps_with_and_without_a_term(monkeypatch):
    monkeypatch.setattr(forces, "TRAINED_ON", 300)
    monkeypatch.setattr(forces, "TESTED_ON", 100)
    without, none = supervised(WITHOUT, 0.0, 1, 12), supervised("log_det", 0.0, 1, 12)
    assert [entry["step"] for entry in without] == [1, 6, 11, 12]
    assert without == none  # a coefficient of 0 changes nothing
    strong = supervised("log_det", 0.1, 1, 12)
    assert strong[0] == without[0]  # measured before the first step
    assert strong[-1]["log_det/value"] > without[-1]["log_det/value"] + 1  # about D / 2 nats per doubling of the states
    runs = [{"kind": "supervised", "term": WITHOUT, "coef": 0.0, "seed": 1, "log": without}]
    runs.append({"kind": "supervised", "term": "log_det", "coef": 0.1, "seed": 1, "log": strong, "why": "to try it"})
    found = tabulate(runs)
    assert found[0].row_count == 6 and "log_det against feature_softmax" in found[1]
    assert found[-1] == "log_det, seed 1: coef 0.1, to try it"


def test_the_claim_counts_runs():
    def run(ours, its) -> dict:
        log = [
            {
                "step": step,
                "log_det/force_norm": ours[step % 2],
                "log_det/rho": 0.5,
                "feature_softmax/force_norm": its[step % 2],
                "feature_softmax/rho": 0.1,
            }
            for step in range(1, 101)
        ]
        return {"log": log}

    # stronger and steadier; stronger and less steady: 2 to 6 against 1 to 1.5
    [told] = claim("made up", [run((3.0, 3.0), (1.0, 2.0)), run((2.0, 6.0), (1.0, 1.5))])
    assert "stronger in 2 of 2 runs, nearer to its bound in 2 of 2 runs, steadier over the run in 1 of 2 runs" in told
    assert (
        "steadier in windows in 1 of 2 runs; ||F|| 2.6 (2 to 3.2) times its at the start" in told
    )  # 3 / 1.5, 4 / 1.25
