"""The information force as a gauge, against the worked examples of its card (arXiv:2605.22940)."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hclm_rl import Quantiles, Total
from hclm_rl.terms.information_force import InformationForce
from hclm_rl.types import Metric

from ..term_batches import Processes, first_stage, make_step, rollout, second_stage, token_batch
from .test_log_det import Z, with_states

# the card's token influence: W = [[1, 0], [0, 1], [-1, -1]], y = (0, 0, 1, 1), advantages (1, -1, 1, -1)
HEAD = torch.tensor([[1.0, 0], [0, 1], [-1, -1]], dtype=torch.float64)
INFLUENCE = [-0.098109, -0.050587, 0.045910, 0.068201]


def hidden_gradient() -> Tensor:
    """dL/dz, L = -J = -sum_i A_i log p_i(y_i): minus A_i (W[y_i] - sum_v p_iv W[v])."""
    p = (Z @ HEAD.T).softmax(dim=1)
    advantages = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).unsqueeze(1)
    return -advantages * (HEAD[torch.tensor([0, 0, 1, 1])] - p @ HEAD)


def told(cuts: list[list[int]], scale: float = 1.0) -> dict[str, list[Metric]]:
    """What the term says when the hidden gradient arrives, micro-batch by micro-batch."""
    step, memory, term = with_states(Z), {"eps": 0.1}, InformationForce()
    first = first_stage(term, rollout(step), memory)
    gradient = torch.full_like(step.hidden, math.nan).masked_scatter(step.mask.unsqueeze(2), scale * hidden_gradient())
    said: dict[str, list[Metric]] = {}
    for rows in map(torch.tensor, cuts):
        outcome = second_stage(term, token_batch(step, rows), first, memory, rows)
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
    assert formed(said["alignment"]) == pytest.approx(-0.048729, abs=5e-7)
    assert formed(said["critical_coef"]) == pytest.approx(0.150473, abs=5e-7)
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
    assert formed(said["alignment"]) == pytest.approx(-0.048729, abs=5e-7)
    assert formed(said["critical_coef"]) == pytest.approx(0.150473 / 4, abs=5e-7)


def test_a_vanishing_gradient_has_no_direction():
    said = told([[0, 1]], scale=0.0)
    assert formed(said["alignment"]) == 0.0 and formed(said["critical_coef"]) == 0.0


def test_no_force_holds_nothing():
    # a micro-batch of responses without tokens, as if it were the whole step: both sums are empty
    said = told([[4, 5]])
    assert formed(said["alignment"]) == 0.0 and formed(said["critical_coef"]) == 0.0


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
