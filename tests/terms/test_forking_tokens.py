"""Forking tokens against the card (arXiv:2506.01939): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.forking_tokens import ForkingTokens

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

NAN = math.nan
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])
LOG_RATIO = [[math.log(r) for r in row] for row in ([1, 1.1, 0.9, 1], [1.2, 1, 1, 1])]


def the_card(entropy=((0.1, 1.2, 0.3, 0.05), (0.9, 0.2, NAN, NAN))):
    view, batch = card_step(
        mask=[[1, 1, 1, 1], [1, 1, 0, 0]],
        logps=LOG_RATIO,
        old_logps=[[0.0] * 4] * 2,
        advantages=[[1.0] * 4, [-1.0] * 4],
        entropy=[list(row) for row in entropy],
    )
    return view, replace(batch, clip_range=(0.2, 0.28))


def shaped(term: ForkingTokens, view, batch):
    """Advantages after both stages, and the share of tokens kept."""
    outcome = second_stage(term, batch, first_stage(term, view, {}), {})
    return outcome.advantages, outcome.metrics["link/kept"][batch.mask].mean().item()


@BOTH
def test_the_cards_example(statistics):
    view, batch = the_card()
    losses = surrogate(batch, batch.advantages)
    assert losses[batch.mask].tolist() == pytest.approx([-1, -1.1, -0.9, -1, 1.2, 1])
    assert losses[batch.mask].mean().item() == pytest.approx(-0.3)

    kept, share = shaped(ForkingTokens(statistics=statistics), view, batch)
    assert surrogate(batch, kept)[batch.mask].mean().item() == pytest.approx(0.05)
    assert share == pytest.approx(2 / 6)

    over_all, _ = shaped(ForkingTokens(statistics=statistics, normalise_by="all"), view, batch)
    losses = surrogate(batch, over_all)
    assert losses[batch.mask].mean().item() == pytest.approx(0.016667, abs=5e-7)
    # the mean over each response, then over responses: (-1.1 / 4 + 1.2 / 2) / 2
    per_response = torch.where(batch.mask, losses, 0).sum(1) / batch.mask.sum(1)
    assert per_response.mean().item() == pytest.approx(0.1625)
    assert (over_all != 0)[batch.mask].tolist() == [False, True, False, False, True, False]


@BOTH
def test_ties_at_the_quantile_are_kept(statistics):
    # ceil(0.2 * 6) = 2, and the second largest entropy is 0.9, which three tokens share: four are kept, times 6 / 4
    view, batch = the_card(((0.1, 1.2, 0.9, 0.05), (0.9, 0.9, NAN, NAN)))
    advantages, share = shaped(ForkingTokens(statistics=statistics), view, batch)
    assert advantages[batch.mask].tolist() == [0, 1.5, 1.5, 0, -1.5, -1.5]
    assert share == pytest.approx(4 / 6)


@BOTH
def test_ties_may_be_cut_to_the_authors_number(statistics):
    # ceil(0.2 * 6) = 2: 1.2 and the first of three 0.9, times 6 / 2
    view, batch = the_card(((0.1, 1.2, 0.9, 0.05), (0.9, 0.9, NAN, NAN)))
    advantages, share = shaped(ForkingTokens(statistics=statistics, ties="cut"), view, batch)
    assert advantages[batch.mask].tolist() == [0, 3.0, 3.0, 0, 0, 0]
    assert share == pytest.approx(2 / 6)
    # a policy that is certain everywhere: ceil(1.2) of the zeros, not all six
    view, batch = the_card(((0.0,) * 4, (0.0, 0.0, NAN, NAN)))
    advantages, share = shaped(ForkingTokens(statistics=statistics, ties="cut"), view, batch)
    assert share == pytest.approx(2 / 6)


@BOTH
def test_equal_entropies_are_trained_whole_and_unscaled(statistics):
    view, batch = the_card(((0.0,) * 4, (0.0, 0.0, NAN, NAN)))
    advantages, _ = shaped(ForkingTokens(statistics=statistics), view, batch)
    assert torch.equal(advantages, batch.advantages)


@BOTH
@pytest.mark.parametrize(
    "share, tokens, kept",
    [(0.2, 6, 2), (0.2, 5, 1), (0.28, 25, 7), (0.2, 1, 1), (0.21, 15, 4), (1.0, 7, 7), (0.001, 7, 1)],
)
def test_the_number_kept_is_a_ceiling(share, tokens, kept, statistics):
    # 0.28 * 25 is 7.000000000000001 in floating point, and still 7
    entropy = [[0.1 * i for i in range(tokens)]]
    view, batch = card_step([[1] * tokens], entropy, entropy, [[1.0] * tokens], entropy)
    advantages, _ = shaped(ForkingTokens(share=share, normalise_by="all", statistics=statistics), view, batch)
    # entropies rise along the row, so the last ones are kept
    assert advantages.tolist() == [[0.0] * (tokens - kept) + [1.0] * kept]


def test_kept_tokens_carry_the_whole_mean():
    # advantages all 1: the mean over kept tokens is 1, so the mean over all tokens of the weighted ones is 1 too
    view = rollout(make_step())
    weight = ForkingTokens().on_rollout(view, {}).columns["weight"]
    assert weight[view.mask].mean().item() == pytest.approx(1.0)
    # ceil(0.2 * 32) = 7 of 32 tokens, over all rows at once
    assert weight[view.mask].count_nonzero() == 7 and weight[view.mask].max().item() == pytest.approx(32 / 7)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_a_micro_batch_agrees_with_a_loop(seed, share):
    batch = token_batch(make_step(seed, torch.float64), slice(2, 6))
    tokens = [(b, t) for b, row in enumerate(batch.mask.tolist()) for t, counts in enumerate(row) if counts]
    # the authors' k = max(1, int(rho N + 0.9999)); no ties in random entropies
    k = max(1, int(share * len(tokens) + 0.9999))
    kept = sorted(tokens, key=lambda at: batch.entropy[at].item(), reverse=True)[:k]
    advantages = ForkingTokens(share=share, statistics="micro_batch")(batch, {}).advantages
    for at in tokens:
        expected = batch.advantages[at].item() * len(tokens) / k if at in kept else 0.0
        assert advantages[at].item() == pytest.approx(expected, rel=1e-6)  # the weight is a float32


@pytest.mark.parametrize("share", [0.0, 1.1, NAN])
def test_refuses(share):
    with pytest.raises(ValueError) as error:
        ForkingTokens(share=share)
    assert str(error.value) == f"share must be in (0, 1], got {share}"


@pytest.mark.parametrize("statistics", ["step", "micro_batch"])
def test_a_tiny_share_still_keeps_one_token(statistics):
    step = make_step(0, torch.float64)
    term = ForkingTokens(share=1e-10, statistics=statistics)
    outcome = second_stage(term, token_batch(step), first_stage(term, rollout(step), {}), {})
    assert outcome.metrics["link/kept"][step.mask].sum() == 1
