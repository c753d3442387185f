"""SIREN against its card (arXiv:2509.25133): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.equations.vocab import Head, over_vocab
from hclm_rl.terms.siren import Siren, nucleus_entropy

from ..term_batches import Processes, card_step, first_stage, make_step, rollout, second_stage, token_batch

NAN = math.nan
R1 = [(0.90, 0.04, 0.03, 0.02, 0.01), (0.50, 0.25, 0.15, 0.06, 0.04), (0.35, 0.30, 0.20, 0.10, 0.05)]
R2 = [(0.60, 0.30, 0.05, 0.03, 0.02), (0.25, 0.22, 0.20, 0.18, 0.15)]
HEAD = Head(weight=torch.eye(5, dtype=torch.float64))
C = 0.005


def card(rows=(R1, R2)):
    """Both views of responses with these next-token distributions, and the logits, which collect gradients."""
    width = max(map(len, rows))
    logits = torch.full((len(rows), width, 5), NAN, dtype=torch.float64)
    for i, row in enumerate(rows):
        logits[i, : len(row)] = torch.tensor(row, dtype=torch.float64).log()
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    view, batch = card_step(mask, *[[[0.0] * width for _ in rows]] * 3)
    logits.requires_grad_()
    old = logits.detach()
    view = replace(view, over_vocab=lambda f: over_vocab(f, old, HEAD, mask=view.mask))
    return view, replace(batch, over_vocab=lambda f: over_vocab(f, logits, HEAD, mask=view.mask)), logits


@pytest.mark.parametrize(
    "is_inclusive, expected",
    [(True, [0, 0.980990, 1.073384, 0.636514, 1.378932]), (False, [0, 0.636514, 0.690186, 0, 1.094402])],
)
def test_the_cards_nucleus_entropies(is_inclusive, expected):
    logps = torch.tensor([*R1, *R2], dtype=torch.float64).log()
    # printed to six digits: half of the last one
    assert nucleus_entropy(logps, 0.8, is_inclusive).tolist() == pytest.approx(expected, abs=5e-7)
    shuffled = logps[:, torch.tensor([3, 0, 4, 1, 2])]
    torch.testing.assert_close(nucleus_entropy(shuffled, 0.8, is_inclusive), nucleus_entropy(logps, 0.8, is_inclusive))


def test_a_nucleus_of_one_token_or_none_has_no_entropy_and_no_gradient():
    for is_inclusive in (True, False):
        logits = torch.tensor([[5.0, 0.0, -1.0], [200.0, 0.0, -math.inf]]).requires_grad_()
        entropy = nucleus_entropy(logits.log_softmax(-1), 0.8, is_inclusive)
        entropy.sum().backward()
        assert entropy.tolist() == [0, 0] and torch.equal(logits.grad, torch.zeros(2, 3))


def test_the_boundary_is_no_matter_of_rounding():
    # 0.5 + 0.3 is 0.8 exactly reached: two tokens; five equal ones: four of them, log 4
    for dtype in (torch.float32, torch.float64):
        logps = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.2] * 5], dtype=dtype).log()
        two = -(0.625 * math.log(0.625) + 0.375 * math.log(0.375))
        assert nucleus_entropy(logps, 0.8).tolist() == pytest.approx([two, math.log(4)], rel=1e-6)
        assert nucleus_entropy(logps, 0.8, False).tolist() == pytest.approx([0, math.log(3)], rel=1e-6, abs=1e-6)
        # all the mass: Shannon's entropy, as the card prints it for r1's second position
        whole = nucleus_entropy(torch.tensor([R1[1]], dtype=dtype).log(), 1.0)
        assert whole.item() == pytest.approx(1.275275, abs=5e-7)


@pytest.mark.parametrize(
    "nucleus, level, anchor, value",
    [("inclusive", 1.226158, 1.50, 0.00037495), ("exclusive", 0.892294, 1.20, 0.00047342)],
)
def test_the_cards_level_and_term(nucleus, level, anchor, value):
    view, batch, _ = card()
    term = Siren(nucleus=nucleus, anchor=anchor, statistics="micro_batch")
    outcome = second_stage(term, batch, first_stage(term, view, memory := {}), memory)
    assert outcome.metrics["link/nucleus_entropy"].item() == pytest.approx(level, abs=5e-7)
    assert C * outcome.losses["link"].item() == pytest.approx(value, abs=5e-9)
    first = first_stage(Siren(nucleus=nucleus, anchor=anchor), view, {})
    assert first.metrics["link/nucleus_entropy"].item() == pytest.approx(level, abs=5e-7)
    # 2 c (H_agg - anchor); 5 tokens in 2 responses are the trainer's mean made good
    assert C * first.shared["link/pull"].item() * 2 / 5 == pytest.approx(2 * C * (level - anchor), abs=5e-9)


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_the_cards_gradient(statistics):
    view, batch, logits = card()
    term, memory = Siren(anchor=1.5, statistics=statistics), {}
    loss = second_stage(term, batch, first_stage(term, view, memory), memory).losses["link"]
    (C * (loss[batch.mask].mean() if loss.dim() else loss)).backward()
    # printed to seven digits: half of the last one, and float32 in the head
    expected = torch.zeros(2, 3, 5, dtype=torch.float64)
    expected[0, 2] = torch.tensor([1.049109e-4, 1.543009e-5, -1.203409e-4, 0, 0])
    expected[1, 1] = torch.tensor([6.248286e-5, 9.682786e-6, -2.190331e-5, -5.026234e-5, 0])
    torch.testing.assert_close(logits.grad, expected, atol=2e-10, rtol=1e-6)
    assert batch.entropy.grad is None and batch.logps.grad is None


def test_the_square_of_each_micro_batch_adds_their_variance_and_the_step_does_not():
    term, losses, gradients = Siren(anchor=1.5, statistics="micro_batch"), [], []
    for row in (R1, R2):
        view, batch, _ = card([row])
        losses.append(second_stage(term, batch, first_stage(term, view, memory := {}), memory).losses["link"].item())
    assert C * sum(losses) / 2 == pytest.approx(0.00049165, abs=5e-9)
    # "step": the pull comes from both responses, and each row's gradient is what it is in the whole
    view, batch, whole = card()
    step = Siren(anchor=1.5)
    first = first_stage(step, view, memory := {})
    second_stage(step, batch, first, memory).losses["link"].sum().backward()
    for i, row in enumerate((R1, R2)):
        _, batch, logits = card([row])
        second_stage(step, batch, replace_columns(first), memory).losses["link"].sum().backward()
        gradients.append(logits.grad[0, : len(row)])
        torch.testing.assert_close(gradients[i], whole.grad[i, : len(row)])


def replace_columns(first):
    """Stage 1's outcome for a single row."""
    return replace(first, affected={name: value[:1, :1] for name, value in first.affected.items()})


def test_the_anchor_is_the_first_rollouts_and_stays():
    memory, term = {}, Siren()
    view, _, _ = card()
    first = first_stage(term, view, memory)
    assert memory["anchor"] == pytest.approx(1.226158, abs=5e-7) and first.shared["link/pull"].item() == 0
    before = dict(memory)
    narrow, _, _ = card([[R1[0], R1[1]], [R2[0], R2[0]]])
    again = first_stage(term, narrow, memory)
    assert memory == before
    # H_top 0 and 0.980990: the peak is the second; 0.636514 twice: none above the quantile, which counts as 0
    assert again.metrics["link/nucleus_entropy"].item() == pytest.approx(0.980990 / 2, abs=5e-7)
    # twice the way to the anchor, times 4 tokens / 2 responses
    assert again.shared["link/pull"].item() == pytest.approx(2 * (0.490495 - 1.226158) * 2, abs=5e-6)


def test_the_parity_form_has_its_anchor_from_the_whole_first_rollout():
    term, memory = Siren(statistics="micro_batch"), {}
    view, _, _ = card()
    first_stage(term, view, memory)
    assert memory["anchor"] == pytest.approx(1.226158, abs=5e-7)
    narrow, _, _ = card([R1])
    first_stage(term, narrow, memory)
    assert memory["anchor"] == pytest.approx(1.226158, abs=5e-7)


def by_the_card(step, hidden, p_top, tau) -> tuple[float, list[dict[int, float]]]:
    """H_agg, and per response the nucleus entropy of its peaks."""
    levels, peaks = [], []
    for b, n in enumerate(step.mask.sum(1).tolist()):
        entropies = []
        for t in range(n):
            q, kept, mass = sorted((step.head @ hidden[b, t]).softmax(-1).tolist(), reverse=True), [], 0.0
            while mass < p_top:
                kept.append(q[len(kept)])
                mass += kept[-1]
            entropies.append(-sum(v / mass * math.log(v / mass) for v in kept))
        ordered, place = sorted(entropies), tau * (n - 1)
        low = int(place)
        theta = ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low])
        peaks.append({t: h for t, h in enumerate(entropies) if h > theta})
        levels.append(sum(peaks[-1].values()) / max(len(peaks[-1]), 1))
    return sum(levels) / len(levels), peaks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p_top, tau", [(0.8, 0.8), (0.6, 0.5), (0.95, 0.3)])
def test_agrees_with_a_loop(seed, p_top, tau):
    step = make_step(seed, torch.float64)
    old_level, _ = by_the_card(step, step.old_hidden, p_top, tau)
    new_level, peaks = by_the_card(step, step.hidden, p_top, tau)
    term, batch = Siren(p_top=p_top, tau=tau, anchor=0.3), token_batch(step)
    loss = second_stage(term, batch, first_stage(term, rollout(step), {}), {}).losses["link"]
    tokens = int(step.mask.sum())
    for b, own in enumerate(peaks):
        for t in range(int(step.mask[b].sum())):
            share = own[t] / len(own) / 8 * tokens if t in own else 0.0
            # the head's log-softmax is in float32
            assert loss[b, t].item() == pytest.approx(2 * (old_level - 0.3) * share, rel=1e-5, abs=1e-6)
    parity, memory = Siren(p_top=p_top, tau=tau, anchor=0.3, statistics="micro_batch"), {}
    squared = second_stage(parity, token_batch(step), first_stage(parity, rollout(step), memory), memory)
    assert squared.losses["link"].item() == pytest.approx((new_level - 0.3) ** 2, rel=1e-5)


def test_all_processes_have_the_anchor_of_all():
    step, alone = make_step(), {}
    first_stage(Siren(), rollout(step), alone)
    processes = Processes(2)
    views, memories = processes.views(step, [6, 5]), [{}, {}]
    processes.run(lambda rank: first_stage(Siren(), views[rank], memories[rank]))
    assert memories[0] == memories[1] and memories[0]["anchor"] == pytest.approx(alone["anchor"], rel=1e-6)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"p_top": 0.0}, "p_top must be in (0, 1], got 0.0"),
        ({"tau": 1.0}, "tau must be in [0, 1), got 1.0"),
        ({"anchor": -0.1}, "anchor must be >= 0 nats and finite, got -0.1"),
        ({"anchor": NAN}, "anchor must be >= 0 nats and finite, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Siren(**wrong)
    assert str(error.value) == sentence


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_a_first_rollout_without_tokens_sets_no_anchor(statistics):
    view, batch, _ = card()
    term, memory = Siren(statistics=statistics), {}
    empty = torch.zeros_like(view.mask)
    first = first_stage(term, replace(view, mask=empty), memory)
    second_stage(term, replace(batch, mask=empty), first, memory)
    assert "anchor" not in memory
    first_stage(term, view, memory)
    assert memory["anchor"] > 0.5
