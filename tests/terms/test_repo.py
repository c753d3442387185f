"""REPO-R against its card (arXiv:2603.11682): numbers, the controller, and the centred form."""

import math

import pytest

from hclm_rl import build_chain
from hclm_rl.terms.repo import Repo, doubled_or_halved

from ..term_batches import both_stages, card_step, make_step

NAN = math.nan
A, L = [1.0, 1.0, -1.0, -1.0], [-0.1, -4.0, -0.1, -4.0]


def shaped(**settings) -> list[float]:
    """The card's four tokens, a masked one and a padded slot, as one response."""
    slots = [[0.0] * 5 + [NAN]]
    _, batch = card_step([[1, 1, 1, 1, 1, 0]], [[*L, -2.0, NAN]], slots, [[*A, 0.0, 7.0]], [[1.5] * 5 + [NAN]])
    after = Repo(controls=False, **settings)(batch, {}).advantages
    assert after is not None and after[0, 4:].tolist() == [0.0, 7.0]
    return after[0, :4].tolist()


def test_the_cards_numbers():
    assert shaped(zeta=0.05) == pytest.approx([1.005, 1.2, -0.995, -0.8])
    assert shaped(zeta=0.3) == pytest.approx([1.03, 2.2, -0.97, 0])  # the last would be +0.2
    assert shaped(zeta=-0.3) == pytest.approx([0.97, 0, -1.03, -2.2])


def test_the_cards_controller():
    term, memory, found = Repo(target=0.3), {}, []
    for entropy in [0.2, 0.2, *[0.5] * 7, 0.2, 0.2]:
        term.on_step({"entropy": entropy}, memory)
        found.append(memory["zeta"])
    expected = [0.002, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.000125, -0.0001, -0.0002, -0.0001, 0.0001]
    assert found == pytest.approx(expected)


def test_zeta_is_bounded_and_stays_at_the_target():
    assert doubled_or_halved(0.04, 0.2, 0.3, minimum=1e-4, maximum=0.05) == 0.05
    assert doubled_or_halved(-0.04, 0.5, 0.3, minimum=1e-4, maximum=0.05) == -0.05
    assert doubled_or_halved(0.04, 0.3, 0.3, minimum=1e-4, maximum=0.05) == 0.04


def test_the_target_is_the_entropy_of_the_first_step():
    term, memory = Repo(), {}
    for entropy in (math.inf, 0.0, 1.0, 0.9, 1.1):  # of the first two nothing is known
        term.on_step({"entropy": entropy}, memory)
    assert memory == {"target": 1.0, "zeta": 0.001}  # as it was, doubled, halved
    batch, after, asked = both_stages(term, make_step(), memory={"zeta": 0.5, "target": 1.0})
    assert asked.metrics["link/zeta"].item() == 0.5
    pairs = zip(batch.advantages[batch.mask].tolist(), batch.logps[batch.mask].tolist(), strict=True)
    expected = [a * max(1 - 0.5 * logp if a > 0 else 1 + 0.5 * logp, 0) for a, logp in pairs]
    assert after[batch.mask].tolist() == pytest.approx(expected)


def test_a_fixed_zeta_does_not_follow():
    memory: dict = {}
    Repo(controls=False).on_step({"entropy": 1.0}, memory)
    assert memory == {}


def test_the_centred_form():
    # l + H = [1.4, -2.5, 1.4, -2.5] at H = 1.5
    assert shaped(zeta=0.1, form="centred") == pytest.approx([0.86, 1.25, -1.14, -0.75])


def test_the_mean_factor_of_each_side_is_logged():
    slots = [[0.0] * 4]
    _, batch = card_step([[1] * 4], [L], slots, [A], slots)
    metrics = Repo(controls=False, zeta=0.05)(batch, {}).metrics
    factors = {name: metrics[name].form(*map(float, metrics[name].sums)) for name in ("right_factor", "wrong_factor")}
    # (1.005 + 1.2) / 2 and (0.995 + 0.8) / 2
    assert factors == pytest.approx({"right_factor": 1.1025, "wrong_factor": 0.8975})


def test_what_it_seeks():
    assert Repo().seeks == "level"
    assert Repo(controls=False).seeks == "more" and Repo(controls=False, zeta=-0.1).seeks == "less"


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"zeta": 0.0}, "zeta must be finite and not 0, got 0.0"),
        ({"zeta": 0.1}, "0 < minimum <= |zeta| <= maximum must hold, got minimum 0.0001, zeta 0.1, maximum 0.05"),
        ({"form": "centred"}, "the form 'centred' has a fixed zeta: set controls: false"),
        ({"target": -1.0}, "target must not be negative, got -1.0"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"repo": given}])
    assert str(caught.value) == f"repo: {sentence}"


def test_what_a_changed_recipe_says_holds_and_not_what_the_memory_has():
    _, batch = card_step([[1, 1]], [[-0.1, -4.0]], [[0.0, 0.0]], [[1.0, -1.0]])
    memory = {"zeta": 0.03, "target": 0.9}
    assert Repo(controls=False)(batch, memory).metrics["zeta"].item() == pytest.approx(0.001)
    assert Repo()(batch, memory).metrics["zeta"].item() == pytest.approx(0.03)
    Repo(target=0.1).on_step({"entropy": 0.5}, memory)  # above the recipe's target, below the first step's entropy
    assert memory["zeta"] == pytest.approx(0.015)
