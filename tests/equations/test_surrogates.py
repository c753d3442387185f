import math

import pytest
import torch

from hclm_rl.equations.geometry import covariance, log_det, moments
from hclm_rl.equations.surrogates import (
    coding_rate,
    coding_rate_force,
    coding_rate_within,
    diagonal,
    diagonal_force,
    feature_softmax,
    feature_softmax_force,
    through_unit_rows,
    unit_rows,
    variance,
    variance_force,
    von_neumann,
    von_neumann_force,
)

F64 = torch.float64
CARD = torch.tensor([[1, 2], [3, 1], [2, 4], [6, 5]], dtype=F64)  # the worked example of the method cards
EPS = 0.1


def close(actual, expected, tolerance=5e-7):  # half of the last digit that the card prints
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def rows(count, width):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0), dtype=F64)


def gradient(entropy, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(entropy(z), z)[0]


def reference_variance(z):
    return z.var(0, correction=0).sum()


def reference_diagonal(z):
    return 0.5 * (z.var(0, correction=0) + EPS).log().sum()


def reference_softmax(z):
    return torch.distributions.Categorical(logits=z).entropy().mean()


def reference_coding_rate(h, distortion=0.5):
    u = h / h.norm(dim=1, keepdim=True)
    count, width = u.shape
    return 0.5 * torch.logdet(torch.eye(width, dtype=F64) + width / (count * distortion) * u.T @ u)


def reference_von_neumann(h):
    u = h / h.norm(dim=1, keepdim=True)
    lam = torch.linalg.eigvalsh(u.T @ u / len(u))
    return -(lam * lam.log()).sum()


def test_card_values():
    m = moments(CARD)
    assert variance(m).item() == 6.0
    close(variance_force(CARD, m).norm(), 2.449490)
    close(diagonal(m, EPS), 0.5 * math.log(3.6 * 2.6), 1e-14)  # diag(S) = (3.5, 2.5)
    close(feature_softmax(CARD).mean(), 0.473768)
    close(feature_softmax_force(CARD, 4.0).norm(), 0.143832)


@pytest.mark.parametrize(("count", "width"), [(40, 7), (6, 9)])
def test_forces_are_autograd_of_the_definitions(count, width):
    z = rows(count, width)
    m = moments(z)
    pairs = [
        (variance_force(z, m), reference_variance),
        (diagonal_force(z, m, EPS), reference_diagonal),
        (feature_softmax_force(z, count * 1.0), reference_softmax),
        (through_unit_rows(coding_rate_force(unit_rows(z), moments(unit_rows(z))), z), reference_coding_rate),
    ]
    if count > width:  # autograd through a zero eigenvalue is NaN; the analytic force has its own test
        pairs.append(
            (through_unit_rows(von_neumann_force(unit_rows(z), moments(unit_rows(z))), z), reference_von_neumann)
        )
    for force, definition in pairs:
        torch.testing.assert_close(force, gradient(definition, z), atol=1e-10, rtol=0)


def test_values_are_the_definitions():
    z = rows(40, 7)
    m, u = moments(z), moments(unit_rows(z))
    close(variance(m), reference_variance(z), 1e-12)
    close(diagonal(m, EPS), reference_diagonal(z), 1e-12)
    close(feature_softmax(z).mean(), reference_softmax(z), 1e-12)
    close(coding_rate(u, 0.3), reference_coding_rate(z, 0.3), 1e-12)
    close(von_neumann(u), reference_von_neumann(z), 1e-12)


def test_softmax_force_saturates_at_both_ends():
    row = torch.tensor(
        [[1.471467, -0.078460, -1.671424, 0.649736, -0.746864, -1.012229, 0.510254, 0.877520]], dtype=F64
    )
    table = [(0.001, 3.534714e-4), (0.1, 0.034477), (1, 0.273838), (2, 0.450527), (8, 0.066945), (32, 1.497e-7)]
    for scale, expected in table:
        norm = feature_softmax_force(scale * row, 1.0).norm().item()
        assert norm == pytest.approx(expected, rel=2e-4 if scale == 32 else 1e-5)  # the card prints 4 to 7 digits


def test_softmax_is_blind_to_a_collapse_that_the_log_det_sees():
    z = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(64, 8)
    assert feature_softmax(z).mean() > 1.0 and feature_softmax_force(z, 64.0).norm() > 0.01
    assert log_det(covariance(moments(z)), 1e-4).item() == pytest.approx(4 * math.log(1e-4))


def test_card_coding_rate():
    u = unit_rows(CARD)
    close(u[0], [0.447214, 0.894427])
    m = moments(u)
    close(coding_rate(m), 0.932358)
    close(
        coding_rate_force(u, m),
        [[-0.005112, 0.290229], [0.379120, -0.092370], [-0.005112, 0.290229], [0.212267, 0.097207]],
    )
    close(coding_rate(moments(u[:2])), 0.972955)
    close(coding_rate(moments(u[2:])), 0.865175)
    within = coding_rate_within(u, torch.tensor([0, 0, 1, 1]))
    close(within, 0.919065)
    close(coding_rate(m) - within, 0.013293, 1.5e-6)  # the difference of two printed digits
    close(coding_rate(moments(CARD)), 3.153138)  # what forgetting the unit rows would give
    close(coding_rate(m, 0.25), 1.347867)


def test_coding_rate_is_the_log_det_plus_a_reward_of_the_mean():
    m = moments(unit_rows(CARD))
    c = 0.5 / 2
    close(log_det(covariance(m), c), -1.213507)
    tail = 0.5 * torch.log1p(m.mean @ torch.linalg.solve(covariance(m) + c * torch.eye(2, dtype=F64), m.mean))
    close(tail, 0.759570)
    close(log_det(covariance(m), c) + tail - 0.5 * 2 * math.log(c), 0.932358)


def test_coding_rate_within_takes_the_smaller_side():
    u = unit_rows(rows(9, 4))
    classes = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2])
    # definition: sum_j (n_j / 2n) logdet(I_d + d / (n_j e2) U_j^T U_j); classes 0 and 2 are smaller than d = 4
    expected = sum(
        len(part) / 18 * torch.logdet(torch.eye(4, dtype=F64) + 4 / (len(part) * 0.5) * part.T @ part)
        for part in (u[:2], u[2:7], u[7:])
    )
    close(coding_rate_within(u, classes), expected, 1e-12)
    close(coding_rate_within(u, torch.zeros(9, dtype=torch.long)), coding_rate(moments(u)), 1e-12)


def test_forces_leave_their_rows_alone():
    u = unit_rows(CARD)
    before = u.clone()
    coding_rate_force(u, moments(u))
    assert torch.equal(u, before)


def test_card_von_neumann():
    u = unit_rows(CARD)
    m = moments(u)
    close(von_neumann(m), 0.327500)
    force = through_unit_rows(von_neumann_force(u, m), CARD)
    close(force, [[-0.118758, 0.059379], [0.045853, -0.137559], [-0.059379, 0.029689], [0.011087, -0.013304]])


def test_von_neumann_force_is_finite_with_an_empty_direction():
    h = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 1, 0]], dtype=F64)
    u = unit_rows(h)
    close(von_neumann(moments(u)), 0.636514)  # H(2/3, 1/3)
    # each row is an eigenvector, so its force is radial and the projection leaves nothing
    close(through_unit_rows(von_neumann_force(u, moments(u)), h), torch.zeros(3, 3), 1e-14)


def test_zero_rows_stay_zero():
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    close(unit_rows(h), [[0.6, 0.8], [0.0, 0.0]], 1e-7)
    # (I - u u^T) F / 5 with u = [0.6, 0.8], F = [1, 0]: [1 - 0.36, -0.48] / 5
    close(through_unit_rows(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), h), [[0.128, -0.096], [0.0, 0.0]], 1e-7)


def test_no_row_is_finite():
    z = torch.empty(0, 3)
    m = moments(z)
    values = (
        variance(m),
        diagonal(m, EPS),
        coding_rate(m),
        von_neumann(m),
        coding_rate_within(z, torch.empty(0).long()),
    )
    assert all(value.isfinite() for value in values)
    assert variance_force(z, m).shape == coding_rate_force(z, m).shape == von_neumann_force(z, m).shape == (0, 3)


def test_autocast_does_not_reach_values_and_forces():
    u = unit_rows(rows(64, 8).float())
    outside = (coding_rate_force(u, moments(u)), von_neumann_force(u, moments(u)), coding_rate(moments(u)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (coding_rate_force(u, moments(u)), von_neumann_force(u, moments(u)), coding_rate(moments(u)))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
