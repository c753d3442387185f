"""The right-answer anchor against its card: numbers, a loop, the store's rules, and the traps."""

import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hclm_rl.responses.right_answers import kept_in
from hclm_rl.terms.right_anchor import PATIENCE, RightAnchor

from ..term_batches import (
    Step,
    card_step,
    first_stage,
    make_step,
    reading,
    rollout,
    second_stage,
    token_batch,
    transcript_of,
)

FIRST = [-3.0, -5.0]  # the card's l_0, of 4 and 5 tokens
NOW = [-2.5, -6.0]
LENGTHS = [4, 5]


def spread_over(sums: list[float]) -> torch.Tensor:
    """(2, 5): each sum in equal parts over its response's tokens."""
    rows = [[x / n] * n + [0.0] * (5 - n) for x, n in zip(sums, LENGTHS, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def the_cards_batch(now: torch.Tensor, numbers: list[int], passes: list | None = None):
    """Rows of one token each, the first of which replay the stored answers `numbers`."""
    _, batch = card_step([[1]] * len(numbers), [[0.0]] * len(numbers), [[0.0]] * len(numbers), [[0.0]] * len(numbers))
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    text = transcript_of(torch.zeros(2, 5, dtype=torch.long), mask)
    shared = {
        **vars(text),
        "mask": mask,
        "logps": spread_over(FIRST),
        "weight": torch.tensor(len(numbers) / 9, dtype=torch.float64),
    }

    def score(asked, scorer="policy"):
        read = [LENGTHS.index(n) for n in asked.present.sum(dim=1).tolist()]
        assert len(set(read)) == len(read) and set(read) <= set(numbers)  # no more texts than those that rows replay
        passes.append((read, torch.is_grad_enabled()))
        return now[read, : asked.ids.size(1)], None

    passes = [] if passes is None else passes
    return replace(batch, columns={"replay": torch.tensor(numbers)}, shared=shared, score=score)


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        ({}, 1 / 9, (0.0, -1 / 9)),
        ({"margin": 1.0}, 0.0, (0.0, 0.0)),
        ({"hinge": False}, 8.5 / 9, (-1 / 9, -1 / 9)),
        # by token: 4 of -.625 that were -.75, 5 of -1.2 that were -1: 5 * .2
        ({"unit": "token"}, 1 / 9, (0.0, -1 / 9)),
        ({"unit": "token", "margin": 0.15}, 0.25 / 9, (0.0, -1 / 9)),
    ],
)
def test_the_cards_worked_example(settings, loss, slopes):
    now = spread_over(NOW).requires_grad_()
    batch = the_cards_batch(now, [0, 1])
    found = RightAnchor(**settings)(batch, {}).loss[batch.mask].mean()
    assert found.item() == pytest.approx(loss, abs=1e-9)
    found.backward()
    gradient = torch.zeros(2, 5) if now.grad is None else now.grad
    for row, (slope, n) in enumerate(zip(slopes, LENGTHS, strict=True)):
        assert gradient[row].tolist() == pytest.approx([slope] * n + [0.0] * (5 - n), abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [([0, 1], False), ([1], True)]),  # the first answer has become more likely
        ({"margin": 1.0}, [([0, 1], False), ([0], True)]),  # none lies below: one is read, so that all processes read
        ({"unit": "token"}, [([0, 1], True)]),
        ({"hinge": False}, [([0, 1], True)]),
    ],
)
def test_only_what_lies_below_its_floor_is_read_with_gradient(settings, expected):
    passes: list = []
    RightAnchor(**settings)(the_cards_batch(spread_over(NOW), [0, 1], passes), {})
    assert passes == expected


def test_what_is_drawn_twice_is_read_once_and_counts_twice():
    now = spread_over(NOW).requires_grad_()
    batch = the_cards_batch(now, [1, -1, 0, 1])  # `score` refuses a third row
    asked = RightAnchor()(batch, {})
    # the second answer twice: losses 1, 1 and 0, times weight 4/9, in a mean over four tokens
    assert asked.loss[batch.mask].mean().item() == pytest.approx(2 / 9)
    assert asked.affected.flatten().tolist() == [True, False, False, True]
    lost, nats = (asked.metrics[name].form(*(x.item() for x in asked.metrics[name].sums)) for name in ("lost", "nats"))
    assert lost == pytest.approx(2 / 3) and nats == pytest.approx(2 / 3)
    asked = RightAnchor()(the_cards_batch(now, [1, -1, 1]), {})  # the first answer is not read
    assert asked.loss.flatten().tolist() == pytest.approx([3 / 9, 0.0, 3 / 9])


@pytest.mark.parametrize("unit", ["response", "token"])
def test_rounding_is_no_loss_and_so_has_no_gradient(unit):
    """A policy that has not moved is read in batches of another width, and half of its replays seem to be lost."""
    for nudge, is_lost in ((2e-6, False), (2e-4, True)):
        now = torch.where(spread_over(FIRST) != 0, spread_over(FIRST) - nudge, 0.0).requires_grad_()
        asked = RightAnchor(unit=unit)(the_cards_batch(now, [0, 1]), {})
        asked.loss.sum().backward()
        assert bool(now.grad.any()) == is_lost and bool(asked.affected.any()) == is_lost
        seen, replays = (each.item() for each in asked.metrics["lost"].sums)
        assert seen == (2 if is_lost else 0) and replays == 2


def remembering(step: Step, term: RightAnchor) -> dict:
    """A memory that has seen another step of the same prompts."""
    memory: dict = {}
    first_stage(term, replace(rollout(step), step=2), memory)
    return memory


@pytest.mark.parametrize("source", ["prompt", "any"])
@pytest.mark.parametrize("unit", ["response", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_a_loop(seed, unit, source):
    before, step = make_step(seed + 20, torch.float64), make_step(seed, torch.float64)
    term = RightAnchor(source=source, unit=unit, margin=0.1)
    memory = remembering(before, term)
    first = first_stage(term, rollout(step), memory)
    batch = replace(token_batch(step), score=lambda text, scorer="policy": (reading(text, step.head), None))
    outcome = second_stage(term, batch, first, memory)
    numbers, shared = (
        first.columns["link/replay"].tolist(),
        {k.removeprefix("link/"): v for k, v in first.shared.items()},
    )
    total, tokens = 0.0, 0
    own = {tuple(before.ids[i][before.mask[i]].tolist()): i for i in (0, 4, 5)}  # the right ones: reward 1
    for row, number in enumerate(numbers):
        assert number >= 0  # both prompts had a right one
        ids = shared["ids"][number][shared["mask"][number]]
        which = own[tuple(ids.tolist())]
        assert source == "any" or which // 4 == row // 4  # of the row's own prompt
        text = transcript_of(before.ids, before.mask, torch.arange(8) // 4)
        now = reading(text, step.head)[which][before.mask[which]]
        gaps = before.old_logps[which][before.mask[which]] - now
        tokens += len(ids)
        if unit == "token":
            total += sum(max(0.0, gap.item() - 0.1) for gap in gaps)
        else:
            total += max(0.0, gaps.sum().item() - 0.1)
    assert total > 0
    # log-probs are kept in float32
    assert outcome.losses["link"][batch.mask].mean().item() == pytest.approx(total / tokens, rel=1e-5)


def test_where_nothing_right_is_lost_there_is_no_gradient():
    step = make_step(dtype=torch.float64)
    term = RightAnchor()
    memory = remembering(step, term)
    first = first_stage(term, rollout(step), memory)
    shift = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    batch = replace(token_batch(step), score=lambda text, scorer="policy": (0 * reading(text, step.head) + shift, None))
    loss = second_stage(term, batch, first, memory).losses["link"].sum()
    loss.backward()
    assert loss.item() == 0 and shift.grad.item() == 0


def test_a_step_replays_what_earlier_steps_left_and_nothing_of_its_own():
    term, memory = RightAnchor(), {}
    first = first_stage(term, rollout(make_step()), memory)
    assert first.columns == {} and first.metrics["link/replayed"] == 0
    assert first.metrics["link/kept"] == 3 and first.metrics["link/prompts"] == 2  # three rewards of 1
    again = first_stage(term, rollout(make_step(1)), memory)
    assert again.metrics["link/replayed"] == 8 and again.metrics["link/kept"] == 6
    kept = kept_in(memory)
    # 28 bytes each, 4 a token of its prompt (four and three tokens there), 9 a token of its own (6, 5, 2 of each step)
    assert again.metrics["link/bytes"] == kept.bytes() == 6 * 28 + 4 * 2 * (4 + 3 + 3) + 9 * 2 * (6 + 5 + 2)
    # the same responses again are no different ones
    assert first_stage(term, rollout(make_step(1)), memory).metrics["link/kept"] == 6


def test_capacity_and_share():
    term, memory = RightAnchor(capacity=1, share=0.4, source="any"), {}
    for seed in range(4):
        first = first_stage(term, rollout(make_step(seed)), memory)
    assert kept_in(memory).step.tolist() == [3, 3] and first.metrics["link/kept"] == 2
    assert first.metrics["link/replayed"] == 4  # 0.4 of 8 rows, rounded up
    assert (first.columns["link/replay"] >= 0).sum() == 4


def test_what_is_drawn_is_uniform_over_the_answers_of_the_prompt():
    term, memory = RightAnchor(), {}
    for seed in range(3):  # three answers of the first prompt, six of the second
        first_stage(term, rollout(make_step(seed)), memory)
    kept = kept_in(memory)
    for prompt, answers in ((kept.prompt[0], 3), (kept.prompt[1], 6)):
        counts = torch.zeros(9)
        for seed in range(300):
            view = replace(rollout(make_step(3)), generator=torch.Generator().manual_seed(seed))
            drawn = term.draw(view, kept, prompt.repeat(8), torch.ones(8).bool())
            counts += torch.bincount(drawn, minlength=9)
        own, mean = counts[kept.prompt == prompt], 2400 / answers
        # 2400 draws; the deviation of a count is sqrt(mean (1 - 1 / answers))
        assert len(own) == answers and own.sum() == 2400
        assert ((own - mean).abs() < 4 * math.sqrt(mean * (1 - 1 / answers))).all()


def test_rows_without_tokens_replay_nothing():
    step, term = make_step(), RightAnchor(source="any")
    memory = remembering(step, term)
    first = first_stage(term, rollout(replace(step, mask=step.mask & (torch.arange(8) < 5).unsqueeze(1))), memory)
    assert (first.columns["link/replay"][5:] == -1).all() and first.metrics["link/replayed"] == 5


def test_different_by_answer():
    texts = [rf"so \boxed{{{i % 2}}}" for i in range(8)]
    rewards = torch.ones(8)
    for distinct, kept in (("tokens", 8), ("answer", 4)):  # two answers to each of two prompts
        memory: dict = {}
        view = replace(rollout(make_step()), texts=texts, rewards=rewards)
        first_stage(RightAnchor(distinct=distinct), view, memory)
        assert len(kept_in(memory)) == kept
    # what has no answer counts by its tokens
    memory = {}
    first_stage(RightAnchor(distinct="answer"), replace(view, texts=["?"] * 8), memory)
    assert len(kept_in(memory)) == 8


def test_the_spread_of_states_chooses_who_stays():
    step, term, memory = make_step(), RightAnchor(keep="log_det", capacity=2), {}
    view = replace(rollout(step), rewards=torch.ones(8), step=0)
    place = torch.tensor([0.0, 1.0, 10.0, 10.5, 5.0, 5.0, 5.0, 5.0])
    states = place.view(8, 1, 1).expand(8, 6, 1)
    first_stage(term, replace(view, hidden=lambda layer=-1: states), memory)
    kept = kept_in(memory)
    # 0, 1, 10, 10.5: 1 and 10 are the nearest to the mean of those left; of four copies the first two stay
    assert kept.states.flatten().tolist() == [0.0, 10.5, 5.0, 5.0]


def test_what_was_sampled_most_often_gives_way():
    term, memory = RightAnchor(keep="count", capacity=2), {}
    stays, seen = [], {}  # tokens: (step, row)
    for seed, said in enumerate(("aabcxxxy", "cccaxxxx", "bbbbyyyy")):  # four rows of either prompt
        view = replace(rollout(make_step(seed)), texts=[rf"\boxed{{{x}}}" for x in said], rewards=torch.ones(8))
        first = first_stage(term, replace(view, step=seed), memory)
        # tokens differ from row to row, so copies of an answer are kept apart and counted together
        for row, (ids, mask) in enumerate(zip(view.ids, view.mask, strict=True)):
            seen[tuple(ids[mask].tolist())] = (seed, row)
        kept = kept_in(memory)
        stays.append([seen[tuple(ids.tolist())] for ids in kept.ids.split(kept.length.tolist())])
    # a 2, b 1, c 1: b and c; x 3, y 1: y and the first x
    assert stays[0] == [(0, 2), (0, 3), (0, 4), (0, 7)]
    # c 4, a 3, b 1: b and a; x 7, y 1: y and the first x
    assert stays[1] == [(0, 2), (0, 4), (0, 7), (1, 3)]
    # b 5, c 4, a 3, and of c none is left: a and the first b; x 7, y 5: the first two y
    assert stays[2] == [(0, 2), (0, 7), (1, 3), (2, 4)]
    assert sorted(memory["sampled"].tolist()) == [3, 4, 5, 5, 7]
    assert first.metrics["link/bytes"] == kept.bytes() + 5 * 12


def test_without_the_count_nothing_is_counted():
    memory: dict = {}
    first_stage(RightAnchor(capacity=2), rollout(make_step()), memory)
    assert kept_in(memory).counted.shape == (3, 0) and "sampled" not in memory


def test_rewards_that_say_not_clearly_what_is_right_are_told(caplog):
    term, memory = RightAnchor(), {}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            first_stage(term, rollout(make_step()), memory)
    told = [record.message for record in caplog.records]
    assert told == [
        "right_anchor: rewards should be 0 or 1, 2 of 8 are neither, such as 0.5; those of 1 or more count as right: "
        "set right_at, the reward from which a response is right"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        memory = {}
        first_stage(RightAnchor(right_at=0.5), rollout(make_step()), memory)
        first_stage(RightAnchor(), replace(rollout(make_step()), rewards=torch.tensor([0.0, 1, math.nan, 1] * 2)), {})
        assert len(kept_in(memory)) == 4
        # two reward functions and a format, weighed: .01 + .78 + .21 in float32
        almost = torch.tensor([0.01]) + 0.78 + 0.21
        assert almost < 1
        rewards = torch.where(torch.arange(8) % 2 == 1, almost, 0.0)
        first_stage(RightAnchor(), replace(rollout(make_step()), rewards=rewards), memory := {})
    assert not caplog.records and len(kept_in(memory)) == 4


def with_prompt(step: Step, number: int):
    text = rollout(step).transcript
    return replace(rollout(step), transcript=replace(text, prompt_ids=torch.full_like(text.prompt_ids, number)))


def test_prompts_that_never_come_twice_are_told_once(caplog):
    for source, sentences in (("prompt", 1), ("any", 0)):
        caplog.clear()
        term, memory = RightAnchor(source=source, right_at=1.0), {}
        with caplog.at_level(logging.WARNING):
            for number in range(PATIENCE + 3):
                first_stage(term, with_prompt(make_step(), number), memory)
        assert len(caplog.records) == sentences
    assert "source: any holds the right answers of all prompts" in caplog.text or not sentences
    # one that came twice ends the wait for good
    term, memory = RightAnchor(right_at=1.0), {}
    caplog.clear()
    for number in [0, 0, *range(1, PATIENCE + 3)]:
        first_stage(term, with_prompt(make_step(), number), memory)
    assert not caplog.records


def test_a_full_store_takes_no_more_and_says_so(caplog):
    term, memory = RightAnchor(most_gb=1e-9, right_at=1.0), {}  # one byte
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            first_stage(term, rollout(make_step(seed)), memory)
    assert len(kept_in(memory)) == 3 and len(caplog.records) == 1
    assert "it takes no more than the 3 responses that it has: lower capacity, or raise most_gb" in caplog.text


@pytest.mark.parametrize(("was", "now"), [("first", "log_det"), ("log_det", "count"), ("count", "first")])
def test_a_store_that_was_kept_by_another_rule_is_refused(was, now):
    memory: dict = {}
    first_stage(RightAnchor(keep=was, right_at=1.0), rollout(make_step(0)), memory)
    sentence = f"was kept with another `keep` than '{now}'.* resume with the `keep` that it was written with"
    with pytest.raises(ValueError, match=sentence):
        first_stage(RightAnchor(keep=now, right_at=1.0), rollout(make_step(1)), memory)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"share": 0.0}, "share must be in (0, 1], got 0.0"),
        ({"share": 1.5}, "share must be in (0, 1], got 1.5"),
        ({"margin": -1.0}, "margin is a number of nats, at least 0, got -1.0"),
        ({"margin": math.nan}, "margin is a number of nats, at least 0, got nan"),
        ({"margin": 1.0, "hinge": False}, "margin belongs to the hinge: with hinge: false leave it out, got 1.0"),
        ({"right_at": math.inf}, "right_at must be a finite reward or None, got inf"),
        ({"most_gb": 0.0}, "most_gb must be above 0 and at most this machine's 1.0, got 0.0"),
        ({"most_gb": 2.0}, "most_gb must be above 0 and at most this machine's 1.0, got 2.0"),
        ({"answer": "x"}, "answer must have one group, which holds the answer, got 'x' with 0"),
    ],
)
def test_refuses(wrong, sentence, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=10**9))
    with pytest.raises(ValueError) as error:
        RightAnchor(**{"most_gb": 1.0, **wrong})
    assert str(error.value) == sentence
