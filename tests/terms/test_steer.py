"""STEER against its card (arXiv:2510.10150): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.steer import Steer

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, surrogate, token_batch

NAN = math.nan
BOTH = pytest.mark.parametrize("statistics", ["step", "micro_batch"])
P, OLD, A = [0.90, 0.10, 0.50, 0.05], [0.80, 0.10, 0.50, 0.06], [1.0, 1.0, -1.0, -1.0]
H = [0.4, 1.5, 0.9, 1.2]


def logs(p: list[float]) -> list[float]:
    return [math.log(x) for x in p]


def the_card(p=P, old=OLD, advantages=A, entropy=H):
    """One response and one padded slot of NaN."""
    rows = ([*logs(p), NAN], [*logs(old), NAN], [*advantages, NAN], [*entropy, NAN])
    view, batch = card_step([[1] * len(p) + [0]], *([row] for row in rows))
    return view, replace(batch, clip_range=(0.2, 0.28))


def shaped(term: Steer, view, batch):
    """Advantages after both stages, and the token weights."""
    outcome = second_stage(term, batch, first_stage(term, view, {}), {})
    return outcome.advantages, outcome.metrics["link/weight"].values[batch.mask]


def printed(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """To the six digits that the card prints."""
    torch.testing.assert_close(actual, expected, atol=6e-7, rtol=0)


def test_the_cards_example():
    view, batch = the_card()
    advantages, weight = shaped(Steer(statistics="micro_batch"), view, batch)
    close(weight, printed(0.994811, 0.892812, 0.983897, 0.8))
    losses = surrogate(batch, batch.advantages)[batch.mask]
    close(losses, printed(-1.125, -1, 1, 0.833333))
    assert losses.mean().item() == pytest.approx(-0.072917, abs=6e-7)
    losses = surrogate(batch, advantages)[batch.mask]
    close(losses, printed(-1.119162, -0.892812, 0.983897, 0.666667))
    # over the number of tokens, not over the sum of the weights
    assert losses.mean().item() == pytest.approx(-0.090353, abs=6e-7)


def test_the_cards_linear_weights():
    view, batch = the_card()
    advantages, weight = shaped(Steer(weighting="linear", statistics="micro_batch"), view, batch)
    close(weight, printed(1.2, 1.001457, 1.179753, 0.8))
    assert surrogate(batch, advantages)[batch.mask].mean().item() == pytest.approx(-0.126259, abs=6e-7)


@BOTH
def test_the_cards_floor(statistics):
    # A is 100 times smaller, so m is, and M = 0.014216 < 0.02
    view, batch = the_card(advantages=[a / 100 for a in A])
    _, weight = shaped(Steer(statistics="micro_batch"), view, batch)
    close(weight, printed(0.996309, 0.922571, 0.988527, 0.853327))
    # with the scale at the floor it does not matter whose maximum lies below it
    assert torch.equal(shaped(Steer(statistics=statistics), view, batch)[1], weight)


def test_a_step_scales_by_the_largest_change_at_the_sampling_policy():
    view, batch = the_card()
    first = first_stage(Steer(), view, {})
    # o = 0.06 at the last token: 0.94 (ln 0.06 + 1.2) = 0.94 * -1.613411 = -1.516606
    assert first.metrics["link/largest_change"].item() == pytest.approx(1.516606, abs=6e-7)
    _, weight = shaped(Steer(), view, batch)
    # Omega of the card, at the current policy: w = 0.8 ** (m / 1.516606)
    m = (0.033147, 0.722327, 0.103426, 1.421621)
    close(weight, printed(*(0.8 ** (x / 1.516606) for x in m)))


def test_a_token_that_has_moved_beyond_the_scale_keeps_the_lowest_weight():
    # the sampling policy's largest m is 0.5 (ln 0.5 + 0.9) = 0.103426 of the first token
    p, old = [0.5, 0.05], [0.5, 0.5]
    for weighting in ("exponential", "linear"):
        view, batch = the_card(p, old, [1.0, 1.0], [0.9, 0.7])
        # now m of the second is 0.05 / 0.5 * 0.95 * |ln 0.05 + 0.7| = 0.218 > 0.103426
        assert shaped(Steer(weighting=weighting), view, batch)[1].tolist() == [pytest.approx(0.8), 0.8]


@BOTH
def test_the_authors_estimate_weighs_rare_tokens_most(statistics):
    p = [0.6, 0.25, 0.1, 0.05]
    entropy = -sum(x * math.log(x) for x in p)
    view, batch = the_card(p, p, [1.0] * 4, [entropy] * 4)
    m = (0.208915, 0.264885, 1.142524, 1.864487)  # the card's trap, signs aside: the exact change has 0.246 last
    close(shaped(Steer(statistics=statistics), view, batch)[1], printed(*(0.8 ** (x / 1.864487) for x in m)))


@BOTH
def test_raising_and_lowering_the_entropy_count_alike(statistics):
    weights = [shaped(Steer(statistics=statistics), *the_card(advantages=[s * a for a in A]))[1] for s in (1.0, -1.0)]
    assert torch.equal(*weights)


@BOTH
def test_the_entropy_is_that_of_the_sampling_policy(statistics):
    view, batch = the_card()
    moved = replace(batch, entropy=batch.entropy.detach() + 5)
    assert torch.equal(
        shaped(Steer(statistics=statistics), view, batch)[1], shaped(Steer(statistics=statistics), view, moved)[1]
    )


@BOTH
def test_an_outlier_flattens_the_others_unless_a_quantile_sets_the_scale(statistics):
    # m = 0.5 (ln 0.5 + 0.9) = 0.103426 four times, and a rare token of 0.999 |ln 0.001 + 0.9| * 10 = 60.017
    view, batch = the_card([0.5] * 4 + [0.001], [0.5] * 4 + [0.001], [1.0] * 4 + [10.0], [0.9] * 5)
    flat = shaped(Steer(statistics=statistics), view, batch)[1].tolist()
    assert flat == [pytest.approx(0.8 ** (0.103426 / 60.017), rel=1e-6)] * 4 + [pytest.approx(0.8)]
    # the quantile at 0.75 of five values is the fourth: all reach the lowest weight
    even = shaped(Steer(statistics=statistics, scale_level=0.75), view, batch)[1].tolist()
    assert even == [pytest.approx(0.8)] * 5


@BOTH
def test_equal_changes_get_the_middle_of_the_linear_range(statistics):
    view, batch = the_card([0.5] * 3, [0.5] * 3, [1.0, -1.0, 1.0], [0.9] * 3)
    term = Steer(weighting="linear", min_weight=0.5, max_weight=0.9, statistics=statistics)
    assert shaped(term, view, batch)[1].tolist() == [pytest.approx(0.7)] * 3


@BOTH
def test_a_certain_token_and_one_without_advantage_keep_their_weight(statistics):
    # m = 0 where p = 1 or A = 0; a probability that underflows counts as 1e-8 in p and in o, and stays finite
    view, batch = the_card([1.0, 0.3, 0.5], [1.0, 0.3, 0.5], [1.0, 0.0, 1.0], [0.0, 1.0, 0.9])
    weight = shaped(Steer(statistics=statistics), view, batch)[1].tolist()
    assert weight == [pytest.approx(1.0), 1.0, pytest.approx(0.8)]
    logps = torch.tensor([[-200.0, -300.0, math.log(0.5)]], dtype=torch.float64)
    view, batch = card_step([[1] * 3], logps.tolist(), logps.tolist(), [[1.0] * 3], [[1.0] * 3])
    # p = o = 1e-8: m = ln 1e-8 + 1 = 17.420681; the third has 0.5 (ln 0.5 + 1) = 0.153426
    weight = shaped(Steer(statistics=statistics), view, batch)[1].tolist()
    assert weight == pytest.approx([0.8, 0.8, 0.8 ** (0.153426 / 17.420681)])


@BOTH
def test_the_exact_estimate(statistics):
    # the card's trap: p = (0.6, 0.25, 0.1, 0.05), A = r = 1: -dH = S_a - N for each of the four as the sampled one
    p = [0.6, 0.25, 0.1, 0.05]
    entropy = -sum(x * math.log(x) for x in p)
    view, batch = the_card(p, p, [1.0] * 4, [entropy] * 4)
    table = torch.tensor([p] * 4 + [[NAN] * 4], dtype=torch.float64).log()
    view = replace(view, over_vocab=lambda functional: functional(table).unsqueeze(0))
    m = (0.165024, 0.236644, 0.275296, 0.246480)
    weight = shaped(Steer(estimate="exact", statistics=statistics), view, batch)[1]
    close(weight, printed(*(0.8 ** (x / 0.275296) for x in m)))
    # the ratio is that of now: a first token twice as likely has m = 0.330048, which the scale of the step lacks
    moved = replace(batch, logps=batch.logps.detach() + torch.tensor([math.log(2), 0, 0, 0, NAN]))
    weight = shaped(Steer(estimate="exact", statistics=statistics), view, moved)[1]
    scale = 0.275296 if statistics == "step" else 0.330048
    close(weight, printed(*(0.8 ** min(x / scale, 1) for x in (0.330048, *m[1:]))))


def test_the_vocabulary_is_read_only_where_it_is_asked_for():
    assert not Steer().needs_vocab and Steer(estimate="exact").needs_vocab


def by_the_card(batch, old_entropy, linear: bool) -> dict[tuple[int, int], float]:
    """The weights of the card's steps 1 to 5, token by token."""
    m = {}
    for b, row in enumerate(batch.mask.tolist()):
        for t in (t for t, counts in enumerate(row) if counts):
            p = min(max(math.exp(batch.logps[b, t].item()), 1e-8), 1 - 1e-8)
            o = min(max(math.exp(batch.old_logps[b, t].item()), 1e-8), 1)
            f = p * (1 - p) * (math.log(p) + old_entropy[b, t].item())
            m[b, t] = abs(batch.advantages[b, t].item() / o * f)
    low, high = min(m.values()), max(m.values())
    if linear:
        return {at: 1.2 - (x - low) * 0.4 / (high - low) for at, x in m.items()}
    k = -math.log(0.8) / max(high, 0.02)
    return {at: min(max(math.exp(-k * x), 0.8), 1) for at, x in m.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighting", ["exponential", "linear"])
def test_a_micro_batch_agrees_with_a_loop(seed, weighting):
    step, rows = make_step(seed, torch.float64), slice(2, 6)
    batch = token_batch(step, rows, columns={"entropy": step.old_entropy[rows]})
    advantages = Steer(weighting=weighting, statistics="micro_batch")(batch, {}).advantages
    for at, weight in by_the_card(batch, step.old_entropy[rows], weighting == "linear").items():
        assert advantages[at].item() == pytest.approx(weight * batch.advantages[at].item(), rel=1e-12)


def test_on_policy_both_statistics_agree():
    step = make_step(dtype=torch.float64)
    step = replace(step, logps=step.old_logps, entropy=step.old_entropy)
    whole, parity = (
        shaped(Steer(statistics=statistics), rollout(step), token_batch(step))[0]
        for statistics in ("step", "micro_batch")
    )
    assert torch.equal(whole, parity)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"min_weight": 0.0}, "min_weight must be in (0, 1], got 0.0"),
        ({"min_weight": NAN}, "min_weight must be in (0, 1], got nan"),
        ({"min_weight": 1.01}, "min_weight must be in (0, 1], got 1.01"),
        ({"max_weight": 0.5}, "max_weight must be finite and >= min_weight = 0.8, got 0.5"),
        ({"max_weight": math.inf}, "max_weight must be finite and >= min_weight = 0.8, got inf"),
        ({"floor": 0.0}, "floor must be positive and finite, got 0.0"),
        ({"scale_level": 0.0}, "scale_level must be in (0, 1], got 0.0"),
        ({"scale_level": 1.5}, "scale_level must be in (0, 1], got 1.5"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Steer(**wrong)
    assert str(error.value) == sentence


def test_a_rollout_that_was_not_scored_is_an_error():
    with pytest.raises(ValueError, match="not scored"):
        Steer().on_rollout(rollout(make_step(), entropy=None), {})
