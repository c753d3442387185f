"""The entropy-augmented advantage against its card (arXiv:2506.14758): numbers, the two places of H, the bounds."""

import math

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.terms.exploration_advantage import ExplorationAdvantage

from ..term_batches import both_stages, card_step, first_stage, make_step, second_stage

NAN = math.nan
A, H = [1.0, 1.0, -1.0, -1.0, 0.0], [0.1, 2.0, 0.1, 2.0, 2.0]


def shaped(**settings) -> list[float]:
    """The card's five tokens and a padded slot, as one response."""
    term = ExplorationAdvantage(**settings)
    slots = [[0.0] * 5 + [NAN]]
    view, batch = card_step([[1, 1, 1, 1, 1, 0]], slots, slots, [[*A, 7.0]], [[*H, NAN]])
    first = first_stage(term, view, {}, group_size=1)
    after = second_stage(term, batch, first, {}).advantages
    after = first.advantages if after is None else after
    assert after is not None and after[0, 5] == 7.0
    return after[0, :5].tolist()


@pytest.mark.parametrize("at", ["current", "sampling"])
def test_the_cards_numbers(at: str):
    # psi = min(0.4 H, |A| / 2) = [0.04, 0.5, 0.04, 0.5, 0]
    assert shaped(at=at) == pytest.approx([1.04, 1.5, -0.96, -0.5, 0])
    # min(0.4 H, |A|) = [0.04, 0.8, 0.04, 0.8, 0]
    assert shaped(at=at, kappa=1.0) == pytest.approx([1.04, 1.8, -0.96, -0.2, 0])


def test_kappa_1_may_leave_a_wrong_token_alone_and_pays_none():
    # 0.6 * 2 = 1.2 is cut to |A| = 1
    assert shaped(alpha=0.6, kappa=1.0)[3] == 0.0


def test_each_place_reads_its_own_entropy():
    step = make_step()
    _, now, _ = both_stages(ExplorationAdvantage(), step)
    _, before, _ = both_stages(ExplorationAdvantage(at="sampling"), step)
    a = step.advantages.unsqueeze(1).expand(step.mask.shape)
    for entropy, found in ((step.entropy, now), (step.old_entropy, before)):
        for i, t in step.mask.nonzero().tolist():
            psi = min(0.4 * entropy[i, t].item(), abs(a[i, t].item()) / 2)
            assert found[i, t].item() == pytest.approx(a[i, t].item() + psi)
    assert not torch.equal(now, before)


def test_signs_stay():
    step = make_step()
    batch, after, _ = both_stages(ExplorationAdvantage(alpha=100.0), step)
    assert torch.equal(after.sign(), batch.advantages.sign())


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"kappa": 0.5}, "kappa must be at least 1, or a wrong token could be paid, and finite, got 0.5"),
        ({"at": "now"}, "at must be one of 'current', 'sampling', got str 'now'"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"exploration_advantage": given}])
    assert str(caught.value) == f"exploration_advantage: {sentence}"


def test_a_term_that_shapes_rewards_may_follow_the_form_of_the_loss_alone():
    build_chain([{"exploration_advantage": {}}, {"unlikeliness": {}}])  # it acts after both first stages
    with pytest.raises(ValueError, match="put 'unlikeliness' before 'exploration_advantage'"):
        build_chain([{"exploration_advantage": {"at": "sampling"}}, {"unlikeliness": {}}])


def test_both_places_log_what_they_add():
    for at in ("current", "sampling"):
        slots = [[0.0] * 5]
        view, batch = card_step([[1] * 5], slots, slots, [A], [H])
        term = ExplorationAdvantage(at=at)
        first = first_stage(term, view, {}, group_size=1)
        said = {**first.metrics, **second_stage(term, batch, first, {}).metrics}
        assert said["link/bonus"].tolist()[0] == pytest.approx([0.04, 0.5, 0.04, 0.5, 0])
