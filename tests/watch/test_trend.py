"""Trends by rank: by hand, and as scipy has them."""

import itertools
import math
import random

import pytest
from scipy import stats

from hclm_rl.watch.history import BINS, LEAST, add_noise, last_time_above, mean_of, push
from hclm_rl.watch.trend import mann_kendall, resting_point, theil_sen


def test_mann_kendall_by_hand():
    # 1, 3, 2, 4: of six pairs five rise and one falls, S = 4; Var S = 4 * 3 * 13 / 18 = 26 / 3
    assert mann_kendall([1, 3, 2, 4]) == pytest.approx(3 / math.sqrt(26 / 3))
    # 2, 1, 1: S = -2; a tie of two takes 2 * 1 * 9 off 3 * 2 * 11, over 18
    assert mann_kendall([2, 1, 1]) == pytest.approx(-1 / math.sqrt(48 / 18))
    assert mann_kendall([1, 1, 1]) == 0 and mann_kendall([2]) == 0 and mann_kendall([]) == 0


def test_eight_in_order_have_a_score_beyond_three():
    # all 28 pairs rise; Var S = 8 * 7 * 21 / 18
    assert mann_kendall(range(LEAST)) == pytest.approx(27 / math.sqrt(8 * 7 * 21 / 18)) and LEAST == 8


def test_the_score_is_that_of_scipys_tau():
    rng = random.Random(1)
    for n in (LEAST, BINS, 30):
        values = [rng.gauss(0, 1) + 0.05 * i for i in range(n)]
        tau = stats.kendalltau(range(n), values).statistic
        s = round(tau * n * (n - 1) / 2)
        expected = math.copysign(abs(s) - 1, s) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        assert mann_kendall(values) == pytest.approx(expected)


def test_theil_and_sens_line_is_scipys():
    rng = random.Random(2)
    times = [0.0, 1.0, 2.5, 3.0, 7.0, 8.0, 9.5, 12.0]
    values = [2 - 0.3 * t + rng.gauss(0, 0.2) for t in times]
    values[3] = 50.0  # one odd value
    slope, level = theil_sen(times, values)
    assert slope == pytest.approx(stats.theilslopes(values, times).slope)
    assert level == pytest.approx(2 - 0.3 * 12, abs=0.3)
    assert theil_sen([1.0, 1.0], [1.0, 2.0]) == (0.0, 1.5)  # two values of one time have no slope


def test_where_an_exponential_comes_to_rest():
    # 0.3 + 0.9^i: exact whatever the parts, because their means are those of an exponential with the same rest
    for n in (8, 9, 12):
        rest, error = resting_point([0.3 + 0.9**i for i in range(n)], noise=0.0)
        assert rest == pytest.approx(0.3) and error == 0
    assert resting_point([1 - 0.1 * i**2 for i in range(9)], 0.1)[0] == -math.inf  # ever faster
    assert resting_point([0.1 * i for i in range(9)], 0.1)[0] == -math.inf  # rises


def test_its_error_is_the_spread_of_noisy_ones():
    rng = random.Random(3)
    clean = [0.3 + 0.8**i for i in range(12)]
    found = [resting_point([y + rng.gauss(0, 0.005) for y in clean], 0.005) for _ in range(2000)]
    spread = stats.tstd([rest for rest, _ in found])
    assert spread == pytest.approx(stats.tmean([error for _, error in found]), rel=0.1)  # to first order


def test_rings_keep_the_last_bins_of_every_scale():
    state: dict = {}
    grown = [push(state, "entropy", float(i)) for i in range(2 * BINS + 2)]
    assert grown[:8] == [1, 2, 1, 3, 1, 2, 1, 4]
    assert state["entropy"][0] == [float(i) for i in range(BINS + 2, 2 * BINS + 2)]
    assert state["entropy"][1] == [2 * i + 0.5 for i in range(1, BINS + 1)][-BINS:]  # means of pairs, 0.5, 2.5, ...
    assert state["entropy"][2] == [4 * i + 1.5 for i in range((2 * BINS + 2) // 4)]


def test_a_push_leaves_the_state_before_alone():
    before: dict = {}
    push(before, "entropy", 1.0)
    after = dict(before)
    push(after, "entropy", 2.0)
    assert before["entropy"] == [[1.0]] and after["entropy"] == [[1.0, 2.0], [1.5]]


def test_the_last_time_above_a_level_is_looked_for_farther_and_farther_back():
    state: dict = {}
    for step in range(100):
        push(state, "time", float(step))
        push(state, "entropy", 1.0 if step < 50 else 0.1)
    # 12 bins of 4 reach back to step 52; of 8, steps 48 to 55 have a mean of .325, and 40 to 47 one of 1
    assert last_time_above(state, 0.9, 0) == 43.5
    assert last_time_above(state, 2.0, 0) is None


def test_noise_is_the_deviation_of_an_entry():
    rng, state = random.Random(4), {}
    values = [1 + rng.gauss(0, 0.2) for _ in range(2000)]
    found = []
    for before, now in itertools.pairwise(values):
        add_noise(state, before, now)
        found.append(state["noise"])
    assert stats.tmean(found[100:]) == pytest.approx(0.2, rel=0.05)
    state |= {"entropy": [[1.0, 2.0, 3.0]]}
    mean, error = mean_of(state, 0, 2) or (0, 0)
    assert mean == 2.5 and error == pytest.approx(2.5 * state["noise"] / math.sqrt(2))
    assert mean_of(state, 0, 4) is None
