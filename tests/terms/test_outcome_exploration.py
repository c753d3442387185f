"""Outcome-based exploration against its card (arXiv:2509.06941): numbers, memory of the run, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.terms.outcome_exploration import OutcomeExploration

from ..term_batches import Processes, card_step, first_stage, make_step, rollout

NAN = math.nan


def group_of(answers: list[str], rewards: list[float] | None = None, prompt: str | list = "2 + 2 = ?"):
    """Stage 1's view of one group; "" is a response without an answer."""
    slots = [[0.0]] * len(answers)
    view, _ = card_step([[1]] * len(answers), slots, slots, slots, slots)
    values = torch.tensor(rewards or [0.0] * len(answers), dtype=torch.float64)
    texts = [rf"it is \boxed{{{answer}}}" if answer else "hm" for answer in answers]
    scored = values[~values.isnan()]
    scale = scored.std() + 1e-4 if len(scored) > 1 else torch.ones((), dtype=torch.float64)
    return replace(
        view,
        rewards=values,
        group_rewards=values.expand(len(values), -1),
        advantages=torch.nan_to_num((values - scored.mean()) / scale),
        texts=texts,
        prompts=[prompt] * len(answers),
    )


def added(
    answers: list[str], memory: dict | None = None, rewards: list[float] | None = None, **settings
) -> list[float]:
    """What the term adds to the advantages."""
    view = group_of(answers, rewards)
    effect = OutcomeExploration(**settings).on_rollout(view, {} if memory is None else memory)
    return (effect.advantages - view.advantages).tolist()


def asked(answers: list[str], times: int, memory: dict) -> None:
    """The same group of answers so many times."""
    for _ in range(times):
        OutcomeExploration().on_rollout(group_of(answers), memory)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"baseline": "none"}, [0.333333, 0.333333, 1, 1]),
        ({"baseline": "mean"}, [-0.444444, -0.444444, 0.444444, 0.444444]),
        ({"baseline": "constant", "b0": 0.5}, [-0.166667, -0.166667, 0.5, 0.5]),
        ({"baseline": "constant", "b0": 1.0}, [-0.666667, -0.666667, 0, 0]),
    ],
)
def test_the_cards_history(settings: dict, expected: list[float]):
    # 7 came seven times before; with this group N = [9, 9, 1, 1]. Printed to six digits
    memory: dict = {}
    asked(["7"], 7, memory)
    assert added(["7", "7", "3", "5"], memory, c=1.0, **settings) == pytest.approx(expected, abs=5e-7)


def test_the_cards_batch():
    # each 7 has two copies among three others: -2/3
    assert added(["7", "7", "7", "3"], by="batch") == pytest.approx([-0.133333] * 3 + [0], abs=5e-7)
    effect = OutcomeExploration(by="batch").on_rollout(group_of(["7", "7", "7", "3"], [1.0, 1.0, 1.0, 0.0]), {})
    assert effect.advantages.tolist() == pytest.approx([0.366567] * 3 + [-1.499700], abs=5e-7)
    assert effect.metrics["flipped"].sum() == 0 and effect.metrics["empty"] == 0


def test_signs_that_the_bonus_turns_are_counted():
    # A = +-0.86595, b = [0, -1/3, -1/3, 0]; c 3 takes 1 from the right 7
    effect = OutcomeExploration(by="batch", c=3.0).on_rollout(group_of(["3", "7", "7", "5"], [1.0, 1.0, 0.0, 0.0]), {})
    assert effect.metrics["flipped"].flatten().tolist() == [0, 1, 0, 0]


def test_a_prompt_has_its_own_counts_whatever_its_place():
    memory: dict = {}
    asked(["7"], 8, memory)
    view = group_of(["7", "3"], prompt=[{"role": "user", "content": "2 + 2 = ?"}])
    effect = OutcomeExploration(baseline="none", c=1.0).on_rollout(view, memory)
    assert effect.advantages.tolist() == [1, 1]  # a chat is another prompt than a text
    assert added(["7", "3"], memory, baseline="none", c=1.0) == pytest.approx([1 / 3, 1])  # N = 9
    assert sorted(sum(counts.values()) for counts in memory["counts"].values()) == [2, 10]


def test_no_answer_has_no_part():
    for by in ("history", "batch"):
        effect = OutcomeExploration(by=by).on_rollout(group_of(["", "", "4", ""]), {})
        assert effect.advantages.tolist() == [0] * 4  # nor has an answer that stands alone
        assert effect.metrics["empty"] == 0.75
    # of the others alone: 4 twice, 5 once: 1/sqrt 2 against the mean of (1/sqrt 2, 1)
    r = 1 / math.sqrt(2)
    expected = [0, r - (r + 1) / 2, r - (r + 1) / 2, 1 - r]
    assert added(["", "4", "4", "5"], c=1.0) == pytest.approx(expected)


def test_an_unscored_response_is_not_counted():
    memory: dict = {}
    assert added(["4", "4", "5"], memory, [NAN, 0.0, 0.0], baseline="none", c=1.0) == [0, 1, 1]
    assert list(memory["counts"].values()) == [{"4": 1, "5": 1}]


def test_a_settled_group_is_left_alone():
    right = [1.0] * 4
    assert added(["4"] * 4, by="batch", rewards=right) == [0] * 4
    assert added(["4", "4", "4", ""], by="batch", rewards=[1.0, 1.0, 1.0, 0.0]) == [0] * 4
    assert added(["4"] * 4, by="batch", rewards=right, skips_settled=False) == pytest.approx([-0.2] * 4)
    assert added(["4"] * 4, by="batch") == pytest.approx([-0.2] * 4)  # one answer, and wrong
    assert added(["4", "4", "5", "5"], by="batch", rewards=right) == pytest.approx([-0.2 / 3] * 4)  # two right ones
    assert added(["4"] * 4, by="batch", rewards=[0.5] * 4, right_at=0.5) == [0] * 4


def test_answers_by_text_and_by_equivalence():
    pytest.importorskip("math_verify")
    memory: dict = {}
    asked(["1/2"], 3, memory)
    settings = {"baseline": "none", "c": 1.0}
    assert added(["0.5", "3"], dict(memory), **settings) == [1, 1]
    assert added(["0.5", "3"], dict(memory), equivalence="math_verify", **settings) == [0.5, 1]  # N = 4


def test_the_commonest_answers_are_kept():
    memory: dict = {}
    term = OutcomeExploration(capacity=2)
    for answers in (["4", "5", "5", "6"], ["6", "4", "5", "7"]):
        term.on_rollout(group_of(answers), memory)
    # after the first group 5 and, of equals, 4 stay; then 4: 2, 5: 3, 6: 1, 7: 1
    assert list(memory["counts"].values()) == [{"4": 2, "5": 3}]
    # 6 and 7 are new again
    effect = OutcomeExploration(baseline="none", c=1.0).on_rollout(group_of(["6", "5"]), memory)
    assert effect.advantages.tolist() == [1, 0.5]


def test_the_counts_are_those_of_all_processes():
    step = make_step()
    alone, both, processes = {}, [{}, {}], Processes(2)
    first_stage(OutcomeExploration(), rollout(step), alone)
    views = processes.views(step, [6, 5])
    processes.run(lambda rank: first_stage(OutcomeExploration(), views[rank], both[rank]))
    # one prompt; answers 0 1 2 0 and 1 2 0 1
    assert alone["counts"] == both[0]["counts"] == both[1]["counts"]
    assert list(alone["counts"].values()) == [{"0": 3, "1": 3, "2": 2}]


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"c": -0.1}, "c must be >= 0 and finite, got -0.1"),
        ({"b0": 1.5}, "b0 must be in [0, 1], as the bonus of a count is, got 1.5"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"answer": "(a)(b)"}, "answer must have one group, which holds the answer, got '(a)(b)' with 2"),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError) as caught:
        build_chain([{"outcome_exploration": given}])
    assert str(caught.value) == f"outcome_exploration: {sentence}"


def test_graded_rewards_are_told_of_once(caplog: pytest.LogCaptureFixture):
    memory: dict = {}
    for _ in range(2):
        OutcomeExploration().on_rollout(group_of(["4", "5"], [0.5, 0.0]), memory)
    assert caplog.text.count("set right_at, the reward from which a response is right") == 1
