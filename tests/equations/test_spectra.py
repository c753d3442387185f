import math

import pytest
import torch

from hclm_rl.equations.geometry import Moments, covariance, factor, leverage, log_det_force, moments
from hclm_rl.equations.spectra import (
    Drift,
    alpha_req,
    certified_force,
    dead_fraction,
    diffusion_spectral_entropy,
    diffusion_spectral_information,
    dof,
    drift_budget,
    effective_rank,
    force_bound,
    force_norm,
    participation_ratio,
    rank_me,
    relative_drift,
    rho,
    spectrum,
    weak_fraction,
)
from hclm_rl.equations.surrogates import second_moment, variance_force

F64 = torch.float64
CARD = torch.tensor([[1, 2], [3, 1], [2, 4], [6, 5]], dtype=F64)  # the worked example of the method cards
EPS = 0.1


def close(actual, expected, tolerance=5e-7):  # half of the last digit that the card prints
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), atol=tolerance, rtol=0
    )


def test_card_spectrum_and_predictive_test():
    lam = spectrum(moments(CARD))
    close(lam, [1.179973, 4.820027])
    close(dof(lam, EPS), 1.901548)
    close(force_norm(lam, 4, EPS), 0.479413)
    close(force_bound(4, 2, EPS), 1.118034)
    close(rho(lam, 4, EPS), 0.428800)


@pytest.mark.parametrize(("count", "width"), [(40, 7), (5, 9)])
def test_closed_forms_agree_with_the_rows(count, width):
    z = torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=F64)
    m = moments(z)
    lam = spectrum(m)
    force = log_det_force(z, m, EPS)
    close(force_norm(lam, count, EPS), force.norm(), 1e-12)
    close(dof(lam, EPS), (force * (z - m.mean)).sum(), 1e-10)
    close(dof(lam, EPS), leverage(z, m, EPS).mean(), 1e-10)
    close(0.5 * (lam + EPS).log().sum(), factor(m, EPS).log_det(), 1e-10)
    assert 0 < rho(lam, count, EPS) < 1


def test_bound_is_reached_when_all_variances_equal_eps():
    # four rows +-e_1 s, +-e_2 s have S = s^2 / 2 I; with eps = s^2 / 2 = 2, ||F||^2 = (1/4) * 2 * 1 / (4 * 2) = 1/16
    z = torch.tensor([[2.0, 0], [-2, 0], [0, 2], [0, -2]], dtype=F64)
    close(log_det_force(z, moments(z), 2.0).norm(), 0.25, 1e-14)
    close(force_bound(4, 2, 2.0), 0.25, 1e-14)
    close(rho(spectrum(moments(z)), 4, 2.0), 1.0, 1e-12)


def test_one_row_has_no_force_and_no_bound():
    lam = spectrum(moments(CARD[:1]))
    assert force_bound(1, 2, EPS) == 0.0 and rho(lam, 1, EPS) == 0.0
    assert force_norm(lam, 1, EPS).item() == dof(lam, EPS).item() == 0.0


def test_dead_and_weak_fractions():
    lam = torch.tensor([0.0, 0.05, 0.1, 1.0, 10.0, 11.0, 200.0, 300.0])
    assert dead_fraction(lam, 0.1).item() == 2 / 8  # 0.1 itself is alive: the force is greatest there
    assert weak_fraction(lam, 0.1).item() == 3 / 8  # above 10


def test_drift_budget_of_one_direction():
    # lam = eps = 1, g(1) = 1/4; three quarters of the power is g >= 3/16, whose roots are those of 3 x^2 - 10 x + 3,
    # 1/3 and 3: (1 - d) 2 - 1 = 1/3 at d = 1/3, (1 + d) 2 - 1 = 3 at d = 1
    close(drift_budget(torch.tensor([1.0], dtype=F64), 1.0, math.sqrt(3) / 2), 1 / 3, 1e-12)
    # lam = 5, g = 5/36: g >= 6/49 has the roots of 6 x^2 - 37 x + 6, 1/6 and 6; (1 + d) 6 - 1 = 6 at d = 1/6
    share = math.sqrt(6 / 49 / (5 / 36))
    close(drift_budget(torch.tensor([5.0], dtype=F64), 1.0, share), 1 / 6, 1e-12)
    # a thousand times the states: the same budget
    close(drift_budget(torch.tensor([5e6], dtype=F64), 1e6, share), 1 / 6, 1e-12)
    assert drift_budget(torch.zeros(3, dtype=F64), 1.0) == 0.0
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 0"):
        drift_budget(torch.ones(3, dtype=F64), 1.0, 0.0)


def test_drift_of_a_covariance_that_doubles_and_halves():
    # S_0 = diag(3, 1), eps = 1: M_0 = diag(4, 2); S = diag(7, 0): M = diag(8, 1), so M / M_0 = 2 and 1/2
    lower = torch.tensor([[2.0, 0], [0, math.sqrt(2)]], dtype=F64)
    moved = Moments(
        torch.tensor(1.0, dtype=F64), torch.zeros(2, dtype=F64), torch.diag(torch.tensor([7.0, 0], dtype=F64))
    )
    low, high = found = relative_drift(moved, lower, 1.0)
    assert (low, high, found.delta) == pytest.approx((0.5, 2.0, 1.0))
    # lam_0 + eps = 4 and 2; ends 2 - 1, 8 - 1 and 1 - 1, 4 - 1: g(1) = 1/4, g(7) = 7/64; g(0) = 0; at first 3/16 + 1/4
    lam = torch.tensor([3.0, 1.0], dtype=F64)
    close(certified_force(lam, 1.0, found), math.sqrt(7 / 64 / (3 / 16 + 1 / 4)), 1e-12)
    assert certified_force(lam, 1.0, Drift(1.0, 1.0)) == 1.0


def test_drift_within_the_budget_keeps_the_force():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(50, 6, generator=g, dtype=F64)
    m = moments(z)
    lam, lower = spectrum(m), factor(m, EPS).cholesky
    least, budget = 0.7 * force_norm(lam, 50, EPS).item(), drift_budget(lam, EPS, 0.7)
    assert 0 < budget < 1
    for _ in range(50):
        push = torch.randn(6, 6, generator=g, dtype=F64)
        push = push + push.T
        relative = torch.eye(6, dtype=F64) + push * (budget / torch.linalg.matrix_norm(push, ord=2))
        s = lower @ relative @ lower.T - EPS * torch.eye(6, dtype=F64)
        drift = relative_drift(Moments(m.count, m.mean, s * m.count), lower, EPS)
        close(drift.delta, budget, 1e-9)
        values = torch.linalg.eigvalsh(s)
        assert (values + EPS >= (lam + EPS) * (drift.low - 1e-9)).all()
        assert (values + EPS <= (lam + EPS) * (drift.high + 1e-9)).all()
        norm = force_norm(values.clamp(min=0), 50, EPS).item()
        assert norm >= least and norm >= certified_force(lam, EPS, drift) * force_norm(lam, 50, EPS).item()


def test_two_batches_of_the_same_policy_are_certified_where_an_absolute_budget_is_exceeded():
    # variances over six decades: the noise of the widest direction is far above all of the narrow ones
    g, scales = torch.Generator().manual_seed(0), torch.logspace(0, -3, 16, dtype=F64)
    first, second = (moments(torch.randn(4000, 16, generator=g, dtype=F64) * scales) for _ in range(2))
    lam, eps = spectrum(first), 1e-6
    assert torch.linalg.matrix_norm(covariance(second) - covariance(first), ord=2) > 1000 * lam.min()
    drift = relative_drift(second, factor(first, eps).cholesky, eps)
    assert drift.delta < drift_budget(lam, eps) and certified_force(lam, eps, drift) > 0.9


def test_far_above_the_variances_the_log_det_is_the_variance():
    # "frozen", its live directions are next to nothing, and its force is that of tr(S) / (2 eps)
    z = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    m, eps = moments(z), 1e4
    assert dof(spectrum(m), eps) < 0.05 * 8
    ours, its = log_det_force(z, m, eps), variance_force(z, m)
    cosine = (ours * its).sum() / (ours.norm() * its.norm())
    assert cosine > 0.999999
    close(ours.norm() / its.norm() * 2 * eps, 1.0, 1e-3)


def test_card_ranks():
    m = moments(CARD)
    # rank_me takes eigenvalues: those of the second moment for RankMe, of S for the centred variant
    close(rank_me(torch.linalg.eigvalsh(second_moment(m))), 1.624122)
    close(rank_me(spectrum(m)), 1.886811)
    close(effective_rank(spectrum(m)), 1.641713)
    close(participation_ratio(spectrum(m)), 1.461929)
    s = covariance(m)
    close(participation_ratio(spectrum(m)), s.trace() ** 2 / s.square().sum(), 1e-12)


def test_ranks_of_equal_variances_count_them():
    lam = torch.cat([torch.ones(8, dtype=F64), torch.zeros(5, dtype=F64)])
    # p = 1/8 + 1e-7 and 1e-7: the constant adds about 5 * 1e-7 * 16 nats and takes nothing
    close(effective_rank(lam), 8.0, 1e-4)
    close(participation_ratio(lam), 8.0, 1e-12)
    close(effective_rank(lam, keep=4), 4.0, 1e-4)
    # one live direction of six: -(1 + 1e-7) log(1 + 1e-7) + 5 * 1e-7 log(1e7) = -1e-7 + 8.05905e-6
    close(effective_rank(torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=F64)).log(), 7.95905e-6, 1e-10)
    assert participation_ratio(torch.zeros(3)).item() == 0.0 and effective_rank(torch.zeros(3)).isfinite()


def test_card_power_law():
    lam = torch.tensor([0.8, 4, 2, 1.5, 0.6, 0.45, 0.2, 0.1], dtype=F64)  # in any order
    fit = alpha_req(lam, first=2, last=6)
    close(fit.alpha, 1.358702)
    close(fit.intercept, 1.705606)
    # the same fit by numpy.linalg.lstsq with rows scaled by sqrt(1/j): R^2 of its residuals
    ranks = torch.arange(2, 7, dtype=F64)
    y = torch.tensor([2, 1.5, 0.8, 0.6, 0.45], dtype=F64).log()
    x = torch.stack([-ranks.log(), torch.ones(5, dtype=F64)], 1)
    w = ranks.rsqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(w * x, w * y.unsqueeze(1)).solution.squeeze()
    close([fit.alpha, fit.intercept], solution, 1e-12)
    close(fit.r2, 1 - ((y - x @ solution).square().sum() / (y - y.mean()).square().sum()), 1e-12)


def test_power_law_that_is_one():
    ranks = torch.arange(1, 201, dtype=F64)
    fit = alpha_req(3 * ranks**-0.7)
    close([fit.alpha, fit.intercept, fit.r2], [0.7, math.log(3), 1.0], 1e-12)


def test_power_law_without_enough_positive_eigenvalues_is_nan():
    assert math.isnan(alpha_req(torch.ones(99)).alpha)
    assert math.isnan(alpha_req(torch.cat([torch.ones(99), torch.zeros(9)])).alpha)


POINTS = torch.tensor([[0, 0], [1, 0], [0, 1], [3, 3]], dtype=F64)  # the card of diffusion spectral entropy


@pytest.mark.parametrize(
    ("bandwidth", "time", "is_strict", "bits"),
    [
        (1.0, 1.0, False, 1.679002),
        (1.0, 2.0, False, 1.300472),
        (1.0, 1.0, True, 1.679602),
        (1.0, 2.0, True, 1.303832),
        (0.1, 1.0, False, 2.0),  # every point alone
        (10.0, 1.0, False, 0.203131),  # one blob
    ],
)
def test_card_diffusion_spectral_entropy(bandwidth, time, is_strict, bits):
    close(diffusion_spectral_entropy(POINTS, bandwidth, time, is_strict) / math.log(2), bits)


def test_diffusion_spectral_entropy_counts_clusters():
    # four points in pairs at distance 0, the pairs far apart: G is two blocks of ones, so K has the eigenvalues
    # 1, 1, 0, 0 and H = log 2; the 2.2e-16 that is added to each p adds nothing visible
    pairs = torch.tensor([[0.0], [0.0], [100.0], [100.0]])
    entropy = diffusion_spectral_entropy(pairs, 1.0)
    close(entropy, math.log(2), 1e-12)
    assert entropy.dtype == F64
    # rows in half precision are worked on in float64; the card's points are exact there
    close(diffusion_spectral_entropy(POINTS.bfloat16(), 1.0), 1.163796)


def test_diffusion_spectral_information_is_what_the_classes_leave_out():
    # two far clusters of eight equal points: any eight of the sixteen show both (but for 2 in 12,870), H = log 2
    z = torch.tensor([[0.0], [100.0]]).repeat(8, 1)
    of_cluster, of_halves = torch.arange(16) % 2, torch.arange(16) // 8
    close(diffusion_spectral_information(z, of_cluster, 1.0, torch.Generator().manual_seed(0)), math.log(2), 1e-12)
    close(diffusion_spectral_information(z, of_halves, 1.0, torch.Generator().manual_seed(0)), 0.0, 1e-12)
    close(diffusion_spectral_information(z, torch.zeros(16).long(), 1.0, torch.Generator()), 0.0, 1e-12)


def test_diffusion_spectral_information_by_its_definition():
    # classes of 1 and 3 rows: one row has no entropy, three of four leave one point of the card's out
    labels, draws = torch.tensor([7, 2, 2, 2]), 400
    found = diffusion_spectral_information(POINTS, labels, 1.0, torch.Generator().manual_seed(3), draws=draws)
    of_three = [diffusion_spectral_entropy(POINTS[[j for j in range(4) if j != out]], 1.0) for out in range(4)]
    expected = 3 / 4 * (torch.stack(of_three).mean() - of_three[0])
    spread = 3 / 4 * torch.stack(of_three).std() / math.sqrt(draws)
    assert abs(found - expected) < 4 * spread and abs(expected) > 8 * spread
