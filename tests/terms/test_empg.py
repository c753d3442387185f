"""EMPG against its card (arXiv:2509.09265): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.empg import Empg

from ..term_batches import WORDS, card_step, first_stage, make_step, rollout

NAN = math.nan
# two responses of two turns each, with a tool's token between; A = +1 and -1
MASK = [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]]
H = [[0.1, 0.3, NAN, 0.8, 0.8], [0.4, 0.6, NAN, 1.0, 1.4]]
ADVANTAGES = [[1.0] * 5, [-1.0] * 5]
CARD = [1.371521, 0.637525, -1.266797, -0.742249]


def shaped(term: Empg, mask, entropy, advantages):
    view, _ = card_step(mask, entropy, entropy, advantages, entropy)
    return first_stage(term, view, {})


def test_the_cards_example():
    first = shaped(Empg(zeta=0.1), MASK, H, ADVANTAGES)
    # printed to six digits: half of the last one
    for row, (one, two) in enumerate((CARD[:2], CARD[2:])):
        assert first.advantages[row].tolist() == pytest.approx([one, one, ADVANTAGES[row][0], two, two], abs=5e-7)
    assert first.metrics["link/largest_factor"].item() == pytest.approx(1.505169, abs=5e-7)
    assert first.metrics["link/steps"].item() == 2
    assert first.affected["link"].tolist() == torch.tensor(MASK).bool().tolist()


def test_a_response_without_a_reward_has_no_part():
    # the card's two responses, and a third that nobody scored, of steps far more and less certain than theirs
    mask, entropy = [*MASK, MASK[0]], [*H, [0.0, 0.0, NAN, 9.0, 9.0]]
    view, _ = card_step(mask, entropy, entropy, [*ADVANTAGES, [0.0] * 5], entropy)
    view = replace(view, rewards=torch.tensor([1.0, 0.0, NAN], dtype=torch.float64))
    shaped = Empg(zeta=0.1).on_rollout(view, {}).advantages
    assert shaped[:2, [0, 3]].flatten().tolist() == pytest.approx(CARD, abs=5e-7)
    assert shaped[2].tolist() == [0.0] * 5


def test_an_advantage_per_response_gives_the_same():
    view, _ = card_step(MASK, H, H, ADVANTAGES, H)
    view = replace(view, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64))
    first = first_stage(Empg(zeta=0.1), view, {})
    assert first.advantages[:, 0].tolist() == pytest.approx(CARD[::2], abs=5e-7)


def test_a_step_counts_once_whatever_its_length():
    # the last turn drawn out to three tokens of the same mean entropy: nothing changes
    mask, entropy = [[*MASK[0], 0], [1, 1, 0, 1, 1, 1]], [[*H[0], NAN], [0.4, 0.6, NAN, 1.0, 1.4, 1.2]]
    first = shaped(Empg(zeta=0.1), mask, entropy, [[1.0] * 6, [-1.0] * 6])
    assert first.advantages[1].tolist() == pytest.approx([CARD[2], CARD[2], -1.0, *[CARD[3]] * 3], abs=5e-7)
    assert first.advantages[0, 0].item() == pytest.approx(CARD[0], abs=5e-7)


def test_equal_entropies_leave_the_bonus_alone():
    # h = 0, so g = f = 1: A = 1 + zeta, 1, -1 + zeta, -1, less their mean zeta / 2
    first = shaped(Empg(zeta=0.1), MASK, [[0.7] * 5] * 2, ADVANTAGES)
    assert first.advantages[0].tolist() == pytest.approx([1.05, 1.05, 1, 0.95, 0.95], abs=1e-7)
    assert first.advantages[1].tolist() == pytest.approx([-0.95, -0.95, -1, -1.05, -1.05], abs=1e-7)


def test_a_group_without_advantage_gets_the_bonus_less_the_mean():
    # A = 0 everywhere: zeta f of the next step is 0.1 e^-0.6, 0, 0.1 e^-1, 0
    first = shaped(Empg(zeta=0.1), MASK, H, [[0.0] * 5] * 2)
    bonus = [0.1 * math.exp(-0.6), 0.0, 0.1 * math.exp(-1.0), 0.0]
    expected = [each - sum(bonus) / 4 for each in bonus]
    got = [first.advantages[row, column].item() for row in (0, 1) for column in (0, 3)]
    assert got == pytest.approx(expected, abs=1e-8)


def test_one_step_a_response_is_a_weight_of_the_response():
    # H = 0.2 and 1.0: h = 0, 1; g = 2 / (1 + e^-1), 2 e^-1 / (1 + e^-1); A = g, -g, less their mean
    first = shaped(Empg(), [[1, 1], [1, 0]], [[0.1, 0.3], [1.0, NAN]], [[1.0, 1.0], [-1.0, NAN]])
    g = [2 / (1 + math.exp(-1)), 2 * math.exp(-1) / (1 + math.exp(-1))]
    mean = (g[0] - g[1]) / 2
    assert first.advantages[0].tolist() == pytest.approx([g[0] - mean] * 2, abs=1e-7)
    assert first.advantages[1, 0].item() == pytest.approx(-g[1] - mean, abs=1e-7)


def test_a_delimiter_makes_steps_of_text():
    ids = torch.tensor([[WORDS.index(word) for word in ("so", ".", "then", "it", "is")]] * 2)
    view, _ = card_step([[1] * 5] * 2, *[[[0.0] * 5] * 2] * 3, [[0.1, 0.3, 0.8, 0.8, 0.8], [0.4, 0.6, 1.2, 1.2, 1.2]])
    view = replace(view, ids=ids, advantages=torch.tensor([1.0, -1.0], dtype=torch.float64))
    first = first_stage(Empg(zeta=0.1, delimiter="."), view, {})
    for row, (one, two) in enumerate((CARD[:2], CARD[2:])):
        assert first.advantages[row].tolist() == pytest.approx([one, one, two, two, two], abs=5e-7)
    assert first.metrics["link/steps"].item() == 2


def by_the_card(mask, entropy, advantages, k: float, k_next: float, zeta: float) -> dict[tuple[int, int], float]:
    """The card's steps 1 to 7 with lists."""
    steps = []  # of a trajectory: [(row, positions)]
    for counts in mask:
        runs = []
        for t, is_model in enumerate(counts):
            if is_model and (t == 0 or not counts[t - 1]):
                runs.append([])
            if is_model:
                runs[-1].append(t)
        steps.append(runs)
    means = [[sum(entropy[row][t] for t in run) / len(run) for run in runs] for row, runs in enumerate(steps)]
    everything = [value for row in means for value in row]
    low, high = min(everything), max(everything)
    h = [[(value - low) / (high - low + 1e-8) for value in row] for row in means]
    weights = [math.exp(-k * value) for row in h for value in row]
    norm = sum(weights) / len(weights) + 1e-8
    modulated = []
    for row, values in enumerate(h):
        following = [*(math.exp(-k_next * value) for value in values[1:]), *([0.0] if values else [])]
        modulated.append(
            [advantages[row] * math.exp(-k * v) / norm + zeta * f for v, f in zip(values, following, strict=True)]
        )
    flat = [value for row in modulated for value in row]
    centre = sum(flat) / len(flat)
    return {
        (row, t): modulated[row][step] - centre
        for row, runs in enumerate(steps)
        for step, run in enumerate(runs)
        for t in run
    }


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_a_loop(seed):
    step = make_step(seed, torch.float64)
    holes = torch.rand(step.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    step = replace(step, mask=step.mask & holes)
    term = Empg(k=1.7, k_next=0.6, zeta=0.2)
    shaped = term.on_rollout(rollout(step), {}).advantages
    expected = by_the_card(step.mask.tolist(), step.old_entropy.tolist(), step.advantages.tolist(), 1.7, 0.6, 0.2)
    assert len(expected) == step.mask.sum()
    for at, value in expected.items():
        assert shaped[at].item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"k": -1.0}, "k must be >= 0 and finite, got -1.0"),
        ({"k_next": math.inf}, "k_next must be >= 0 and finite, got inf"),
        ({"zeta": NAN}, "zeta must be >= 0 and finite, got nan"),
        ({"delimiter": ""}, "delimiter must be text of at least one character, or None for turns, got ''"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Empg(**wrong)
    assert str(error.value) == sentence
