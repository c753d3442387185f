import math

import pytest
import torch

from hclm_rl.equations.forces import SURROGATES, StepForce, greatest_softmax_force, regime, step_force
from hclm_rl.equations.surrogates import unit_rows


def alone(x: torch.Tensor) -> torch.Tensor:
    return x


def rows_like(seed: int, count: int = 40, width: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, width, dtype=torch.float64, generator=generator) + 1


def whole(surrogate, rows: torch.Tensor, eps: float = 0.1) -> StepForce:
    found = step_force(surrogate, rows, alone, {"eps": eps})
    assert found is not None
    return found


def entropy_of(surrogate: str, z: torch.Tensor, eps: float = 0.1) -> torch.Tensor:
    """The definitions, differentiable, written without the library."""
    zc, u = z - z.mean(dim=0), z / z.norm(dim=1, keepdim=True)
    s, c = zc.T @ zc / len(z), u.T @ u / len(z)
    eye = torch.eye(z.shape[1], dtype=z.dtype)
    match surrogate:
        case "log_det":
            return 0.5 * torch.logdet(s + eps * eye)
        case "diagonal":
            return 0.5 * (s.diagonal() + eps).log().sum()
        case "variance":
            return s.trace()
        case "feature_softmax":
            p = z.softmax(dim=1)
            return -(p * p.log()).sum(dim=1).mean()
        case "coding_rate":
            return 0.5 * torch.logdet(eye + z.shape[1] / 0.5 * c)
    lam = torch.linalg.eigvalsh(c)
    return -(lam * lam.log()).sum()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_value_and_force_against_autograd(surrogate: str, seed: int):
    z = rows_like(seed).requires_grad_()
    entropy = entropy_of(surrogate, z)
    expected = torch.autograd.grad(entropy, z)[0]
    found = whole(surrogate, z.detach())
    torch.testing.assert_close(found.value(), entropy.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(found.force(z.detach()), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_force_passes_its_bound(surrogate: str, scale: float):
    for seed in range(5):
        z = scale * rows_like(seed)
        found = whole(surrogate, z)
        norm = found.at_unit_length(found.force(z), z).norm().item()
        assert 0 < norm <= found.bound()


def test_bounds_are_reached():
    # rows +-sqrt(N eps / 2) e_j: every variance is eps for N = 2 D
    width, eps = 4, 0.25
    z = torch.cat([torch.eye(width, dtype=torch.float64), -torch.eye(width, dtype=torch.float64)]) * math.sqrt(
        width * eps
    )
    for surrogate in ("log_det", "diagonal"):
        found = whole(surrogate, z, eps)
        assert found.force(z).norm().item() == pytest.approx(found.bound(), rel=1e-12)
    # a mean of zero puts all of the mean square into the variance
    found = whole("variance", z)
    assert found.force(z).norm().item() == pytest.approx(found.bound(), rel=1e-12)
    # softmax: one feature at the best share in every row
    a = torch.linspace(1e-4, 1 - 1e-4, 9999, dtype=torch.float64)
    peaked = torch.stack([a, *([(1 - a) / (width - 1)] * (width - 1))], dim=1).log()
    norms = whole("feature_softmax", peaked).force(peaked).norm(dim=1) * len(a)
    assert norms.max().item() == pytest.approx(greatest_softmax_force(width), rel=1e-6)


def test_the_cards_greatest_softmax_forces():
    assert greatest_softmax_force(2) == pytest.approx(0.3166, abs=5e-5)
    assert greatest_softmax_force(8) == pytest.approx(0.6281, abs=5e-5)
    # no random distribution beats it
    p = torch.randn(20_000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1, keepdim=True)
    assert (p * (p.log() + entropy)).norm(dim=1).max().item() <= greatest_softmax_force(8)


def test_all_directions_alike_have_no_von_neumann_force():
    z = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    assert whole("von_neumann", z).force(z).norm().item() == pytest.approx(0, abs=1e-12)


def test_live_directions():
    # variances 1, 1, 1, 1e-6 under eps = 1e-2: 3 / 1.01 and next to nothing of 4
    z = torch.cat([torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64)])
    z = z * torch.tensor([2, 2, 2, 2e-3], dtype=torch.float64)
    found = whole("log_det", z, 1e-2)
    assert found.live() == pytest.approx((3 / 1.01 + 1e-6 / (1e-2 + 1e-6)) / 4, rel=1e-9)
    assert whole("log_det", z, 1e4).live() < 1e-4
    assert whole("feature_softmax", z).live() == 1.0
    unit = whole("coding_rate", z)
    lam = torch.linalg.eigvalsh(unit_rows(z).T @ unit_rows(z) / 8)
    assert unit.live() == pytest.approx((lam / (lam + 0.5 / 4)).sum().item() / 4, rel=1e-9)


def test_three_rows_have_two_directions_however_wide_they_are():
    # the rows 1, -1 and 0 along two axes of six: centred, they span two directions
    z = torch.zeros(3, 6, dtype=torch.float64)
    z[0, 0], z[1, 0], z[2, 1], z[0, 1], z[1, 1] = 1.0, -1.0, 2.0, -1.0, -1.0
    # the greatest von Neumann force is that of directions alike: 2 log(live) / sqrt(N), live = min(D, N - 1) = 2
    assert whole("von_neumann", z).bound() == pytest.approx(2 * math.log(2) / math.sqrt(3))
    # variances 2 / 3 and 2, far above eps: both live
    assert whole("log_det", z, 1e-12).live() == pytest.approx(1.0)


def test_equal_states_have_no_force():
    assert step_force("log_det", torch.ones(6, 3), alone, {}) is None
    assert step_force("variance", torch.ones(1, 3), alone, {}) is None


@pytest.mark.parametrize(
    ("coef", "force", "gradient", "alignment", "expected"),
    [
        (0.2, 1.0, 1.0, 0.0, "healthy"),
        (0.0099, 1.0, 1.0, 0.0, "weak"),
        (0.0101, 1.0, 1.0, 0.0, "healthy"),
        (0.29, 1.0, 1.0, 0.0, "healthy"),
        (0.31, 1.0, 1.0, 0.0, "dominant"),
        (10.0, 1.0, 1.0, -0.95, "dominant"),
        (0.2, 1.0, 1.0, -0.91, "misaligned"),
        (0.2, 1.0, 1.0, -0.89, "healthy"),
        (1.0, 0.0, 1.0, 0.0, "dead"),
        (1.0, 1.0, 0.0, 0.0, "not known"),  # nothing to be weak against
        (-0.2, 1.0, 1.0, 0.0, "healthy"),  # it pushes the other way, and is no weaker for it
        (-1e-3, 1.0, 1.0, 0.0, "weak"),
        (-0.2, 1.0, 1.0, 0.91, "misaligned"),
        (-0.2, 1.0, 1.0, -0.91, "healthy"),
    ],
)
def test_regimes_of_the_step(coef, force, gradient, alignment, expected):
    found, reason = regime(coef, force, gradient, alignment)
    assert found == expected and reason
