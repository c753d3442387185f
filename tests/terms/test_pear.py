"""PEAR against its card (arXiv:2510.08026): numbers, a loop written from the definition, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.pear import Pear

from ..term_batches import card_step, first_stage, make_step, rollout

NAN = math.nan
TAG = 9
# the card's four responses; None stands for the closing tag, whose entropy is given apart
CARD = [
    [0.8, 0.6, 0.4, (0.1,), 0.05, 0.15],
    [0.3, 0.1, (0.02,), 0.4, 0.2],
    [0.5, 0.3],
    [1.2, 1.0, (0.0,), 0.2],
]


def responses(rows, rewards, **changes):
    """Stage 1's view of one group; an entropy in a tuple is that of a closing tag."""
    width = max(len(row) for row in rows) + 1
    filled = [[x[0] if isinstance(x, tuple) else x for x in row] + [NAN] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    view, _ = card_step(mask, filled, filled, filled, filled)
    ids = [[TAG if isinstance(x, tuple) else 1 for x in row] + [TAG] * (width - len(row)) for row in rows]
    values = torch.tensor(rewards, dtype=torch.float64)
    return replace(view, ids=torch.tensor(ids), advantages=torch.zeros_like(values), rewards=values, **changes)


def paid(rows, rewards, **settings) -> list[float]:
    """The rewards that stage 1 leaves."""
    term = Pear(**{"think_end": (TAG,), **settings})
    return first_stage(term, responses(rows, rewards), {}, group_size=len(rows)).rewards.tolist()


def test_the_cards_example():
    first = first_stage(Pear(think_end=(TAG,)), responses(CARD, [1.0, 1.0, 1.0, 0.0]), {})
    assert first.rewards.tolist() == pytest.approx([0.5, 1.0, 0.6, 0.0], rel=1e-12)
    assert first.rewards.mean().item() == pytest.approx(0.525)
    std = first.rewards.std()
    # printed to six digits: half of the last one
    assert std.item() == pytest.approx(0.411299, abs=5e-7)
    expected = [-0.060768, 1.154598, 0.182305, -1.276134]
    assert (first.advantages / (std + 1e-4)).tolist() == pytest.approx(expected, abs=5e-7)
    metrics = {name: value.item() for name, value in first.metrics.items()}
    # H_think 0.6, 0.2, 0.4, 1.1 and H_answer 0.1, 0.3, 0, 0.2
    assert metrics == {
        "link/closed": 0.75,
        "link/thinking_entropy": pytest.approx(2.3 / 4),
        "link/answer_entropy": pytest.approx(0.6 / 4),
    }


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"alpha": 0.0}, [0.4, 0.8, 0.6, 0.0]),  # the thinking phase alone
        ({"alpha": -1.0}, [0.3, 0.5, 0.6, 0.0]),  # both penalised
        ({"full": 1.5}, [1.0, 1.0, 1.0, 0.0]),  # 1.5 - 0.5, 1.5, 1.1: never above 1
        ({"full": 0.1, "wrong": -0.5}, [-0.4, 0.1, -0.3, -0.5]),  # no bound below
        ({"full": 0.1, "floor": 0.01}, [0.01, 0.1, 0.01, 0.0]),  # the floor is for correct answers
        ({"unclosed": "all_but_last"}, [0.5, 1.0, 0.5, 0.0]),  # the third one's thinking is its first token
    ],
)
def test_variants(settings, expected):
    assert paid(CARD, [1.0, 1.0, 1.0, 0.0], **settings) == pytest.approx(expected, rel=1e-12)


def test_an_uncertain_correct_answer_is_worth_less_than_a_wrong_one():
    # 1 - (1.8 - 0.1) = -0.7 < 0
    assert paid([[1.8, (0.0,), 0.1], [1.8, (0.0,), 0.1]], [1.0, 0.0]) == pytest.approx([-0.7, 0.0])


def test_an_empty_phase_counts_nothing():
    # the tag first: nothing was thought; the tag last: nothing offsets 0.4; no token: nothing at all
    assert paid([[(0.1,), 0.7], [0.4, (0.1,)], []], [1.0] * 3) == pytest.approx([1.0, 0.6, 1.0])


def test_the_first_tag_ends_the_thinking():
    # a second one is a token of the answer: 0.9 - (0.1 + 0.5) / 2
    assert paid([[0.9, (0.0,), 0.1, (0.5,)]], [1.0]) == pytest.approx([0.4])


def test_a_tag_of_several_tokens_is_whole_or_none():
    view = responses([[0.4, 0.2, 0.6, 0.8, 0.1], [0.4, 0.2, 0.6, 0.8, 0.1]], [1.0, 1.0])
    view = replace(view, ids=torch.tensor([[1, 7, 9, 1, 1, 0], [1, 7, 1, 9, 7, 9]]))
    rewards = first_stage(Pear(think_end=(7, 9)), view, {}, group_size=2).rewards.tolist()
    # first: 0.4 - 0.45 < 0; second: apart, and together only with the padding: 1 - the mean of all, 2.1 / 5
    assert rewards == pytest.approx([1.0, 0.58])


def test_a_tag_that_a_tool_wrote_closes_nothing():
    view = responses([[0.4, 0.9, 0.2]], [1.0])
    view = replace(view, ids=torch.tensor([[1, TAG, 1, 0]]), mask=torch.tensor([[True, False, True, False]]))
    assert first_stage(Pear(think_end=(TAG,)), view, {}, group_size=1).rewards.tolist() == pytest.approx([0.7])


def test_unscored_stays_unscored_and_partly_right_is_wrong():
    rewards = paid([[0.25]] * 3, [NAN, 0.5, 1.0])
    assert math.isnan(rewards[0]) and rewards[1:] == [0.0, 0.75]
    assert paid([[0.25]] * 2, [0.5, 0.4], correct_from=0.5) == [0.75, 0.0]


def test_ids_of_another_tokenizer_stop_the_run_at_once_and_only_then():
    rows, texts, memory = [[0.4, (0.1,), 0.2]] * 2, ["so </think> 4", "4"], {}
    with pytest.raises(ValueError) as error:
        Pear(think_end=(5,)).on_rollout(responses(rows, [1.0, 0.0], texts=texts), {})
    assert str(error.value) == (
        "1 responses hold '</think>' but none has the token ids think_end: give those of this model, "
        "tokenizer.encode('</think>', add_special_tokens=False)"
    )
    term = Pear(think_end=(TAG,))
    term.on_rollout(responses(rows, [1.0, 0.0], texts=texts), memory)
    assert memory == {"has_found": 1}
    term.on_rollout(responses([[0.4, 0.2]] * 2, [1.0, 0.0], texts=texts), memory)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed):
    view = rollout(make_step(seed, torch.float64))
    rewards = first_stage(Pear(think_end=(3,), alpha=0.5), view, {}).rewards.tolist()
    closed = 0
    for i, (ids, entropy) in enumerate(zip(view.ids.tolist(), view.entropy.tolist(), strict=True)):
        length = sum(view.mask[i].tolist())
        k = next((t for t in range(length) if ids[t] == 3), length)
        closed += k < length
        thinking, answer = entropy[:k], entropy[k + 1 : length]
        penalty = sum(thinking) / max(len(thinking), 1) - 0.5 * sum(answer) / max(len(answer), 1)
        correct = view.rewards[i].item() == 1
        assert rewards[i] == pytest.approx(min(1.0, 1.0 - max(0.0, penalty)) if correct else 0.0, rel=1e-12)
    assert closed  # or the test would say little


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"think_end": ()}, "think_end must be one or more token ids, got ()"),
        ({"think_end": (3, -1)}, "think_end must be one or more token ids, got (3, -1)"),
        ({"alpha": NAN}, "alpha must be finite, got nan"),
        ({"floor": math.inf}, "floor must be finite, got inf"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Pear(**wrong)
    assert str(error.value) == sentence
