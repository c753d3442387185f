"""F-GRPO against its card (arXiv:2602.06717): numbers, its place between no scaling and MaxRL, the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.focal import Focal

from ..term_batches import centred, first_stage, groups_view, make_step, rollout

NAN = math.nan


def shaped(*groups: list[float], **settings) -> list[float]:
    return first_stage(Focal(**settings), groups_view(*groups), {}, group_size=len(groups[0])).advantages.tolist()


@pytest.mark.parametrize(
    ("rewards", "gamma", "expected"),
    [
        ([1, 0, 0, 0], 0.5, [1.298778, *[-0.432926] * 3]),
        ([1, 0, 0, 0], 1.0, [1.124775, *[-0.374925] * 3]),
        ([1, 1, 1, 0], 0.5, [*[0.249950] * 3, -0.749850]),
        ([1, 1, 1, 0], 1.0, [*[0.124975] * 3, -0.374925]),
        ([1, 1, 1, 1], 0.5, [0.0] * 4),
        ([0, 0, 0, 0], 0.5, [0.0] * 4),
        ([1, 0, 0, 0], 0.0, [1.499700, *[-0.499900] * 3]),
    ],
)
def test_the_cards_worked_example(rewards, gamma, expected):
    assert shaped(rewards, gamma=gamma) == pytest.approx(expected, abs=5e-7)


def test_the_cards_four_prompts_shrink_to_two_thirds():
    groups = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    stock, after = shaped(*groups, gamma=0.0), shaped(*groups)
    assert sum(map(abs, after)) / sum(map(abs, stock)) == pytest.approx(0.683013, abs=5e-7)
    # rescaled: the factors .866025 and .5 over their mean .683013; a group with A = 0 has no part in it
    again = shaped(*groups, [1, 1, 1, 1], rescale=True)
    assert again[0] / stock[0] == pytest.approx(0.866025 / 0.683013, abs=2e-6)
    assert again[8] / stock[8] == pytest.approx(0.5 / 0.683013, abs=2e-6)
    assert shaped([1, 1, 1, 1], [0, 0, 0, 0], rescale=True) == [0.0] * 8


@pytest.mark.parametrize("right", [1, 2, 5, 7])
def test_with_gamma_a_half_the_mean_difference_weighs_one_over_the_root_of_p(right):
    """Of A with the population deviation: A_right - A_wrong = 1 / sqrt(p (1 - p)), times sqrt(1 - p)."""
    view, p = groups_view([1.0] * right + [0.0] * (8 - right)), right / 8
    view = replace(view, advantages=centred(view.rewards, 8) / math.sqrt(p * (1 - p)))
    after = first_stage(Focal(), view, {}, group_size=8).advantages
    assert (after[0] - after[-1]).item() == pytest.approx(1 / math.sqrt(p), rel=1e-12)


def test_what_nothing_scored_is_in_neither_count():
    assert shaped([1, 0, NAN, NAN]) == pytest.approx([x * math.sqrt(0.5) for x in shaped([1, 0, NAN, NAN], gamma=0.0)])
    assert shaped([NAN] * 4) == [0.0] * 4


def test_right_is_what_reaches_right_at():
    graded = [0.9, 0.5, 0.4, 0.0]
    stock = shaped(graded, gamma=0.0)
    assert shaped(graded, gamma=1.0) == pytest.approx([0.5 * a for a in stock])
    assert shaped(graded, gamma=1.0, right_at=0.4) == pytest.approx([0.25 * a for a in stock])
    minus = shaped([1, -1, -1, -1], gamma=1.0)
    assert minus == pytest.approx([0.75 * a for a in shaped([1, -1, -1, -1], gamma=0.0)])


def test_advantages_of_tokens_weigh_as_their_response():
    step = make_step()
    tokens = torch.arange(48.0).view(8, 6)
    after = Focal(gamma=1.0).on_rollout(rollout(step, advantages=tokens), {})
    # 1, 0, 0.5, 0 has two of four right, and so has 1, 1, 0.25, 0
    assert torch.equal(after.advantages, tokens * 0.5)
    assert after.metrics["weight"].item() == 0.5


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"gamma": -0.5}, "gamma must be finite and at least 0, got -0.5"),
        ({"gamma": NAN}, "gamma must be finite and at least 0, got nan"),
        ({"right_at": math.inf}, "right_at must be a finite reward, got inf"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Focal(**wrong)
    assert str(error.value) == sentence
