"""Entropy-discriminator clipping against its card (arXiv:2602.03392): numbers, a loop, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.equations.flow import mean_discriminator
from hclm_rl.terms.discriminator_clip import DiscriminatorClip

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate

NAN = math.nan
SHAPES = {
    "spread": (0.70, 0.15, 0.10, 0.05),
    "flat": (0.40, 0.30, 0.20, 0.10),
    "certain": (0.97, 0.01, 0.01, 0.01),
    "sure": (0.85, 0.05, 0.05, 0.05),
}
TOKENS = [("spread", 0), ("spread", 2), ("flat", 3), ("certain", 0), ("flat", 0), ("sure", 1)]
A = [1.0, -1.0, -1.0, 1.0, -1.0, -1.0]


def the_card(advantages=A, tokens=TOKENS):
    """One response, on-policy, and one padded slot of NaN."""
    logps = [math.log(SHAPES[name][token]) for name, token in tokens]
    entropy = [-sum(p * math.log(p) for p in SHAPES[name]) for name, _ in tokens]
    rows = [[*logps, NAN]]
    return card_step([[1] * len(tokens) + [0]], rows, rows, [[*advantages, NAN]], [[*entropy, NAN]])


def shaped(term: DiscriminatorClip, view, batch):
    """Advantages after both stages, and what stage 1 logs."""
    first = first_stage(term, view, {})
    return second_stage(term, batch, first, {}).advantages, first.metrics


def dropped(term: DiscriminatorClip, view, batch) -> list[int]:
    """Numbers of the tokens whose advantage became 0."""
    return (shaped(term, view, batch)[0] == 0)[batch.mask].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("mu, masked", [(1.0, []), (0.5, [1, 2, 5])])
def test_the_cards_example(mu, masked):
    assert dropped(DiscriminatorClip(mu=mu), *the_card()) == masked


def test_the_cards_losses():
    view, batch = the_card()
    losses = {
        normalise_by: surrogate(batch, shaped(DiscriminatorClip(mu=0.5, normalise_by=normalise_by), view, batch)[0])
        for normalise_by in ("kept", "all")
    }
    # ratio 1: -A over six tokens is (-1 + 1 + 1 - 1 + 1 + 1) / 6
    assert surrogate(batch, batch.advantages)[batch.mask].mean().item() == pytest.approx(1 / 3)
    # tokens 0, 3, 4 are left: (-1 - 1 + 1) / 3, or over the original six
    assert losses["kept"][batch.mask].mean().item() == pytest.approx(-1 / 3)
    assert losses["all"][batch.mask].mean().item() == pytest.approx(-1 / 6)


def test_the_cards_statistics():
    # the card's z, printed to six digits, over its deviation 0.191361: the lowest with A < 0 is token 1
    lowest = shaped(DiscriminatorClip(), *the_card())[1]["link/lowest"].item()
    assert lowest == pytest.approx(-0.190057 / 0.191361, abs=5e-6)
    # token 1 no longer counts for it once it is pushed up: then it is token 5
    lowest = shaped(DiscriminatorClip(), *the_card([1.0, 1.0, *A[2:]]))[1]["link/lowest"].item()
    assert lowest == pytest.approx(-0.171639 / 0.191361, abs=5e-6)
    # the bound lies between the neighbours of the ranked z = -0.190057, -0.171639, -0.153500
    for mu, masked in ((0.994, []), (0.993, [1]), (0.897, [1]), (0.896, [1, 5]), (0.803, [1, 5]), (0.802, [1, 2, 5])):
        assert dropped(DiscriminatorClip(mu=mu), *the_card()) == masked


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_only_tokens_that_are_pushed_down_are_dropped(advantage):
    # token 1 has the lowest z; without a negative advantage it stays, and so does the denominator
    view, batch = the_card(advantages=[1.0, advantage, -1.0, 1.0, -1.0, -1.0])
    advantages, _ = shaped(DiscriminatorClip(mu=0.5), view, batch)
    # tokens 2 and 5 fall: 6 / 4
    assert advantages[batch.mask].tolist() == pytest.approx([1.5, 1.5 * advantage, 0, 1.5, -1.5, 0])


def test_the_statistics_are_over_both_signs():
    # Over the tokens with A < 0 alone (1, 2, 4, 5) mean S = -0.054023, sd 0.115937: z of token 2 is -0.416 sd, so it
    # would stay at mu = 0.5; over all six it is -0.153500 / 0.191361 = -0.802 and falls
    assert 2 in dropped(DiscriminatorClip(mu=0.5), *the_card())


def test_the_symmetric_form_also_drops_what_is_pushed_up_from_the_top():
    # z of token 0 is 0.339100 / 0.191361 = 1.772, with A > 0
    assert dropped(DiscriminatorClip(mu=1.7, is_symmetric=True), *the_card()) == [0]
    assert dropped(DiscriminatorClip(mu=1.8, is_symmetric=True), *the_card()) == []
    assert dropped(DiscriminatorClip(mu=0.5, is_symmetric=True), *the_card()) == [0, 1, 2, 5]
    # with A < 0 its high S is no reason
    assert dropped(DiscriminatorClip(mu=1.7, is_symmetric=True), *the_card([-1.0, *A[1:]])) == []


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_equal_tokens_are_all_kept(is_symmetric):
    # the computed mean of fourteen such values misses them by a rounding, 1e-17 below: one deviation, and mu is less
    view, batch = the_card([-1.0, 1.0] * 7, [("sure", 1)] * 14)
    advantages, _ = shaped(DiscriminatorClip(mu=1e-3, is_symmetric=is_symmetric), view, batch)
    assert torch.equal(advantages[batch.mask], batch.advantages[batch.mask])


def test_the_default_drops_a_rare_token_among_certain_ones():
    # 15 certain tokens, S = 0.97 (ln 0.97 + 0.167701) = 0.133124, and one S = -0.138830: its z is 15 / 16 of their
    # distance d, the deviation sqrt(15) / 16 d, so -sqrt(15) = -3.87 deviations
    tokens = [("certain", 0)] * 15 + [("spread", 2)]
    view, batch = the_card([-1.0] * 16, tokens)
    advantages, metrics = shaped(DiscriminatorClip(), view, batch)
    assert metrics["link/lowest"].item() == pytest.approx(-math.sqrt(15))
    assert advantages[batch.mask].tolist() == pytest.approx([-16 / 15] * 15 + [0])
    assert dropped(DiscriminatorClip(mu=3.88), view, batch) == []


def by_the_card(step, mu: float) -> list[tuple[int, int]]:
    """The masked tokens of the card's steps 2 and 3, token by token."""
    tokens = [(b, t) for b, row in enumerate(step.mask.tolist()) for t, counts in enumerate(row) if counts]
    s = {at: math.exp(step.old_logps[at]) * (step.old_entropy[at].item() + step.old_logps[at].item()) for at in tokens}
    mean = sum(s.values()) / len(s)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in s.values()) / len(s))
    return [at for at in tokens if step.advantages[at[0]] < 0 and not s[at] - mean >= -mu * deviation]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu", [0.1, 0.4])
def test_a_step_agrees_with_a_loop(seed, mu):
    step = make_step(seed, torch.float64)
    masked = by_the_card(step, mu)
    assert masked  # or the test would say little
    weight = DiscriminatorClip(mu=mu).on_rollout(rollout(step), {}).columns["weight"]
    # all weights of the 32 tokens are 0 or 32 / kept, in float32
    assert [tuple(at) for at in (step.mask & (weight == 0)).nonzero().tolist()] == masked
    kept = weight[step.mask & (weight != 0)]
    assert kept.tolist() == pytest.approx([32 / (32 - len(masked))] * len(kept), rel=1e-6)


def test_the_mask_is_frozen_at_the_sampling_policy():
    view, batch = the_card()
    moved = replace(batch, logps=batch.logps.detach() - 1, entropy=batch.entropy.detach() + 1)
    term = DiscriminatorClip(mu=0.5)
    assert torch.equal(shaped(term, view, batch)[0][batch.mask], shaped(term, view, moved)[0][batch.mask])


def test_half_precision_scores_are_worked_on_in_float64():
    step = make_step()
    step = replace(step, old_logps=step.old_logps.bfloat16(), old_entropy=step.old_entropy.bfloat16())
    lowest = DiscriminatorClip().on_rollout(rollout(step), {}).metrics["lowest"].item()
    exact = rollout(step, logps=step.old_logps.double(), entropy=step.old_entropy.double())
    assert lowest == DiscriminatorClip().on_rollout(exact, {}).metrics["lowest"].item()


def test_kept_tokens_carry_the_whole_mean():
    # advantages all -1: the mean over kept tokens is -1, so the mean over all tokens of the weighted ones is -1 too
    view = rollout(make_step(), advantages=-torch.ones(8))
    weight = DiscriminatorClip(mu=0.5).on_rollout(view, {}).columns["weight"][view.mask]
    assert (weight == 0).any() and weight.mean().item() == pytest.approx(1.0)


# ---- over the vocabulary


def with_vocabulary(advantages=A, tokens=TOKENS):
    """The card's batch with its whole distributions; the padded slot has one of NaN."""
    view, batch = the_card(advantages, tokens)
    table = torch.tensor([SHAPES[name] for name, _ in tokens] + [(NAN,) * 4], dtype=torch.float64).log()
    return replace(view, over_vocab=lambda functional: functional(table).unsqueeze(0)), batch


def test_the_cards_expected_discriminator():
    table = torch.tensor([SHAPES[name] for name, _ in TOKENS], dtype=torch.float64).log()
    expected = [0.232029, 0.232029, 0.041589, 0.127799, 0.041589, 0.288988]
    assert mean_discriminator(table).tolist() == pytest.approx(expected, abs=5e-7)


def vocabulary(**settings) -> DiscriminatorClip:
    return DiscriminatorClip(over="vocabulary", **settings)


@pytest.mark.parametrize(
    "settings, masked",
    [
        ({"mu": 1.0, "max_frac": 1.0}, [1, 5]),
        ({"mu": 0.5, "max_frac": 1.0}, [1, 2, 5]),
        ({"mu": 0.5, "max_frac": 0.2}, [5]),  # floor(1.2): the one with the largest D
        ({"mu": 0.5, "max_frac": 0.34}, [1, 5]),  # floor(2.04)
        ({"mu": 0.5, "max_frac": 0.5}, [1, 2, 5]),  # 3 / 6 is not more than the cap
        ({"mu": 0.5}, [5]),  # 1e-4 of six tokens: at least one
        ({}, []),  # mu 8.5
    ],
)
def test_the_cards_example_over_the_vocabulary(settings, masked):
    assert dropped(vocabulary(**settings), *with_vocabulary()) == masked


def test_the_cards_loss_over_the_vocabulary():
    view, batch = with_vocabulary()
    advantages, metrics = shaped(vocabulary(mu=1.0, max_frac=1.0), view, batch)
    # tokens 0, 2, 3, 4 are left: (-1 + 1 - 1 + 1) / 4
    assert surrogate(batch, advantages)[batch.mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    # token 5 has the largest D, 0.409399 of a deviation of 0.219789
    assert metrics["link/lowest"].item() == pytest.approx(-0.409399 / 0.219789, abs=1e-5)


def test_the_threshold_is_on_d_itself_and_the_deviation_is_around_its_mean():
    # D of token 2 is 0.143862. Less the mean, 0.109443, it would stay at any of these mu; with the root mean square of
    # D as scale, 0.245533, it would at 0.6 as well. Its place is mu = 0.143862 / 0.219789 = 0.6545.
    assert dropped(vocabulary(mu=0.6, max_frac=1.0), *with_vocabulary()) == [1, 2, 5]
    assert dropped(vocabulary(mu=0.66, max_frac=1.0), *with_vocabulary()) == [1, 5]


@pytest.mark.parametrize("advantage", [1.0, 0.0])
def test_over_the_vocabulary_too_only_what_is_pushed_down_is_dropped_and_capped(advantage):
    # token 5 has the largest D: without a negative advantage it neither falls nor takes the cap's one place
    advantages = [*A[:5], advantage]
    assert dropped(vocabulary(mu=0.5, max_frac=0.2), *with_vocabulary(advantages)) == [1] + [5] * (advantage == 0)
    weight = vocabulary(mu=0.5, max_frac=0.2).on_rollout(with_vocabulary(advantages)[0], {}).columns["weight"]
    assert weight[0, :6].tolist() == pytest.approx([1.2, 0, 1.2, 1.2, 1.2, 1.2])


def test_the_discriminator_is_the_change_of_the_entropy_per_unit_of_step():
    # dH = -alpha (S_a - N) for a step alpha on the log-prob of token a: z += alpha (e_a - p)
    p = torch.tensor(SHAPES["flat"], dtype=torch.float64)
    entropy = -(p * p.log()).sum()
    for a in range(4):
        step = 1e-6 * (torch.eye(4, dtype=torch.float64)[a] - p)
        after = (p.log() + step).softmax(0)
        change = (-(after * after.log()).sum() - entropy).item() / 1e-6
        s = (p * (p.log() + entropy))[a]
        expected = -(s - mean_discriminator(p.log().unsqueeze(0)))[0].item()
        assert change == pytest.approx(expected, abs=1e-5)


def over_the_vocabulary_by_the_card(step, mu: float, max_frac: float) -> list[tuple[int, int]]:
    """The masked tokens of the card's step 4, token by token, with its guard A < 0."""
    d = {}
    for b, row in enumerate(step.mask.tolist()):
        for t in (t for t, counts in enumerate(row) if counts):
            p = (step.old_hidden[b, t] @ step.head.T).softmax(-1).tolist()
            entropy = -sum(x * math.log(x) for x in p)
            own = p[step.ids[b, t]]
            d[b, t] = sum(x * x * (math.log(x) + entropy) for x in p) - own * (math.log(own) + entropy)
    mean = sum(d.values()) / len(d)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in d.values()) / len(d))
    masked = [at for at, x in d.items() if step.advantages[at[0]] < 0 and x > mu * deviation]
    if len(masked) / len(d) > max_frac:
        masked = sorted(masked, key=d.get, reverse=True)[: max(math.floor(max_frac * len(d)), 1)]
    return sorted(masked)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mu, max_frac", [(0.2, 1.0), (0.5, 1.0), (0.2, 0.1), (0.2, 1e-4)])
def test_over_the_vocabulary_a_step_agrees_with_a_loop(seed, mu, max_frac):
    step = make_step(seed, torch.float64)
    masked = over_the_vocabulary_by_the_card(step, mu, max_frac)
    assert masked  # or the test would say little
    # the head works in float32, as on a GPU: no token lies that close to a threshold here
    weight = vocabulary(mu=mu, max_frac=max_frac).on_rollout(rollout(step), {}).columns["weight"]
    assert [tuple(at) for at in (step.mask & (weight == 0)).nonzero().tolist()] == masked


def test_the_vocabulary_is_read_only_where_it_is_asked_for():
    assert not DiscriminatorClip().needs_vocab and vocabulary().needs_vocab


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"max_frac": 0.0}, "max_frac must be in (0, 1], got 0.0"),
        ({"max_frac": NAN}, "max_frac must be in (0, 1], got nan"),
        ({"is_symmetric": True}, "is_symmetric is a form of over='batch', got over='vocabulary'"),
    ],
)
def test_refuses_over_the_vocabulary(wrong, sentence):
    with pytest.raises(ValueError) as error:
        vocabulary(**wrong)
    assert str(error.value) == sentence


@pytest.mark.parametrize("mu", [0.0, -1.0, NAN, math.inf])
def test_refuses(mu):
    with pytest.raises(ValueError) as error:
        DiscriminatorClip(mu=mu)
    assert str(error.value) == f"mu must be positive and finite, got {mu}"


def test_values_without_a_spread_are_all_kept():
    # one token, D = 0.2 and its deviation 0: without the authors' guard D > mu * 0 would be dropped
    view, batch = card_step([[1]], [[math.log(0.1)]], [[math.log(0.1)]], [[-1.0]], [[0.5]])
    view = replace(view, over_vocab=lambda f: torch.zeros_like(view.logps))
    # S = 0.1 (log 0.1 + 0.5) = -0.18, N = 0
    assert dropped(DiscriminatorClip(over="vocabulary", max_frac=1.0, normalise_by="all"), view, batch) == []
    assert dropped(DiscriminatorClip(normalise_by="all"), view, batch) == []
