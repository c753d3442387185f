"""OPEFO against its card (arXiv:2605.11491): numbers, the closed form, the entropy's own change, the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.entropy_flow_balance import EntropyFlowBalance

from ..term_batches import Processes, both_stages, card_step, first_stage, make_step, rollout, second_stage

NAN = math.nan
# (p over three tokens, sampled token, A)
TOKENS = [([0.7, 0.2, 0.1], 0, 1), ([0.7, 0.2, 0.1], 1, 1), ([0.4, 0.4, 0.2], 2, -1), ([0.9, 0.05, 0.05], 1, -1)]


def the_cards(tokens=TOKENS):
    """Both views: one response of a token for each."""
    p = torch.tensor([each[0] for each in tokens], dtype=torch.float64)
    logps = p.log().gather(1, torch.tensor([[each[1]] for each in tokens])).tolist()
    entropy = (-(p * p.log()).sum(dim=1, keepdim=True)).tolist()
    view, batch = card_step([[1]] * len(tokens), logps, logps, [[float(each[2])] for each in tokens], entropy)
    return replace(view, over_vocab=lambda f: f(p.log()).unsqueeze(1)), batch


def shaped(view, batch, **settings):
    term = EntropyFlowBalance(**settings)
    first = first_stage(term, view, {})
    return second_stage(term, batch, first, {}).advantages, first.metrics


@pytest.mark.parametrize(
    ("influence", "flow", "lam"),
    [
        ("own", [-0.311601, 0.161524, -0.110904, -0.130067], 0.547612),
        ("exact", [-0.140793, 0.332332, -0.133084, -0.351180], 0.305754),
    ],
)
def test_the_cards_worked_example(influence, flow, lam):
    view, batch = the_cards()
    advantages, metrics = shaped(view, batch, influence=influence)
    assert metrics["link/lam"].item() == pytest.approx(lam, abs=2e-6)
    signs = [math.copysign(1, each) for each in flow]
    expected = [a * (1 + sign * lam) for sign, (_, _, a) in zip(signs, TOKENS, strict=True)]
    assert advantages.flatten().tolist() == pytest.approx(expected, abs=2e-6)
    raising, burning = (4 * metrics[f"link/{name}"].item() for name in ("raising", "burning"))
    assert raising == pytest.approx(sum(each for each in flow if each > 0), abs=2e-6)
    assert burning == pytest.approx(sum(each for each in flow if each < 0), abs=2e-6)
    # net flow 0: f is linear in A
    assert sum(f * (1 + sign * lam) for f, sign in zip(flow, signs, strict=True)) == pytest.approx(0, abs=3e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_flow_of_what_is_shaped_is_zero_to_first_order(seed):
    """The entropies of free softmaxes, each moved along A (onehot - p), do not change in sum."""
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 5, generator=source, dtype=torch.float64)
    p, sampled = logits.softmax(1), torch.randint(5, (12,), generator=source)
    a = torch.randn(12, generator=source, dtype=torch.float64)
    tokens = list(zip(p.tolist(), sampled.tolist(), a.tolist(), strict=True))
    view, batch = the_cards(tokens)
    onehot = torch.eye(5, dtype=torch.float64)[sampled]

    def change(advantages):
        z = logits + 1e-6 * advantages.view(-1, 1) * (onehot - p)
        return (-(z.softmax(1) * z.log_softmax(1)).sum() + (p * p.log()).sum()).item() / 1e-6

    exact = shaped(view, batch, influence="exact")[0]
    assert abs(change(exact)) < 1e-4 < abs(change(a))


def test_one_side_alone_is_silenced_and_nothing_is_left_alone():
    burning, _ = shaped(*the_cards(TOKENS[:1] + TOKENS[2:]))
    assert burning.flatten().tolist() == [0, 0, 0]
    view, batch = the_cards()
    still, metrics = shaped(replace(view, advantages=view.advantages * 0), replace(batch, advantages=batch.advantages))
    assert torch.equal(still, batch.advantages) and metrics["link/lam"].item() == 0


def test_masked_and_not_finite_tokens_are_in_neither_sum():
    view, batch = the_cards([*TOKENS, TOKENS[0], TOKENS[0]])
    mask = torch.tensor([[True]] * 5 + [[False]])
    view = replace(view, mask=mask, entropy=view.entropy.index_fill(0, torch.tensor([4]), NAN))
    advantages, metrics = shaped(view, replace(batch, mask=mask))
    assert metrics["link/lam"].item() == pytest.approx(0.547612, abs=2e-6)
    assert metrics["link/ignored"].sums[0].item() == 1
    assert advantages[4:].flatten().tolist() == [1, 1]


def test_the_flow_is_that_of_the_losss_own_mean():
    """A mean over responses of their means: the first response's token counts twice one of the second's two."""
    logps, entropy = [[-0.5, NAN], [-3.0, -0.2]], [[0.6, NAN], [0.9, 0.4]]
    view, batch = card_step([[1, 0], [1, 1]], logps, logps, [[1.0, 0.0], [1.0, 1.0]], entropy)
    f = [-math.exp(x) * (x + h) for x, h in ((-0.5, 0.6), (-3.0, 0.9), (-0.2, 0.4))]
    assert f[0] < 0 < f[1] and f[2] < 0
    for mean, weights in (("tokens", (1, 1, 1)), ("sequences", (1.5, 0.75, 0.75))):
        m, p = -f[0] * weights[0] - f[2] * weights[2], f[1] * weights[1]
        _, metrics = shaped(replace(view, loss_mean=mean), batch)
        assert metrics["link/lam"].item() == pytest.approx((m - p) / (m + p))


def test_the_sums_are_over_all_processes():
    step, term = make_step(), EntropyFlowBalance()
    alone = first_stage(term, rollout(step), {}).metrics["link/lam"].item()
    processes = Processes(2)
    views = processes.views(step, [6, 5])
    both = processes.run(lambda rank: first_stage(term, views[rank], {}).metrics["link/lam"].item())
    assert both == pytest.approx([alone, alone]) and alone != 0


def test_a_second_update_on_a_rollout_is_told_of_once(caplog: pytest.LogCaptureFixture):
    term, memory = EntropyFlowBalance(), {}
    for _ in range(2):
        both_stages(term, make_step(), memory=memory)
        term.on_step({}, memory)
    assert not caplog.records
    for _ in range(2):
        term.on_step({}, memory)
    [sentence] = [record.message for record in caplog.records]
    assert sentence.startswith("entropy_flow_balance: a rollout is used for more than one update")


def test_only_the_exact_form_reads_the_whole_distribution():
    assert (EntropyFlowBalance().needs_vocab, EntropyFlowBalance(influence="exact").needs_vocab) == (False, True)
