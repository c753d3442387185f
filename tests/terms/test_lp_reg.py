"""Lp-Reg against its card (arXiv:2510.03222): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.equations.vocab import Head, over_vocab
from hclm_rl.terms.lp_reg import LpReg, is_plausible, kl_of_filtered, log_kept_mass

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

D1, D2 = (0.80, 0.14, 0.02, 0.014, 0.014, 0.012), (0.48, 0.30, 0.12, 0.05, 0.03, 0.02)
POLICY = [D1, D1, D2, D1, D1]
TOKENS = [2, 3, 1, 0, 2]
ADVANTAGES = [-1.0, -1.0, -1.0, -1.0, 1.0]
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])


def card(policy=POLICY, tokens=TOKENS, advantages=ADVANTAGES, old_gap=()):
    """Both views of one response; the current policy is `policy`, the sampling policy's log-probs lie old_gap above."""
    logps = [[math.log(p[token]) for p, token in zip(policy, tokens, strict=True)]]
    old = [[x + gap for x, gap in zip(logps[0], [*old_gap, *[0.0] * len(tokens)], strict=False)]]
    view, batch = card_step([[1] * len(tokens)], logps, old, [advantages])
    states = torch.tensor([policy], dtype=torch.float64).log()
    head = Head(weight=torch.eye(states.size(-1), dtype=torch.float64))
    # the authors' ratio: in [0, 10]
    batch = replace(batch, clip_range=(1.0, 9.0), over_vocab=lambda f: over_vocab(f, states, head))
    return replace(view, over_vocab=lambda f: over_vocab(f, states, head)), batch


def added(term: LpReg, view, batch):
    """The added loss (B, T) and the metrics."""
    first = first_stage(term, view, {})
    outcome = second_stage(term, batch, first, {})
    assert outcome.advantages is None
    return outcome.losses["link"], {**first.metrics, **outcome.metrics}


@BOTH
def test_the_cards_example_on_policy(statistics):
    view, batch = card()
    # log-softmax of the head is in float32: six digits of its own
    loss, metrics = added(LpReg(rho=0.5, statistics=statistics), view, batch)
    assert metrics["link/kept_mass"][0].tolist() == pytest.approx([0.96, 0.96, 1, 0.96, 0.96], rel=1e-6)
    assert metrics["link/selected"][0].tolist() == [1, 1, 0, 0, 0]
    assert metrics["link/noise"][0].tolist() == [0, 1, 0, 0, 0]
    assert metrics["link/affected"][0].tolist() == [1, 0, 0, 0, 0]
    losses = surrogate(batch, batch.advantages) + loss
    # printed to six digits: half of the last one
    assert losses[0].tolist() == pytest.approx([1.000845, 1, 1, 1, -1], abs=5e-7)
    assert losses.mean().item() == pytest.approx(0.600169, abs=5e-7)
    losses.mean().backward()
    assert batch.logps.grad[0].tolist() == pytest.approx([0.191667, 0.2, 0.2, 0.2, -0.2], abs=5e-7)
    assert batch.entropy.grad is None


@BOTH
def test_the_cards_example_off_policy(statistics):
    view, batch = card(old_gap=(0.4,))
    plain = surrogate(batch, batch.advantages)
    assert plain.mean().item() == pytest.approx(0.534064, abs=5e-7)
    loss, _ = added(LpReg(rho=0.5, statistics=statistics), view, batch)
    losses = plain + loss
    assert losses[0].tolist() == pytest.approx([0.783482, 1, 1, 1, -1], abs=5e-7)
    assert losses.mean().item() == pytest.approx(0.556696, abs=5e-7)
    losses.mean().backward()
    assert batch.logps.grad[0, 0].item() == pytest.approx(0.023267, abs=5e-7)


def test_the_full_divergence_of_the_card():
    view, batch = card()
    loss, _ = added(LpReg(rho=0.5, estimator="full"), view, batch)
    assert loss[0].tolist() == pytest.approx([0.040822, 0, 0, 0, 0], abs=5e-7)


def test_the_full_divergence_pulls_the_distribution_to_its_filtered_self():
    view, batch = card()
    logits = torch.tensor([POLICY], dtype=torch.float64).log().requires_grad_()
    head = Head(weight=torch.eye(6, dtype=torch.float64))
    batch = replace(batch, over_vocab=lambda f: over_vocab(f, logits, head))
    loss, _ = added(LpReg(rho=0.5, estimator="full"), view, batch)
    loss.sum().backward()
    # d KL(g || p) / d logits = p - g, g = p / 0.96 on the three kept tokens
    expected = [p - (p / 0.96 if p > 0.016 else 0.0) for p in D1]
    assert logits.grad[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert logits.grad[0, 1:].abs().max() == 0


@BOTH
def test_where_nothing_is_filtered_nothing_is_protected(statistics):
    # on-policy and mass 1: log g = log p, and the strict test fails, whatever the rounding of a sum over 6 or 150,000
    view, batch = card(policy=[D2] * 4, tokens=[5, 4, 3, 2], advantages=[-1.0] * 4)
    loss, metrics = added(LpReg(rho=0.5, kappa=0.02, statistics=statistics), view, batch)
    assert metrics["link/selected"].sum() == 2 and loss.abs().max() == 0
    loss, metrics = added(LpReg(rho=0.5, kappa=0.0, statistics=statistics), *card())
    assert metrics["link/kept_mass"].tolist() == [[1.0] * 5] and loss.abs().max() == 0


@BOTH
@pytest.mark.parametrize("rho, selected", [(0.5, 2), (0.49, 0), (0.25, 0), (0.75, 3), (1.0, 4)])
def test_the_quota_is_a_floor_and_one_alone_is_none(rho, selected, statistics):
    _, metrics = added(LpReg(rho=rho, statistics=statistics), *card())
    assert metrics["link/selected"].sum() == selected  # of the four with A < 0, never the fifth


@BOTH
def test_of_equal_probabilities_the_first_are_selected(statistics):
    # 60 tokens alike, as where a policy is certain: a partial sort takes any 30 of them
    card_of_60 = card(policy=[D1] * 60, tokens=[2] * 60, advantages=[-1.0] * 60)
    _, metrics = added(LpReg(rho=0.5, statistics=statistics), *card_of_60)
    assert metrics["link/selected"][0].tolist() == [1] * 30 + [0] * 30


@BOTH
def test_the_papers_population_is_all_tokens(statistics):
    # probabilities 0.014, 0.02, 0.02, 0.3, 0.8 sorted; the quantile 0.375 of five lies at index 1.5: 0.02, and strict
    _, metrics = added(LpReg(rho=0.375, population="all", statistics=statistics), *card())
    assert metrics["link/selected"][0].tolist() == [0, 1, 0, 0, 0]
    # at 0.6, index 2.4: 0.02 + 0.4 * 0.28 = 0.132; the last of the three below has A > 0
    _, metrics = added(LpReg(rho=0.6, population="all", statistics=statistics), *card())
    assert metrics["link/selected"][0].tolist() == [1, 1, 0, 0, 0]


def test_a_token_far_below_its_proxy_is_bounded_without_gradient():
    view, batch = card(old_gap=(1000.0,))
    loss, _ = added(LpReg(rho=1.0), view, batch)
    assert loss[0, 0].item() == 10
    loss.sum().backward()
    assert batch.logps.grad[0, 0].item() == 0 and batch.logps.grad.isfinite().all()


def by_the_card(step, advantages, kappa, rho, beta, selecting) -> dict[tuple[int, int], float]:
    """Steps 1 to 7 of the card, token by token: the added loss where it is not 0."""
    tokens = [tuple(at) for at in step.mask.nonzero().tolist()]
    negative = sorted((at for at in tokens if advantages[at] < 0), key=lambda at: selecting[at].item())
    k = max(1, int(len(negative) * rho))
    out = {}
    for at in negative[:k] if k > 1 else []:
        q = (step.head @ step.old_hidden[at]).softmax(-1).tolist()
        own, tau = q[step.ids[at]], kappa * max(q)
        if own <= tau:
            continue
        x = math.log(own) - math.log(sum(v for v in q if v > tau)) - step.logps[at].item()
        if x > 0:
            out[at] = beta * min(math.exp(x) - x - 1, 10.0)
    return out


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rho, kappa", [(0.9, 0.02), (1.0, 0.1)])
@BOTH
def test_agrees_with_a_loop(seed, rho, kappa, statistics):
    step = make_step(seed, torch.float64)
    batch = token_batch(step)
    loss, _ = added(LpReg(rho=rho, kappa=kappa, beta=0.7, statistics=statistics), rollout(step), batch)
    selecting = step.old_logps if statistics == "step" else step.logps
    expected = by_the_card(step, batch.advantages, kappa, rho, 0.7, selecting)
    assert expected  # or the test would say little
    for at in map(tuple, step.mask.nonzero().tolist()):
        # the head's log-softmax is in float32
        assert loss[at].item() == pytest.approx(expected.get(at, 0.0), rel=1e-4, abs=1e-7)


def test_a_step_selects_once_over_all_its_rows():
    view = rollout(make_step())
    negative = int((view.mask & (view.advantages.unsqueeze(1) < 0)).sum())
    columns = LpReg(rho=0.3).on_rollout(view, {}).columns
    assert columns["is_selected"].sum() == int(0.3 * negative) > 1


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"kappa": 1.0}, "kappa must be in [0, 1), got 1.0"),
        ({"rho": 0.0}, "rho is a fraction in (0, 1], not a percentage, got 0.0"),
        ({"rho": 1.5}, "rho is a fraction in (0, 1], not a percentage, got 1.5"),
        ({"beta": -1.0}, "beta must be >= 0 and finite, got -1.0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        LpReg(**wrong)
    assert str(error.value) == sentence


def test_a_token_at_the_bound_is_kept():
    logps = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.6, 0.2, 0.2, 0.0]], dtype=torch.float64).log()
    # half of the largest: 0.25 is kept and nothing dropped, mass 1; of 0.6 it is 0.3, above 0.2: mass 0.6
    assert is_plausible(logps, 0.5).tolist() == [[True, True, True, False], [True, False, False, False]]
    assert log_kept_mass(logps, 0.5).tolist() == pytest.approx([0.0, math.log(0.6)])
    # a filter of 0 keeps all that can be sampled, and not what cannot: 0 (log 0 - log 0) is NaN
    assert is_plausible(logps, 0.0).tolist() == [[True, True, True, False]] * 2
    assert kl_of_filtered(logps, 0.0).tolist() == [0.0, 0.0]


def test_a_sampled_token_at_the_bound_is_protected_and_one_below_it_is_noise():
    # kappa 0.5 on (0.5, 0.25, 0.15, 0.1): the second is at the bound, the third below; mass 0.75, x = -log 0.75
    policy = [(0.5, 0.25, 0.15, 0.1)] * 3
    view, batch = card(policy, [1, 2, 0], [-1.0, -1.0, -1.0])
    # the head's log-softmax is in float32: give stage 1 the same tie as the distribution has
    table = torch.tensor([policy], dtype=torch.float64).log()
    view = replace(view, over_vocab=lambda f: f(table.flatten(0, 1)).unflatten(0, (1, 3)))
    _, metrics = added(LpReg(rho=1.0, kappa=0.5), view, batch)
    assert metrics["link/selected"][0].tolist() == [1, 1, 1]
    assert metrics["link/noise"][0].tolist() == [0, 1, 0]
    assert metrics["link/kept_mass"][0].tolist() == pytest.approx([0.75] * 3)
