import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from hclm_rl.evaluation.statistics import (
    EntropySplit,
    Support,
    entropy_change,
    estimate,
    interval,
    rarefied_entropy,
    support,
)
from hclm_rl.responses.outcomes import answer_entropy

# the worked example: 8 samples, C is the right answer
EIGHT = ["C"] * 3 + ["a"] * 4 + ["b"]


def test_support_of_the_worked_example():
    base, trained = np.array([8, 0, 2, 0, 8, 0]), np.array([5, 1, 0, 0, 3, 2])
    found = support(trained > 0, base > 0, samples=8)
    assert (found.kept, found.gained, found.lost, found.neither) == (2, 1, 2, 1)
    # SRR 2/4, NDR 1/3, SDS 2 * 2 * 1 / (4 + 4 + 2), NSCR (1 - 2) / 5; 1 of 3 under a fair coin is no surprise
    assert (found.retention, found.dynamic, found.net_change, found.mcnemar) == (0.5, 0.4, -0.2, 1.0)
    assert found.discovery == pytest.approx(1 / 3)


def test_mcnemar_of_the_papers_counts():
    large = Support(samples=8192, kept=2388, gained=48, lost=175, neither=0)
    assert large.mcnemar == pytest.approx(3.6e-18, rel=0.02)
    assert (round(large.retention, 2), round(large.discovery, 2), round(large.net_change, 2)) == (0.93, 0.02, -0.05)
    # 2 of 7: 2 * (1 + 7 + 21) / 128
    assert Support(samples=8, kept=0, gained=2, lost=5, neither=0).mcnemar == pytest.approx(58 / 128)


def test_dynamic_support_is_the_harmonic_mean_of_retention_and_discovery():
    found = Support(samples=8, kept=7, gained=3, lost=2, neither=1)
    assert found.dynamic == pytest.approx(stats.hmean([found.retention, found.discovery]))


def test_support_without_a_right_answer():
    nothing = Support(samples=8, kept=0, gained=0, lost=0, neither=4)
    assert math.isnan(nothing.retention) and math.isnan(nothing.discovery) and math.isnan(nothing.net_change)
    assert (nothing.dynamic, nothing.mcnemar) == (0.0, 1.0)


def test_detectable_probability():
    # the paper's bound -log(0.05) / 8192 = 3.66e-4; the exact form is a hair below
    assert Support(samples=8192, kept=1, gained=0, lost=0, neither=0).detectable == pytest.approx(3.66e-4, rel=2e-3)


def test_split_of_the_worked_example():
    split = EntropySplit(accuracy=3 / 8, right=0.0, wrong=answer_entropy(EIGHT[3:]))
    assert split.wrong == pytest.approx(0.500402, abs=5e-7)
    assert split.total - 0.625 * 0.500402 == pytest.approx(0.661563, abs=1e-6)
    assert split.total == pytest.approx(0.974315, abs=5e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_is_exact_with_several_right_answers(seed: int):
    answers = random.Random(seed).choices("ABcde", k=30)
    right = [answer for answer in answers if answer.isupper()]
    wrong = [answer for answer in answers if answer.islower()]
    split = EntropySplit(accuracy=len(right) / 30, right=answer_entropy(right), wrong=answer_entropy(wrong))
    assert split.total == pytest.approx(answer_entropy(answers))


def test_the_parts_of_a_change():
    base = EntropySplit(accuracy=0.2, right=0.0, wrong=1.0)
    # accuracy alone: all of the change is sharpening
    better = EntropySplit(accuracy=0.6, right=0.0, wrong=1.0)
    assert entropy_change(base, better) == pytest.approx((better.total - base.total, 0.0))
    # wrong answers alone: 0.8 x (0.3 - 1.0)
    poorer = EntropySplit(accuracy=0.2, right=0.0, wrong=0.3)
    assert entropy_change(base, poorer) == pytest.approx((0.0, -0.56))
    # both, and a model without a wrong answer left
    for after in (EntropySplit(accuracy=0.7, right=0.2, wrong=0.1), EntropySplit(accuracy=1.0, right=0.0, wrong=None)):
        assert sum(entropy_change(base, after)) == pytest.approx(after.total - base.total)
    assert entropy_change(base, after)[1] == 0.0


def test_rarefied_entropy_is_the_mean_over_all_subsets():
    for draws in range(1, 9):
        subsets = [answer_entropy(subset) for subset in itertools.combinations(EIGHT, draws)]
        assert rarefied_entropy(EIGHT, draws) == pytest.approx(sum(subsets) / len(subsets))
    assert rarefied_entropy(EIGHT, 8) == pytest.approx(answer_entropy(EIGHT))
    with pytest.raises(ValueError, match=r"draws must be in \[1, 8\]"):
        rarefied_entropy(EIGHT, 9)


def test_interval_of_equal_problems_is_a_point():
    lower, upper = interval(np.full((2, 7), 0.25))
    assert lower.tolist() == upper.tolist() == [0.25, 0.25]


def test_interval_is_the_normal_one_for_many_problems():
    values = np.random.default_rng(3).exponential(size=400)
    lower, upper = interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    # the bootstrap's own noise at 10,000 resamples is about 1 % of the standard error, the skewness 3 %
    assert values.mean() - lower == pytest.approx(half, rel=0.08)
    assert upper - values.mean() == pytest.approx(half, rel=0.08)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    bounds = [interval(rng.binomial(1, 0.4, size=100).astype(float), resamples=999, seed=i) for i in range(300)]
    covered = sum(low <= 0.4 <= high for low, high in bounds)
    # 95 % of 300 is 285; three standard deviations are 11, and the percentile bootstrap is a little short
    assert 270 <= covered <= 296


def test_one_problem_has_no_interval_and_undefined_ones_are_left_out():
    alone = estimate(np.array([np.nan, 0.5]))
    assert alone.mean == 0.5 and math.isnan(alone.lower)
    assert math.isnan(estimate(np.array([np.nan])).mean)
    assert estimate(np.array([0.0, np.nan, 1.0])).mean == 0.5


def test_the_global_generator_is_untouched():
    np.random.seed(0)
    expected = np.random.RandomState(0).random()
    interval(np.arange(5.0))
    assert np.random.random() == expected
