"""The entropy-performance law: the paper's numbers, curves of known coefficients, and where it does not apply."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the law needs the extra `eval`")

from hclm_rl.evaluation.law import across_sizes, departure, fit_law, forecast, objection_to_fit, step_effect

A, B = 0.1, 0.6  # of the synthetic curves: ceiling 0.5


def curve(entropy: np.ndarray, noise: float = 0.0, seed: int = 0, correlation: float = 0.0) -> np.ndarray:
    """Rewards on the curve with noise of that standard deviation, correlated from point to point."""
    shocks = np.random.default_rng(seed).normal(size=len(entropy))
    for i in range(1, len(shocks)):
        shocks[i] = correlation * shocks[i - 1] + math.sqrt(1 - correlation**2) * shocks[i]
    return B - A * np.exp(entropy) + noise * shocks


def spent(points: int) -> np.ndarray:
    """Entropy falling as in a plain run: from 0.9 nats to 0.1."""
    return 0.1 + 0.8 * np.exp(-np.linspace(0, 4, points))


def test_worked_example_of_the_card():
    # x = e^H = 2.718282, 2.225541, 1.822119, 1.648721; a = -Cov(x, R) / Var(x), b = mean R + a mean x
    law = fit_law([1.0, 0.8, 0.6, 0.5], [0.200, 0.250, 0.290, 0.305])
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.098718, 0.468920, 0.370202), abs=1e-6)
    assert law.rmse == pytest.approx(0.000895, abs=1e-6)
    assert [law.reward_at(h) for h in (0.3, 0.1, 0.05)] == pytest.approx([0.335664, 0.359819, 0.365140], abs=1e-6)
    assert law.slope_at(0.5) == pytest.approx(-0.162758, abs=1e-6)


def test_later_points_of_the_card_are_scored_at_their_observed_entropies():
    entropies, rewards = [1.0, 0.8, 0.6, 0.5, 0.3, 0.1, 0.05], [0.200, 0.250, 0.290, 0.305, 0.340, 0.355, 0.360]
    found = forecast(range(7), entropies, rewards, last_step=3)
    assert (found.fitted, found.later) == (4, 3)
    assert found.later_rmse == pytest.approx(0.004777, abs=1e-6)
    assert found.final_error == pytest.approx(-0.005140, abs=1e-6)
    assert found.objection == "Too few points for the law: 4, and at least 5 are needed."


def test_the_interval_of_the_ceiling_is_that_of_the_intercept_at_x_equal_1():
    # R against x - 1: the intercept is the ceiling. x - 1 = 0, 1, 2, 3 with R = 4, 2, 3, 1: slope -0.8, intercept 3.7,
    # residuals 0.3, -0.9, 0.9, -0.3, s^2 = 1.8 / 2, Var = s^2 (1/4 + 1.5^2 / 5) = 0.63; t(0.975, 2) = 4.302653.
    # Lag 1: (-0.27 - 0.81 - 0.27) / 1.8 + 2 / 4 < 0, so nothing is added for autocorrelation.
    law = fit_law(np.log([1.0, 2.0, 3.0, 4.0]), [4, 2, 3, 1])
    assert law.ceiling == pytest.approx(3.7)
    half = 4.302653 * math.sqrt(0.63)
    assert law.interval() == pytest.approx((3.7 - half, 3.7 + half), rel=1e-6)
    assert law.interval_of_a() == pytest.approx((0.8 - 4.302653 * 0.18**0.5, 0.8 + 4.302653 * 0.18**0.5), rel=1e-6)


def test_points_of_more_validation_items_weigh_more():
    twice = fit_law([1.0, 0.8, 0.8, 0.6, 0.5], [0.2, 0.27, 0.27, 0.29, 0.3])  # the same point two times
    weighted = fit_law([1.0, 0.8, 0.6, 0.5], [0.2, 0.27, 0.29, 0.3], items=[50, 100, 50, 50])
    assert (weighted.a, weighted.b) == pytest.approx((twice.a, twice.b), rel=1e-6)


@pytest.mark.parametrize(
    ("points", "correlation", "least", "most"),
    # 600 draws: a true 0.95 comes out within 0.03. With few points the correction for autocorrelation is too weak.
    [(12, 0.0, 0.92, 0.99), (36, 0.0, 0.92, 0.99), (80, 0.5, 0.87, 0.97), (12, 0.5, 0.80, 0.92)],
)
def test_coverage_of_the_interval(points: int, correlation: float, least: float, most: float):
    entropy = np.linspace(0.9, 0.5, points)
    intervals = [fit_law(entropy, curve(entropy, 0.005, seed, correlation)).interval() for seed in range(600)]
    assert least < np.mean([low <= B - A <= high for low, high in intervals]) < most


def test_the_first_part_of_a_run_on_the_curve_finds_its_ceiling():
    entropy = spent(80)
    found = forecast(range(80), entropy, curve(entropy, noise=0.001), last_step=11)
    assert found.objection is None and found.law and found.whole
    assert found.law.ceiling == pytest.approx(0.5, abs=0.01)
    low, high = found.law.interval()
    assert low < 0.5 < high and found.later_rmse < 0.006
    whole_low, whole_high = found.whole.interval()
    assert whole_high - whole_low < (high - low) / 5


def test_without_noise_the_forecast_is_exact():
    entropy = spent(40)
    found = forecast(range(40), entropy, curve(entropy), last_step=5)
    assert found.objection is None and found.law
    assert found.law.ceiling == pytest.approx(0.5, abs=1e-6) and found.later_rmse < 1e-6


def test_rising_and_level_entropy_are_refused():
    steps, rising = range(12), np.linspace(0.4, 0.9, 12)
    sentence = objection_to_fit(steps, rising, curve(rising, 0.001))
    assert sentence and "entropy is not falling (0.400 nats at step 0, 0.900 at step 11)" in sentence
    level = 0.4 + 0.1 * np.random.default_rng(0).normal(size=12)
    assert "not falling" in (objection_to_fit(steps, level, curve(level, 0.001)) or "")
    assert "not falling" in (objection_to_fit(steps, np.full(12, 0.4), curve(rising)) or "")
    assert forecast(steps, np.full(12, 0.4), curve(rising), last_step=11).law is None  # nothing to fit


def test_nearly_flat_points_are_refused():
    narrow = np.linspace(0.40, 0.38, 12)  # e^0.40 - e^0.38 = 1.4918 - 1.4623 = 0.0295
    assert "exp(entropy) spans 0.030" in (objection_to_fit(range(12), narrow, curve(narrow)) or "")
    wide = np.linspace(0.9, 0.5, 12)
    noise = np.random.default_rng(1).normal(size=12)
    assert "does not change measurably" in (objection_to_fit(range(12), wide, 0.5 + 0.1 * noise) or "")


def test_reward_falling_with_the_entropy_is_refused():
    entropy = np.linspace(0.9, 0.5, 12)
    assert "reward falls with the entropy" in (objection_to_fit(range(12), entropy, -curve(entropy, 0.001)) or "")


@pytest.mark.parametrize("seed", range(5))
def test_a_controlled_run_leaves_the_curve_and_a_plain_one_does_not(seed: int):
    steps, noise = range(80), np.random.default_rng(seed + 100).normal(size=80)
    plain = np.linspace(0.9, 0.1, 80) + 0.01 * noise
    rewards = curve(plain, 0.02, seed)
    assert forecast(steps, plain, rewards, last_step=24).objection is None
    held = np.maximum(np.linspace(0.9, 0.1, 80), 0.6) + 0.01 * noise  # the same rewards at an entropy that is held
    sentence = forecast(steps, held, rewards, last_step=24).objection
    assert sentence and sentence.startswith("The run leaves the curve: from step 40 on entropy no longer falls")
    # also where the whole run is fitted, which leaves no later points
    assert forecast(steps, held, rewards, last_step=80).objection


def test_a_run_that_has_spent_its_entropy_rests_on_the_curve():
    rested = np.maximum(np.linspace(0.9, -0.5, 80), 0.1) + 0.005 * np.random.default_rng(3).normal(size=80)
    assert departure(range(80), rested, curve(rested, 0.01)) is None


def test_step_effect_by_the_frisch_waugh_theorem():
    # t of the step = t in the regression of what exp(H) leaves of R on what it leaves of the step, with n - 3 freedom
    entropy, steps = spent(20), np.arange(20)
    rewards = curve(entropy, 0.02, seed=4) + 0.003 * steps
    design = np.stack([np.exp(entropy), np.ones(20)], axis=1)
    project = np.eye(20) - design @ np.linalg.inv(design.T @ design) @ design.T
    r, s = project @ rewards, project @ steps
    slope = (r @ s) / (s @ s)
    error = math.sqrt(((r - slope * s) ** 2).sum() / 17 / (s @ s))
    assert step_effect(steps, entropy, rewards) == pytest.approx(slope / error, rel=1e-6)


@pytest.mark.parametrize(
    ("entropy", "reward", "sentence"),
    [
        ([0.5, 0.4], [0.1, 0.2], "at least 3 pairs of entropy and reward, got 2"),
        ([0.5, 0.4, 0.3], [0.1, 0.2], "got 3 and 2 values"),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], "different entropies, got 0.5"),
        ([0.5, math.nan, 0.3], [0.1, 0.2, 0.3], "must be finite"),
    ],
)
def test_fits_that_cannot_be(entropy: list[float], reward: list[float], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        fit_law(entropy, reward)


def test_a_run_that_bends_while_its_entropy_falls_is_not_called_controlled():
    falling = np.linspace(0.9, 0.1, 80)
    bent = curve(falling, 0.01) + 0.1 * np.sin(np.linspace(0, 3, 80) + 0.5)
    assert abs(step_effect(range(80), falling, bent)) > 3
    assert departure(range(80), falling, bent) is None


def test_coefficients_over_sizes_of_a_family_are_lines_in_their_logarithm():
    entropies = np.array([1.0, 0.8, 0.6])

    def law(a: float, b: float):
        return fit_law(entropies, b - a * np.exp(entropies))

    # a = 0.1 + 0.02 log n, b = 0.9 - 0.05 log n, at n = e^2, e^3, e^5; asked at e^7
    laws = [law(0.14, 0.8), law(0.16, 0.75), law(0.2, 0.65)]
    sizes = [math.exp(2), math.exp(3), math.exp(5)]
    assert across_sizes(sizes, laws, at=math.exp(7)) == pytest.approx((0.24, 0.55), abs=1e-9)
    # off the line: mean (3.5, 0.18) of x = 2, 3, 5, 4 and a = 0.14, 0.16, 0.2, 0.22; slope 0.1 / 5 = 0.02
    a, _ = across_sizes([*sizes, math.exp(4)], [*laws, law(0.22, 0.7)], at=math.exp(3.5))
    assert a == pytest.approx(0.18, abs=1e-9)
    with pytest.raises(ValueError, match="needs laws of at least 3 sizes, got 3 of 2"):
        across_sizes([1e9, 1e9, 7e9], laws, at=1e10)
    with pytest.raises(ValueError, match="parameters must be positive, got 0"):
        across_sizes(sizes, laws, at=0)
