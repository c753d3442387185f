"""The information force as a gauge, against the worked examples of its card (arXiv:2605.22940)."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hclm_rl import Quantiles, Total
from hclm_rl.terms.information_force import InformationForce
from hclm_rl.types import Metric

from ..term_batches import Processes, first_stage, make_step, rollout, second_stage, token_batch
from ..tiny import make
from .test_log_det import Z, with_states

# the card's token influence: W = [[1, 0], [0, 1], [-1, -1]], y = (0, 0, 1, 1), advantages (1, -1, 1, -1)
HEAD = torch.tensor([[1.0, 0], [0, 1], [-1, -1]], dtype=torch.float64)
INFLUENCE = [-0.098109, -0.050587, 0.045910, 0.068201]


def hidden_gradient() -> Tensor:
    """dL/dz, L = -J = -sum_i A_i log p_i(y_i): minus A_i (W[y_i] - sum_v p_iv W[v])."""
    p = (Z @ HEAD.T).softmax(dim=1)
    advantages = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).unsqueeze(1)
    return -advantages * (HEAD[torch.tensor([0, 0, 1, 1])] - p @ HEAD)


def told(cuts: list[list[int]], scale: float = 1.0, share: float = 1.0) -> dict[str, list[Metric]]:
    """What the term says when the hidden gradient arrives, micro-batch by micro-batch."""
    step, memory, term = with_states(Z), {"eps": 0.1}, InformationForce()
    first = first_stage(term, rollout(step), memory)
    gradient = torch.full_like(step.hidden, math.nan).masked_scatter(step.mask.unsqueeze(2), scale * hidden_gradient())
    said: dict[str, list[Metric]] = {}
    for rows in map(torch.tensor, cuts):
        outcome = second_stage(term, replace(token_batch(step, rows), share=share), first, memory, rows)
        assert outcome.advantages is None and outcome.losses == {}
        for name, metric in outcome.on_hidden_gradient["link"](gradient[rows]).items():
            said.setdefault(name, []).append(metric)
    return said


def formed(parts: list[Total]) -> float:
    """A Total over the whole step: its sums added up, then its form."""
    return parts[0].form(*(sum(s).item() for s in zip(*(part.sums for part in parts), strict=True)))


def test_the_cards_gauges():
    memory = {"eps": 0.1}
    metrics = first_stage(InformationForce(), rollout(with_states(Z)), memory).metrics
    # printed to six digits: half of the last one
    expected = {"value": 0.920076, "force_norm": 0.479413, "rho": 0.428800, "dof": 1.901548}
    assert {name: metrics[f"link/{name}"].item() for name in expected} == pytest.approx(expected, abs=5e-7)
    leverage = metrics["link/leverage"]
    assert isinstance(leverage, Quantiles)
    # l_i / mean l: the card's weights for beta = 1
    assert leverage.values[:2, :2].flatten().tolist() == pytest.approx(
        [0.584551, 1.202505, 0.810021, 1.402923], abs=5e-7
    )
    # eigenvalues 1.18 and 4.82: none below eps = 0.1, none above 100 eps = 10
    assert (metrics["link/dead"].item(), metrics["link/weak"].item()) == (0.0, 0.0)


def test_dead_and_weak_directions():
    # variances 1 and 0.01 ((+-1, +-0.1), all four corners), eps = 0.05: 0.01 is dead; 1 is not above 5
    corners = torch.tensor([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]], dtype=torch.float64)
    metrics = first_stage(InformationForce(), rollout(with_states(corners)), {"eps": 0.05}).metrics
    assert (metrics["link/dead"].item(), metrics["link/weak"].item()) == (0.5, 0.0)
    # eps = 0.001: 0.01 is alive, 1 is above 0.1
    metrics = first_stage(InformationForce(), rollout(with_states(corners)), {"eps": 0.001}).metrics
    assert (metrics["link/dead"].item(), metrics["link/weak"].item()) == (0.0, 0.5)


def test_the_drift_against_the_first_step():
    # S = diag(1, .01) and eps = .05; then every row twice as long: S + eps = (4.05, .09), times 4.05/1.05 and .09/.06
    corners = torch.tensor([[1, 0.1], [1, -0.1], [-1, 0.1], [-1, -0.1]], dtype=torch.float64)
    memory, term = {"eps": 0.05}, InformationForce(spectrum_every=1)
    first = first_stage(term, rollout(with_states(corners)), memory).metrics
    assert (first["link/drift"].item(), first["link/certified"].item()) == pytest.approx((0.0, 1.0), abs=1e-6)
    second = first_stage(term, replace(rollout(with_states(2 * corners)), step=1), memory).metrics
    assert second["link/drift"].item() == pytest.approx(4.05 / 1.05 - 1)
    # both lam + eps lie within 1.5 and 27/7 times their first: 1 is within 1.525 and 4, .01 within .04 and .181
    least = [min(x / (x + 0.05) ** 2 for x in ends) for ends in ((1.525, 4.0), (0.04, 0.06 * 27 / 7 - 0.05))]
    at_first = [x / (x + 0.05) ** 2 for x in (1.0, 0.01)]
    assert second["link/certified"].item() == pytest.approx(math.sqrt(sum(least) / sum(at_first)))
    others = InformationForce(surrogate="variance", spectrum_every=1)
    assert "link/drift" not in first_stage(others, rollout(with_states(corners)), {}).metrics


def test_the_spectrum_is_taken_every_so_many_steps():
    memory, taken = {}, []
    for number in (0, 1, 2, 3, 4, 7, 8, 11):
        view = replace(rollout(with_states(Z)), step=number)
        metrics = first_stage(InformationForce(spectrum_every=3), view, memory).metrics
        if "link/dead" in metrics:
            taken.append(number)
    assert taken == [0, 3, 7, 11]


@pytest.mark.parametrize("cuts", [[[0, 1, 2, 3, 4, 5, 6, 7]], [[1, 5], [0, 2, 3]], [[0], [4], [1]]])
def test_alignment_and_critical_coefficient_of_the_cards_token_influence(cuts):
    said = told(cuts)
    assert formed(said["alignment_at_states"]) == pytest.approx(-0.048729, abs=5e-7)
    assert formed(said["critical_coef_at_states"]) == pytest.approx(0.150473, abs=5e-7)
    # tokens in order of the responses 0 and 1; the card's e_i times N = 4
    order = [0, 1, 2, 3] if cuts[0][0] == 0 else [2, 3, 0, 1]
    values = torch.cat([part.values[:, :2][part.values[:, :2] != 0] for part in said["influence"]])
    # six digits of e_i, times 4
    assert values.tolist() == pytest.approx([4 * INFLUENCE[i] for i in order], abs=2e-6)
    burning = [tokens for part in said["burning"] for tokens in part[:, :2].tolist()]
    # both tokens of response 0 lose entropy, none of response 1, and the other responses have no tokens
    assert sorted(burning, reverse=True)[0] == [1, 1] and sum(map(sum, burning)) == 2
    assert burning[[row for rows in cuts for row in rows].index(0)] == [1, 1]


def test_the_size_of_the_loss_scales_the_critical_coefficient_and_not_the_alignment():
    said = told([[0, 1]], scale=0.25)
    assert formed(said["alignment_at_states"]) == pytest.approx(-0.048729, abs=5e-7)
    assert formed(said["critical_coef_at_states"]) == pytest.approx(0.150473 / 4, abs=5e-7)


def test_a_step_of_a_part_of_the_rollout_averages_over_its_own_tokens():
    # response 0 alone, two of the four tokens: its loss, and its term's force, are means over two
    centred = Z - Z.mean(dim=0)
    force = centred @ torch.linalg.inv(centred.T @ centred / 4 + 0.1 * torch.eye(2, dtype=Z.dtype)) / 4
    expected = -sum(INFLUENCE[:2]) / force[:2].square().sum().item()
    assert formed(told([[0]], scale=2.0, share=0.5)["critical_coef_at_states"]) == pytest.approx(expected, abs=2e-5)


def test_at_the_critical_coefficient_the_terms_force_and_the_gradient_balance(policy: str, tmp_path: Path):
    def run(terms: list) -> tuple[Tensor, list[dict]]:
        trainer, seen = make(policy, tmp_path, terms=terms, fixed=True, steps_per_generation=2, learning_rate=0.0), []

        def keep(module, args, output):
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda gradient: seen.append(gradient.clone()))

        trainer.model.model.register_forward_hook(keep)
        trainer.train()
        return seen[0], trainer.state.log_history

    plain, log = run(["information_force"])
    critical = float(log[0]["information_force/critical_coef_at_states"])
    both, _ = run(["information_force", {"log_det": {"coef": critical}}])
    injected = both - plain
    cosine = (injected * both).sum() / (injected.norm() * both.norm())
    assert injected.norm() > 0 and abs(cosine) < 1e-3, (critical, cosine)


def test_what_float16_scales_the_loss_by_is_taken_out(policy: str, tmp_path: Path):
    found = []
    for scale in (None, 2.0**16):
        trainer = make(policy, tmp_path, terms=["information_force"], fixed=True, max_steps=1, learning_rate=0.0)
        if scale:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        log = trainer.state.log_history[0]
        found.append([float(log[f"information_force/{name}"]) for name in ("gradient_norm", "critical_coef_at_states")])
    assert found[0][0] > 0 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_vanishing_gradient_has_no_direction():
    said = told([[0, 1]], scale=0.0)
    assert formed(said["alignment_at_states"]) == 0.0 and formed(said["critical_coef_at_states"]) == 0.0


def test_no_force_holds_nothing():
    # a micro-batch of responses without tokens, as if it were the whole step: both sums are empty
    said = told([[4, 5]])
    assert formed(said["alignment_at_states"]) == 0.0 and formed(said["critical_coef_at_states"]) == 0.0


def test_processes_see_the_force_of_the_whole_step():
    step = make_step(dtype=torch.float64)
    alone = first_stage(InformationForce(), rollout(step), {}).metrics
    processes = Processes(2)
    views = processes.views(step, [6, 5])
    said = [each.metrics for each in processes.run(lambda rank: first_stage(InformationForce(), views[rank], {}))]
    for name in ("value", "force_norm", "rho", "dof", "dead", "weak"):
        for metrics in said:
            assert metrics[f"link/{name}"].item() == pytest.approx(alone[f"link/{name}"].item(), rel=1e-12)
    values = torch.cat([metrics["link/leverage"].values[view.mask] for metrics, view in zip(said, views, strict=True)])
    torch.testing.assert_close(values, alone["link/leverage"].values[step.mask], rtol=1e-12, atol=0)


def test_a_step_without_spread_says_nothing():
    step = with_states(torch.ones(4, 2, dtype=torch.float64))
    first = first_stage(InformationForce(), rollout(step), {})
    assert first.metrics == {} and first.shared == {}
    assert second_stage(InformationForce(), token_batch(step), first, {}).on_hidden_gradient == {}


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"eps_relative": 0.0}, "eps_relative must be positive, got 0.0"),
        ({"spectrum_every": 0}, "spectrum_every must be at least 1, got 0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        replace(InformationForce(), **wrong)
    assert str(error.value) == sentence
