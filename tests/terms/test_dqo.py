"""DQO against its card (arXiv:2509.04784): numbers, determinants of numpy, and the traps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hclm_rl import build_chain
from hclm_rl.equations.gram import unexplained
from hclm_rl.terms.dqo import Dqo

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
PHI = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0]]
VOLUMES = [0.364643, 0.364643, 0.492476, 0.364643]


def group_of(states: list[list[float]], rewards: list[float], mask: list[int] | None = None):
    """One group of one-token responses whose hidden states are these."""
    slots = [[0.0]] * len(states)
    view, _ = card_step([[m] for m in mask or [1] * len(states)], slots, slots, slots)
    values = torch.tensor(rewards, dtype=torch.float64)
    hidden = torch.tensor(states, dtype=torch.float64).unsqueeze(1)
    return replace(
        view, rewards=values, group_rewards=values.expand(len(values), -1), hidden=lambda: hidden, texts=letters(states)
    )


def letters(states: list[list[float]]) -> list[str]:
    return [" ".join(map(str, state)) for state in states]


def paid(states: list[list[float]], rewards: list[float], mask: list[int] | None = None, **settings) -> list[float]:
    """What the term adds to the rewards."""
    view = group_of(states, rewards, mask)
    effect = Dqo(**settings).on_rollout(view, {})
    return (effect.rewards - view.rewards).tolist()


def embed(text: str) -> list[float]:
    """An embedder: the numbers of the text."""
    return [float(word) for word in text.split()]


def embed_badly(text: str) -> Tensor:
    return torch.zeros(len(text))


def test_the_cards_numbers():
    first = first_stage(Dqo(), group_of(PHI, [1, 1, 0, 0]), {})
    # printed to six digits: half of the last one
    assert first.rewards.tolist() == pytest.approx([1.364643, 1.364643, 0.492476, 0.364643], abs=5e-7)
    advantages = first.advantages / (first.rewards.std() + 1e-4)
    assert advantages.tolist() == pytest.approx([0.861857, 0.861857, -0.744160, -0.979554], abs=1e-6)
    leverage = 1 - unexplained(torch.tensor([PHI], dtype=torch.float64), 1.0)
    assert leverage.flatten().tolist() == pytest.approx([0.305556, 0.305556, 0.388889, 0.305556], abs=5e-7)


@pytest.mark.parametrize(
    "states, d",
    [(np.eye(4).tolist(), math.log(2)), ([[0.3, -0.4]] * 4, math.log(5 / 4))],  # orthonormal; copies
)
def test_the_ends_of_the_range(states: list, d: float):
    assert paid(states, [1, 0, 1, 0]) == pytest.approx([d] * 4)


def test_it_is_what_the_determinant_loses_without_the_response():
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    phi = (states / states.norm(dim=1, keepdim=True)).numpy()

    def log_det(rows: np.ndarray) -> float:
        return float(np.linalg.slogdet(rows @ rows.T + np.eye(len(rows)))[1])

    expected = [log_det(phi) - log_det(np.delete(phi, i, axis=0)) for i in range(5)]
    assert paid(states.tolist(), [0.0] * 5) == pytest.approx(expected)
    assert paid(states.tolist(), [0.0] * 5, alpha=0.5) == pytest.approx([0.5 * d for d in expected])


def test_an_embedder_of_ones_own_is_read_in_place_of_the_states():
    assert Dqo().needs_hidden and not Dqo(features=f"{__name__}.embed").needs_hidden
    view = replace(group_of([[1.0]] * 4, [1, 1, 0, 0]), texts=letters(PHI))
    effect = Dqo(features=f"{__name__}.embed").on_rollout(view, {})
    assert (effect.rewards - view.rewards).tolist() == pytest.approx(VOLUMES, abs=5e-7)


def test_only_right_ones_are_paid_where_asked():
    assert paid(PHI, [1, 0, 1, 0], right_only=True) == pytest.approx([0.364643, 0, 0.492476, 0], abs=5e-7)
    assert paid(PHI, [0.5, 0, 0, 0], right_only=True, right_at=0.5)[0] > 0


def test_centring_takes_off_what_all_share():
    states = [[100.0, 1.0, 0.0], [100.0, -1.0, 0.0], [100.0, 0.0, 1.0], [100.0, 0.0, -1.0]]
    plain, centred = paid(states, [0.0] * 4), paid(states, [0.0] * 4, centred=True)
    assert plain == pytest.approx([math.log(5 / 4)] * 4, abs=1e-3)  # nearly copies
    # two pairs of opposites: L = [[1, -1], [-1, 1]] twice, [(L + I)^-1]_ii = 2/3
    assert centred == pytest.approx([math.log(3 / 2)] * 4)
    assert paid([[2.0, 1.0]] * 4, [0.0] * 4, centred=True) == [0] * 4  # nothing is left of copies


def test_what_is_not_scored_or_has_no_token_is_not_there():
    three = paid(PHI[:3], [1.0, 1.0, 0.0])
    first = Dqo().on_rollout(group_of([*PHI[:3], [NAN] * 3], [1, 1, 0, 0], mask=[1, 1, 1, 0]), {})
    assert (first.rewards - torch.tensor([1, 1, 0, 0])).tolist() == pytest.approx([*three, 0])
    unscored = Dqo().on_rollout(group_of(PHI, [1, 1, 0, NAN]), {}).rewards
    alone, beside = paid(PHI[:3], [1, 1, 0], centred=True), paid(PHI, [1, 1, 0, NAN], centred=True)
    assert beside[:3] == pytest.approx(alone)
    assert unscored[:3].tolist() == pytest.approx([1 + three[0], 1 + three[1], three[2]]) and unscored[3].isnan()


def test_states_that_are_not_finite_are_said():
    with pytest.raises(ValueError, match="hidden states that it reads hold NaN or infinities"):
        Dqo().on_rollout(group_of([[NAN, 1.0], [1.0, 0.0]], [1, 0]), {})


def test_an_embedder_that_gives_no_vector_of_one_length():
    view = rollout(make_step())
    texts = ["a", "bb", *view.texts[2:]]
    with pytest.raises(ValueError, match=r"must give a vector of finite numbers as long as the first, 1, got .*\(2,\)"):
        Dqo(features=f"{__name__}.embed_badly").on_rollout(replace(view, texts=texts), {})


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"alpha": -1.0}, "alpha must be >= 0 and finite, got -1.0"),
        ({"features": "states"}, "no function that embeds a text at 'states': a dotted path is names with dots "),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"dqo": given}])
    assert str(caught.value).startswith(f"dqo: {sentence}")
