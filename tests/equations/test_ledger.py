"""The line from influences to entropy: its coefficients and errors by hand, and what it says of ordinary runs."""

import logging
import math
import random

import numpy as np
import pytest

from hclm_rl.equations.ledger import LEAST_SPARE, Ledger, solved

NETS = (-0.5, 0.25, -0.25, 0.5, -0.75, 0.0, 0.5, -0.25, -0.5, 0.75, 0.25, -0.5)


def measured(levels, nets, steps=2, **settings) -> dict:
    """The memory after measurements at every `steps` optimiser steps, each followed by steps of that net."""
    ledger, memory = Ledger(**settings), {}
    for batch, (level, net) in enumerate(zip(levels, nets, strict=True)):
        ledger.measure(memory, steps * batch, level)
        ledger.plan(memory, net)
    return memory


def levels_of(nets, gain=0.2, drift=-0.01, steps=2) -> np.ndarray:
    """dH = gain net + drift a step, from 3."""
    return 3 + np.concatenate([[0], np.cumsum(steps * (gain * np.asarray(nets[:-1]) + drift))])


def test_gain_drift_and_prediction_of_an_exact_line():
    memory = measured(levels_of(NETS), NETS, decay=1.0)
    line = Ledger.line(memory)
    assert (line.gain, line.drift) == (pytest.approx(0.2), pytest.approx(-0.01))
    assert line.gain_error == pytest.approx(0, abs=1e-6) and line.is_known
    assert line.change(-0.5) == (pytest.approx(0.2 * -0.5 - 0.01), pytest.approx(0, abs=1e-6))
    # the last interval's net was .25; the eleventh measurement was the second with a line
    assert memory["predicted"] == pytest.approx(0.2 * 0.25 - 0.01)
    assert memory["realised"] == pytest.approx(0.2 * 0.25 - 0.01)


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_coefficients_and_errors_are_those_of_weighted_least_squares(decay: float):
    source = np.random.default_rng(0)
    levels = levels_of(NETS) + 0.02 * source.standard_normal(len(NETS))
    memory = measured(levels, NETS, decay=decay)
    memory["pairs"] = 0.0  # no correlation
    line = Ledger.line(memory)
    n = len(NETS)
    summed = np.concatenate([[0], np.cumsum(2 * np.asarray(NETS[:-1]))])
    design = np.stack([np.ones(n), 2.0 * np.arange(n), summed], axis=1)
    weights = decay ** np.arange(n)[::-1]
    inverse = np.linalg.inv(design.T @ (weights[:, None] * design))
    expected = inverse @ design.T @ (weights * levels)
    residuals = levels - design @ expected
    variance = (weights * residuals**2).sum() / (weights.sum() - 3) if weights.sum() - 3 >= LEAST_SPARE else None
    if variance is None:  # 1 / (1 - .9) = 10 batches at most are remembered, less than the errors need
        assert line is None
        return
    assert (line.drift, line.gain) == (pytest.approx(expected[1]), pytest.approx(expected[2]))
    assert line.gain_error == pytest.approx(math.sqrt(variance * inverse[2, 2]))
    # the error at a net of 1: drift and gain have a covariance
    at = np.array([0, 1, 1])
    assert line.change(1.0)[1] == pytest.approx(math.sqrt(variance * at @ inverse @ at))
    memory["pairs"] = 0.6 * memory["errors"]  # (1 + .6) / (1 - .6) = 4, and its root
    assert Ledger.line(memory).gain_error == pytest.approx(2 * line.gain_error)


def test_older_batches_are_forgotten():
    # 40 batches, the gain .5 in the first half and .1 in the second: the newest weighs 1, each one before it .9 of that
    source = np.random.default_rng(1)
    nets = source.choice([-0.5, 0.0, 0.5], size=40)
    levels = 3 + np.concatenate([[0], np.cumsum(2 * np.where(np.arange(39) < 20, 0.5, 0.1) * nets[:-1])])
    design = np.stack([np.ones(40), 2.0 * np.arange(40), np.concatenate([[0], np.cumsum(2 * nets[:-1])])], axis=1)
    roots = np.sqrt(0.9 ** np.arange(40)[::-1])  # of the weights, which sum to 9.85: too few for an error
    expected = np.linalg.lstsq(roots[:, None] * design, roots * levels, rcond=None)[0]
    found = solved(np.reshape(measured(levels, nets, decay=0.9)["fit"], (4, 4)))[0]
    assert found[1:] == pytest.approx(expected[1:])
    assert found[2] == pytest.approx(0.1, abs=0.05), "nearly the gain of the second half"
    kept = solved(np.reshape(measured(levels, nets, decay=1.0)["fit"], (4, 4)))[0]
    assert abs(kept[2] - found[2]) > 0.05, "where nothing is forgotten it is another"


def test_nothing_is_predicted_before_the_gain_has_an_error():
    levels = levels_of(NETS)
    for count in range(1, len(NETS) + 1):
        memory = measured(levels[:count], NETS[:count], decay=1.0)
        has_error = count >= 3 + LEAST_SPARE
        assert (Ledger.line(memory) is not None) == has_error and (Ledger.gain(memory) > 0) == has_error
        assert ("predicted" in memory) == (count > 3 + LEAST_SPARE)  # by the line before the newest measurement


def test_the_gain_is_known_where_it_is_told_from_nothing():
    nothing = measured([1.0 + 0.1 * b for b in range(12)], [0.0] * 12)
    assert Ledger.line(nothing) is None, "no influence, no gain"
    steady = measured([1.0 - 0.1 * b for b in range(12)], [-0.5] * 12)
    assert Ledger.line(steady) is None, "what falls steadily under a steady net may be a drift"
    against = measured(levels_of(NETS, gain=-0.2), NETS)
    assert Ledger.line(against).gain == pytest.approx(-0.2) and Ledger.gain(against) == 0


def test_nets_within_their_own_error_make_no_gain():
    # summed influences that leave their line by rounding alone: 1e-11, with a standard error of 1e-3 each
    ledger, memory, source = Ledger(), {}, random.Random(0)
    for step in range(40):
        ledger.measure(memory, step, 0.44 + 0.01 * source.gauss(0, 1))
        ledger.plan(memory, source.gauss(0, 1e-11), error=1e-3)
    assert Ledger.line(memory) is None


def test_a_prediction_is_at_most_a_tenth_of_the_level():
    memory = measured(levels_of(NETS), NETS, decay=1.0, trust=1.0)
    ledger, level = Ledger(decay=1.0, trust=0.5), memory["entropy"]
    ledger.plan(memory, -50.0)  # 2 steps of .2 * -50 - .01 would be -20 nats
    ledger.measure(memory, 24, level)
    assert memory["predicted"] == pytest.approx(-0.1 * level / 2)
    assert memory["entropy"] == pytest.approx(level - 0.1 * level / 2), "half way back to the measurement"


def test_a_level_that_runs_away_is_taken_as_measured():
    ledger, memory = Ledger(), {}
    for step, (measured, level) in enumerate(
        [
            (1.0, 1.0),
            (0.5, 0.85),  # .3 of the way: one measurement may be noise
            (0.4, 0.4),  # a second one on that side
            (0.43, 0.409),  # less than a tenth off
            (0.6, 0.4663),  # on the other side
            (0.3, 0.41641),
            (0.2, 0.2),
        ]
    ):
        ledger.measure(memory, 2 * step, measured)
        assert memory["entropy"] == pytest.approx(level), step


def test_ledger_finds_the_gain_through_noise():
    # a deviation of .02 in each batch's mean entropy, four times what a step changes
    source = random.Random(0)
    nets = [source.gauss(-0.01, 0.02) for _ in range(200)]
    levels = [level + source.gauss(0, 0.02) for level in levels_of(nets, gain=0.3, drift=-0.001)]
    line = Ledger.line(measured(levels, nets, decay=1.0))
    # summed, nets of deviation 2 * .02 leave a straight line by about .04 sqrt(200 / 15) = .15: the error of the gain
    # is .02 / (.15 sqrt(200)) = .01
    assert line.gain_error == pytest.approx(0.01, rel=0.6)
    assert abs(line.gain - 0.3) < 3 * line.gain_error and abs(line.drift + 0.001) < 0.0005


def test_the_filter_holds_in_400_ordinary_starts():
    # nets of -.004 +- .004, 5 % noise in a batch's mean, a true gain of .3: the gain of two levels alone was 0 / 0,
    # and the filter was off by more than half of the way to a floor of .5 in 22 of them
    is_off = []
    for seed in range(400):
        source, memory, entropy, most, ledger = random.Random(seed), {}, 0.44, 0.0, Ledger()
        for step in range(25):
            ledger.measure(memory, 2 * step, entropy * math.exp(source.gauss(0, 0.05)))
            most = max(most, abs(memory["entropy"] - entropy))
            net = source.gauss(-0.004, 0.004)
            ledger.plan(memory, net)
            entropy += 0.6 * net
        is_off.append(most > 0.44 * 0.5 / 2)
    assert sum(is_off) == 0


def test_a_first_net_of_rounding_makes_no_gain():
    ledger, memory = Ledger(), {}
    for step, (entropy, net) in enumerate([(0.441, -3.2e-11), (0.423, 1.07e-4), (0.427, -0.004)]):
        ledger.measure(memory, 2 * step, entropy)
        assert Ledger.gain(memory) == 0 and 0.42 < memory["entropy"] < 0.45
        ledger.plan(memory, net)


def test_what_was_dropped_did_not_act():
    # each step's net was .1 more, on tokens that were then clipped
    ledger, memory = Ledger(decay=1.0), {}
    for batch, (level, net) in enumerate(zip(levels_of(NETS), NETS, strict=True)):
        ledger.measure(memory, 2 * batch, level)
        ledger.plan(memory, net + 0.1)
        for _ in range(2):
            ledger.drop(memory, 0.1)
    assert Ledger.line(memory).gain == pytest.approx(0.2) and Ledger.line(memory).drift == pytest.approx(-0.01)
    assert memory["predicted"] == pytest.approx(0.2 * NETS[-2] - 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_level_that_is_not_finite_is_passed_over(bad: float):
    levels = levels_of(NETS)
    levels[5] = bad
    memory = measured(levels, NETS, decay=1.0)
    line = Ledger.line(memory)
    assert (line.gain, line.drift) == (pytest.approx(0.2), pytest.approx(-0.01)), "its steps count all the same"
    assert all(np.isfinite(value).all() for value in memory.values())


def test_a_memory_of_an_older_version_is_learnt_anew(caplog):
    older = {"n": 10.0, "c": -2.0, "h": 10.0, "cc": 10.0, "ch": 2.0, "summed": -0.4, "entropy": 0.5, "measured": 0.52}
    memory = older | {"step": 20, "net": -0.01, "predicted": -0.1, "realised": -0.1, "start": 0.9}
    with caplog.at_level(logging.WARNING):
        Ledger(trust=0.5).measure(memory, 22, 0.48)
        Ledger().plan(memory, -0.01)
        Ledger(trust=0.5).measure(memory, 24, 0.49)
    assert memory["start"] == 0.9 and memory["entropy"] == pytest.approx(0.49) and "cc" not in memory
    assert len(caplog.messages) == 1 and "is of an older version and is learnt anew" in caplog.messages[0]
    assert Ledger.line(memory) is None


def test_the_pace_is_that_of_a_straight_line_through_the_measurements():
    memory, ledger = {}, Ledger(decay=1.0)
    ledger.measure(memory, 0, 1.0)
    assert Ledger.pace(memory) is None
    for step, entropy in ((2, 0.8), (4, 0.9), (6, 0.5)):
        ledger.measure(memory, step, entropy)
    # times -6, -4, -2, 0 with mean -3, levels with mean .8: slope (-3 .2 - 1 0 + 1 .1 - 3 .3) / 20
    assert Ledger.pace(memory) == pytest.approx((0.8 - 3 * 0.07, -0.07))
