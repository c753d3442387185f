"""Pass@k advantages against their card (arXiv:2508.10751, 2505.15201): numbers, subsets one by one, the gradient."""

import itertools
import math
import random
import statistics

import pytest
import torch

from hclm_rl.terms.passk_advantage import PasskAdvantage, best_of_k, of_sorted

from ..term_batches import first_stage, groups_view

NAN = math.nan
FORMS = ("raw", "loo", "loo_minus_one")


def shaped(*groups: list[float], **settings) -> list[float]:
    return first_stage(PasskAdvantage(**settings), groups_view(*groups), {}).advantages.tolist()


def binary(n: int, c: int) -> list[float]:
    return [1.0] * c + [0.0] * (n - c)


@pytest.mark.parametrize(
    ("n", "k", "c", "right", "wrong"),
    [
        (8, 4, 1, 0.999998, -0.142857),
        (8, 4, 2, 0.522232, -0.174077),
        (8, 4, 4, 0.120385, -0.120385),
        (8, 4, 5, 0.0, 0.0),
        (8, 4, 0, 0.0, 0.0),
        (8, 4, 8, 0.0, 0.0),
        (4, 2, 1, 0.999998, -0.333333),
        (8, 1, 2, 1.732047, -0.577349),
        (8, 8, 3, 0.0, 0.0),
    ],
)
def test_the_cards_analytic_numbers(n, k, c, right, wrong):
    expected = [right] * c + [wrong] * (n - c)
    assert shaped(binary(n, c), k=k) == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("form", "k", "expected"),
    [
        ("raw", 2, [0.283333, 0.283333, 0.333333, 0.5]),
        ("raw", 3, [0.625, 0.625, 0.625, 0.75]),
        ("loo", 1, [-0.188889, -0.116667, -0.008333, 0.172222]),
        ("loo", 2, [-0.272222, -0.272222, -0.155556, 0.233333]),
        ("loo", 3, [-0.375, -0.375, -0.375, 0.25]),
        ("loo_minus_one", 2, [0, 0.033333, 0.133333, 0.383333]),
        ("loo_minus_one", 3, [0, 0, 0.075, 0.45]),
        ("loo_minus_one", 4, [0, 0, 0, 0.5]),
    ],
)
def test_the_cards_transforms(form, k, expected):
    g = torch.tensor([[0.0, 0.2, 0.5, 1.0]], dtype=torch.float64)
    assert of_sorted(g, k, form)[0].tolist() == pytest.approx(expected, abs=6e-7)
    # as advantages n / k times that, in whatever order the group is
    assert shaped([0.5, 1.0, 0.0, 0.2], k=k, form=form) == pytest.approx(
        [4 / k * expected[i] for i in (2, 3, 0, 1)], abs=3e-6
    )


def test_the_cards_best_of_k_is_the_mean_of_the_raw_form():
    for k, rho in enumerate([0.425, 0.7, 0.875, 1.0], 1):
        assert statistics.mean(shaped([0, 0.2, 0.5, 1], k=k, form="raw")) == pytest.approx(rho, abs=1e-12)


def test_the_cards_binary_form():
    assert shaped(binary(4, 1), k=2, form="loo_minus_one") == pytest.approx([1, 0, 0, 0], abs=1e-12)
    assert shaped(binary(4, 2), k=2, form="loo_minus_one") == pytest.approx([2 / 3, 2 / 3, 0, 0], abs=1e-12)
    for c in range(7):  # C(n-c, k-1) / C(n, k) for a right one
        s = math.comb(6 - c, 2) / math.comb(6, 3)
        assert shaped(binary(6, c), k=3, form="loo_minus_one") == pytest.approx([2 * s] * c + [0] * (6 - c), abs=1e-12)


def of_subsets(g: list[float], k: int, form: str) -> list[float]:
    """s by its definition."""
    n = len(g)

    def raw(indices: list[int]) -> dict[int, float]:
        subsets = list(itertools.combinations(indices, k))
        return {i: sum(max(g[j] for j in each) for each in subsets if i in each) / len(subsets) for i in indices}

    if form == "raw":
        return list(raw(list(range(n))).values())
    if form == "loo":
        found = raw(list(range(n)))
        others = [raw([j for j in range(n) if j != i]) for i in range(n)]
        return [found[i] - sum(others[i].values()) / (n - 1) for i in range(n)]
    subsets = list(itertools.combinations(range(n), k))
    gains = [
        sum(max(g[j] for j in each) - max(g[j] for j in each if j != i) for each in subsets if i in each)
        for i in range(n)
    ]
    return [gain / len(subsets) for gain in gains]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_all_subsets(form, seed):
    source = random.Random(seed)
    n = source.choice([5, 6, 7])
    graded = [source.choice([-1.0, 0.0, 0.25, 1.0, source.random()]) for _ in range(n)]  # with ties
    for k in range(2 if form == "loo_minus_one" else 1, n):
        expected = [n / k * s for s in of_subsets(graded, k, form)]
        assert shaped(graded, k=k, form=form) == pytest.approx(expected, abs=1e-12)


def test_analytic_agrees_with_all_groups_of_k():
    """A response's advantage is the mean over the groups of k that it is in, each standardised over all groups."""
    for n, k, c in itertools.product((4, 6), (1, 2, 3), range(7)):
        if c > n:
            continue
        g, subsets = binary(n, c), list(itertools.combinations(range(n), k))
        best = [max(g[i] for i in each) for each in subsets]
        mean, sigma = statistics.mean(best), statistics.pstdev(best)
        expected = [
            statistics.mean((b - mean) / (sigma + 1e-6) for b, each in zip(best, subsets, strict=True) if i in each)
            for i in range(n)
        ]
        assert shaped(g, k=k) == pytest.approx(expected, abs=1e-12)
        assert sum(shaped(g, k=k)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_in_expectation_it_is_the_gradient_of_pass_at_k(form, k):
    """One parameter, p itself: d pass@k / dp = k (1 - p)^(k-1), and the scale n / k leaves 1 / k of it in the mean."""
    n, p, found = 4, 0.3, 0.0
    for draw in itertools.product([0.0, 1.0], repeat=n):
        chance = math.prod(p if right else 1 - p for right in draw)
        score = [1 / p if right else -1 / (1 - p) for right in draw]
        advantages = best_of_k(torch.tensor([draw], dtype=torch.float64), k, form)[0].tolist()
        found += chance * sum(a * s for a, s in zip(advantages, score, strict=True)) / n
    if form == "loo_minus_one" and k == 1:
        found *= n / (n - 1)  # its mean has the response itself in it
    assert found == pytest.approx((1 - p) ** (k - 1), rel=1e-12)


def test_k_falls_at_the_switch():
    term = PasskAdvantage(k=4, switch=0.5, k_end=1)
    early, late = (first_stage(term, groups_view(binary(8, 2), progress=at), {}) for at in (0.49, 0.5))
    assert early.advantages[0].item() == pytest.approx(0.522232, abs=6e-7)
    assert late.advantages[0].item() == pytest.approx(1.732047, abs=6e-7)
    assert (early.metrics["link/k"], late.metrics["link/k"]) == (4, 1)


@pytest.mark.parametrize("form", ["analytic", *FORMS])
def test_what_nothing_scored_is_not_in_the_group(form):
    three = shaped([1, 0, 0], k=2, form=form)
    mixed = shaped([1, NAN, 0, 0], [1, NAN, NAN, NAN], [NAN] * 4, k=2, form=form)
    assert mixed == pytest.approx([three[0], 0, *three[1:], *[0] * 8], abs=1e-12)


def test_silent_groups_are_counted():
    effect = first_stage(PasskAdvantage(k=2), groups_view(binary(4, 1), binary(4, 3), binary(4, 0)), {})
    assert effect.metrics["link/silent"].item() == pytest.approx(2 / 3)


def test_rewards_that_are_not_0_or_1_are_told(caplog: pytest.LogCaptureFixture):
    assert shaped([1, 0.5, 0.2, 0], k=2) == shaped([1, 0, 0, 0], k=2)
    [sentence] = [record.message for record in caplog.records]
    assert sentence.startswith("passk_advantage: rewards should be 0 or 1, 2 of 4 are neither, such as 0.5")
    assert shaped([1, 0.5, 0.2, 0], k=2, right_at=0.5) == shaped([1, 1, 0, 0], k=2)


def test_the_least_group():
    assert PasskAdvantage(k=3).least_group == 3
    assert PasskAdvantage(k=3, form="loo").least_group == 4
    assert PasskAdvantage(k=2, k_end=3, switch=0.5).least_group == 3
    assert PasskAdvantage(k=2, k_end=3).least_group == 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k_end": -1}, "k_end must be at least 1, got -1"),
        ({"switch": 1.0}, "switch must be in (0, 1) or None, got 1.0"),
        (
            {"form": "raw", "right_at": 0.5},
            'right_at belongs to form: analytic, "raw" takes any reward, got 0.5',
        ),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        PasskAdvantage(**wrong)
    assert str(error.value) == sentence
