"""The band that holds the entropy: what the weights reach, by either entropy, with and without a learnt gain."""

from dataclasses import replace

import pytest
import torch

from hclm_rl.equations.flow import entropy_influence, mean_discriminator
from hclm_rl.equations.geometry import factor, floor_from, moments
from hclm_rl.terms.force_reweight import ForceReweight

from ..term_batches import first_stage, make_step, rollout, second_stage, token_batch

LEARNT = {"n": 10.0, "c": 0.0, "h": 10.0, "cc": 10.0, "ch": 2.0}  # a line with gain 0.2: ch n / (cc n)


def influence_by_hand(view) -> torch.Tensor:
    """e = -A (S_a - sum p S) with a loop over tokens."""
    logps, entropy = view.scored()
    mean = view.over_vocab(mean_discriminator)
    e = torch.zeros(view.mask.shape, dtype=torch.float64)
    for i, t in view.mask.nonzero().tolist():
        s = logps[i, t].exp() * (logps[i, t] + entropy[i, t])
        e[i, t] = -view.advantages[i] * (s - mean[i, t])
    return e


def weights_of(term: ForceReweight, view, memory: dict) -> tuple[torch.Tensor, dict]:
    first = first_stage(term, view, memory)
    return first.columns["link/weights"], first.metrics


@pytest.mark.parametrize("weights", ["least", "uniform"])
@pytest.mark.parametrize(("low", "high"), [(0.001, 0.002), (-0.002, -0.001), (0.0, 0.0)])
def test_the_expected_change_meets_the_edge_of_the_band(weights: str, low: float, high: float):
    view = rollout(make_step())
    e = influence_by_hand(view)
    own = 0.2 * e.sum().item() / view.mask.sum().item()
    memory = dict(LEARNT)
    w, metrics = weights_of(
        ForceReweight(low=low, high=high, floor=-100.0, ceiling=100.0, weights=weights), view, memory
    )
    # measuring moved the line a little
    gain = metrics["link/gain"].item()
    assert gain == pytest.approx(0.2, rel=0.1)
    reached = gain * (w * e).sum().item() / view.mask.sum().item()
    nearest = low if own < low else high
    assert reached == pytest.approx(nearest, abs=1e-7)
    assert metrics["link/net"].item() * gain == pytest.approx(nearest, abs=1e-7)
    assert metrics["link/own"].item() == pytest.approx(own / 0.2, rel=1e-5)
    side = e < 0 if own < low else e > 0
    assert (w[view.mask & ~side] == 1).all() and (w[view.mask & side] < 1).all()


def test_inside_the_band_nothing_changes():
    step = make_step()
    term = ForceReweight(low=-1.0, high=1.0, floor=-100.0, ceiling=100.0)
    w, _ = weights_of(term, rollout(step), dict(LEARNT))
    assert torch.equal(w, step.mask.float())


def test_the_band_of_levels_pulls_by_the_horizon():
    # start 2, floor 0.5: from 0.9 the entropy is to rise by (1.0 - 0.9) / 20 a step, from 1.4 to fall by at most 0.02
    term = ForceReweight(floor=0.5, ceiling=2.0, horizon=20)
    assert term.band(0.9, start=2.0, gain=0.5) == pytest.approx((0.005 / 0.5, 3.1 / 20 / 0.5))
    assert term.band(1.4, start=2.0, gain=1.0) == pytest.approx((-0.02, 2.6 / 20))
    nats = ForceReweight(floor=0.5, ceiling=2.0, horizon=10, unit="nats", low=-0.001)
    assert nats.band(1.0, start=7.0, gain=1.0) == pytest.approx((-0.001, 0.1))
    # above the ceiling the level goes before `low`
    assert nats.band(2.5, start=7.0, gain=1.0) == pytest.approx((-0.05, -0.05))
    # no gain yet: only the sign, and only off the band
    assert term.band(0.9, start=2.0, gain=0.0) == (0.0, float("inf"))
    assert term.band(1.4, start=2.0, gain=0.0) == (-float("inf"), float("inf"))
    assert term.band(4.5, start=2.0, gain=0.0) == (-float("inf"), 0.0)


class World(ForceReweight):
    """Each optimiser step changes the entropy by 0.2 nats times the mean weighted influence, which burns."""

    def policy(self, rollout, advantages):
        level, e = self.__dict__["now"]
        return level, e


def test_the_entropy_of_a_made_up_world_settles_at_the_floor():
    view, term, memory, level = rollout(make_step()), World(floor=0.5, horizon=10), {}, 1.0
    e = influence_by_hand(view).float()
    e = e if e.sum() < 0 else -e
    levels = []
    for batch in range(300):
        object.__setattr__(term, "now", (level, e))
        w = first_stage(term, replace(view, step=batch), memory).columns["link/weights"]
        level += 0.2 * (w * e).sum().item() / view.mask.sum().item()
        levels.append(level)
    assert levels[20] > 0.55, "it burns at first"
    assert level == pytest.approx(0.5, rel=0.02) and min(levels) > 0.48


def test_representation_influence_is_the_derivative_of_the_log_det():
    # d/dx log-det(Z + x dJ/dZ) in float64, the policy gradient through the head alone
    step = make_step()
    names = ("old_hidden", "head", "old_logps", "old_entropy")
    step = replace(step, **{name: getattr(step, name).double() for name in names})
    view, memory = rollout(step), {}
    advantages = step.advantages.double().unsqueeze(1).expand(step.mask.shape)
    _, e = ForceReweight(by="representation", unit="nats", floor=-1.0, ceiling=1.0).states(view, advantages, memory)
    rows = step.old_hidden[step.mask].requires_grad_()
    logps = (rows @ step.head.T).log_softmax(dim=-1).gather(1, step.ids[step.mask].unsqueeze(1)).squeeze(1)
    gradients = torch.autograd.grad((advantages[step.mask] * logps).sum(), rows)[0]
    m = moments(rows)
    force = factor(m, float(floor_from(m))).force(rows)
    expected = m.count * (force * gradients).sum(dim=-1)
    torch.testing.assert_close(e[step.mask], expected, rtol=1e-5, atol=1e-6)  # the head works in float32


def test_weights_scale_the_advantages_that_stage_two_sees():
    step, memory = make_step(), dict(LEARNT)
    term = ForceReweight(low=0.001, high=0.002, floor=-100.0, ceiling=100.0)
    first = first_stage(term, rollout(step), memory)
    batch = token_batch(step)
    outcome = second_stage(term, batch, first, memory)
    w = first.columns["link/weights"]
    assert torch.equal(outcome.advantages[step.mask], (w * batch.advantages)[step.mask])


def test_influence_takes_the_advantages_of_the_link_before():
    step = make_step()
    view = rollout(step)
    e = entropy_influence(
        *view.scored(),
        view.over_vocab(mean_discriminator),
        step.advantages.unsqueeze(1).expand(step.mask.shape),
        step.mask,
    )
    twice = replace(view, advantages=2 * view.advantages)
    _, doubled = ForceReweight().policy(twice, 2 * step.advantages.unsqueeze(1).expand(step.mask.shape))
    torch.testing.assert_close(doubled, 2 * e)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"by": "representation"}, 'by="representation" needs unit="nats"'),
        ({"floor": 2.0}, "floor must be below ceiling, got 2.0 and 2.0"),
        ({"low": 0.1, "high": 0.0}, "low must not be above high"),
        ({"horizon": 0}, "horizon must be at least 1 optimiser step, got 0"),
        ({"least_weight": 1.5}, r"least_weight must be in \[0, 1\]"),
        ({"decay": 0.0}, r"decay must be in \(0, 1\]"),
        ({"trust": 2.0}, r"trust must be in \(0, 1\]"),
        ({"eps_relative": 0.0}, "eps_relative must be positive"),
    ],
)
def test_refusals(settings: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        ForceReweight(**settings)
