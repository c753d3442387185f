"""UCPO against its card (arXiv:2605.00365): numbers, a loop written from the definition, the traps."""

import math
import random

import pytest
import torch

from hclm_rl.terms.uniform_correct import UniformCorrect, among, factors

from ..term_batches import first_stage, groups_view, make_step, rollout

NAN = math.nan
MEANS = [-0.1, -0.4, -1.0, -0.7]


def shaped(rewards: list[float], logps: list[list[float]], **settings) -> list[float]:
    view = groups_view(rewards, logps=logps)
    return first_stage(UniformCorrect(**settings), view, {}, group_size=len(rewards)).advantages.tolist()


def test_the_cards_shares():
    x, right = torch.tensor([MEANS], dtype=torch.float64), torch.tensor([[True, True, True, False]])
    q = among(x, right).exp()[0, :3]
    assert q.tolist() == pytest.approx([0.465682, 0.344986, 0.189332], abs=5e-7)
    a = torch.full_like(x, 0.4999)
    for tau, scale, shares in (
        (0.2, 1, [0.924754, 0.968400, 1.106846]),
        (1.0, 1, [0.623770, 0.842002, 1.534228]),
        (0.2, 10, [0.800074, 0.801483, 1.398443]),
    ):
        assert factors(scale * x, a, right, tau)[0].tolist() == pytest.approx([*shares, 1], abs=6e-7)


@pytest.mark.parametrize("length", [1, 3])
def test_the_cards_advantages(length):
    rows = [[x + 0.05, x - 0.05, x][-length:] for x in MEANS]  # means over tokens
    assert shaped([1, 1, 1, 0], rows) == pytest.approx([0.462285, 0.484103, 0.553312, -1.499700], abs=6e-7)
    assert shaped([1, 1, 1, 0], rows, tau=1.0) == pytest.approx([0.311823, 0.420917, 0.766960, -1.4997], abs=6e-7)


def test_the_cards_sums_over_tokens():
    rows = [[x] * 10 for x in MEANS]
    after = shaped([1, 1, 1, 0], rows, per_token=False)
    assert after == pytest.approx([0.4999 * share for share in (0.800074, 0.801483, 1.398443)] + [-1.4997], abs=6e-7)


@pytest.mark.parametrize("rewards", [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, NAN, NAN]])
def test_without_two_right_ones_that_are_paid_nothing_changes(rewards):
    rows = [[x] for x in MEANS]
    assert shaped(rewards, rows, alpha=1.0) == groups_view(rewards, logps=rows).advantages.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_loop(seed):
    source = random.Random(seed)
    rewards = [1.0, 1.0, 0.0, 0.0] + [source.choice([0.0, 0.7, 1.0]) for _ in range(4)]
    rows = [[-source.expovariate(1) for _ in range(source.randint(1, 6))] for _ in rewards]
    before = groups_view(rewards, logps=rows).advantages.tolist()
    after = shaped(rewards, rows, tau=0.6, alpha=0.3)
    x = [sum(row) / len(row) for row in rows]
    right = [i for i in range(8) if rewards[i] >= 0.5 and before[i] > 0]
    z = sum(math.exp(x[i]) for i in right)
    t = {i: z / math.exp(x[i]) for i in right}
    paid = {i: before[i] * (0.4 + 0.6 * len(right) * t[i] / sum(t.values())) for i in right}
    scale = sum(before[i] for i in right) / sum(paid.values())
    wrong = [i for i in range(8) if rewards[i] < 0.5]
    q = {j: math.exp(x[j]) / sum(math.exp(x[i]) for i in wrong) for j in wrong}
    entropy = -sum(each * math.log(each) for each in q.values())
    for i in range(8):
        expected = before[i]
        if i in right:
            expected = scale * paid[i]
        if i in wrong:
            expected = before[i] - 0.3 * max(0.0, -math.log(q[i]) - entropy)
        assert after[i] == pytest.approx(expected, abs=1e-12)
    assert sum(after[i] for i in right) == pytest.approx(sum(before[i] for i in right), rel=1e-12)


def test_the_floor_makes_the_rarest_equal():
    # q of 1, e^-20 and e^-30: both rare ones lie below 1e-6, so their shares are equal
    x, right = torch.tensor([[0.0, -20.0, -30.0]], dtype=torch.float64), torch.ones(1, 3).bool()
    found = factors(x, torch.ones_like(x), right, 1.0)[0].tolist()
    assert found[1] == found[2] == pytest.approx(1.5, rel=1e-6)


def test_copies_keep_a_share_each_and_a_response_without_tokens_its_advantage():
    rows = [[-0.1], [-0.1], [], [-1.0], [-1.0]]
    before = groups_view([1, 1, 1, 1, 0], logps=rows).advantages.tolist()
    after = shaped([1, 1, 1, 1, 0], rows)
    assert after[0] == after[1] < after[3] and after[2] == before[2]
    assert sum(after) == pytest.approx(sum(before), abs=1e-12)


def test_advantages_of_tokens_weigh_as_their_response():
    step = make_step()
    whole = UniformCorrect().on_rollout(rollout(step), {})
    tokens = step.advantages.unsqueeze(1).expand(8, 6)
    after = UniformCorrect().on_rollout(rollout(step, advantages=tokens), {}).advantages
    torch.testing.assert_close(after[:, 0], whole.advantages)
    assert not torch.equal(whole.advantages, step.advantages)


def test_what_is_favoured_is_logged():
    effect = first_stage(
        UniformCorrect(), groups_view([1, 1, 0], [0, 0, 1], logps=[[-0.5], [-1.0] * 4, [-2.0]] * 2), {}
    )
    logged = {name: value.item() for name, value in effect.metrics.items()}
    assert (logged["link/groups"], logged["link/favoured_length"]) == (0.5, 4.0)
    assert logged["link/favoured_perplexity"] == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tau": 1.5}, "tau must be in [0, 1], got 1.5"),
        ({"tau": NAN}, "tau must be in [0, 1], got nan"),
        ({"alpha": -1.0}, "alpha must be finite and at least 0, got -1.0"),
        ({"right_at": NAN}, "right_at must be a finite reward, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        UniformCorrect(**wrong)
    assert str(error.value) == sentence
