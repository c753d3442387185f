"""The constraint per prompt against its card: numbers, a loop over rollouts, and when it replays."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.no_loss import NoLoss
from hclm_rl.terms.right_anchor import PATIENCE, RightAnchor

from ..term_batches import first_stage, make_step, reading, rollout, second_stage, token_batch


def seen(term: NoLoss, rewards: list[list[float]], memory: dict, step: int = 0, seed: int = 0):
    """A rollout of two prompts of four responses each with these rewards."""
    values = torch.tensor(rewards, dtype=torch.float64)
    view = rollout(replace(make_step(seed, torch.float64), rewards=values.flatten()))
    return first_stage(term, replace(view, step=step), memory)


def test_the_cards_worked_example():
    prompt, scored, memory = torch.full((16,), 7), torch.ones(16).bool(), {}
    for right, expected in ((8, 0.0), (1, 0.1 * math.log((8.5 / 17) / (1.5 / 17)))):
        mu = NoLoss().multipliers(prompt, torch.arange(16) < right, scored, memory)
        assert mu.tolist() == pytest.approx([expected] * 16, rel=1e-6)
    assert mu[0].item() == pytest.approx(0.173460, abs=5e-7)
    assert memory["first"].tolist() == pytest.approx([math.log(0.5)])
    # solved more often than at first: log .5 - log(12.5 / 17) = -.3857, so mu falls
    mu = NoLoss().multipliers(prompt, torch.arange(16) < 12, scored, memory)
    assert mu[0].item() == pytest.approx(0.173460 - 0.038566, abs=2e-6)


def test_what_is_lost_weighs_more_and_what_the_start_did_not_solve_is_free():
    term, memory = NoLoss(eta=1.0), {}
    first = seen(term, [[1, 1, 1, 0], [0, 0, 0, 0]], memory)
    given = make_step(dtype=torch.float64)
    before = rollout(replace(given, rewards=torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]).double())).advantages
    assert torch.equal(first.advantages, before)
    now = rollout(replace(given, rewards=torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0]).double())).advantages
    second = seen(term, [[1, 0, 0, 0], [1, 0, 0, 0]], memory, step=1)
    # p0 = 3.5/5, p = 1.5/5; the second prompt has won
    mu = math.log(3.5 / 1.5)
    torch.testing.assert_close(second.advantages[:4], (1 + mu) * now[:4], rtol=1e-6, atol=0)
    assert torch.equal(second.advantages[4:], now[4:])
    assert second.metrics["link/mu"].item() == pytest.approx(mu / 2, rel=1e-6)
    assert second.metrics["link/held"].item() == 0.5 and second.metrics["link/replayed"] == 0


def test_a_prompt_that_comes_twice_in_a_rollout_is_counted_once():
    view = rollout(make_step(dtype=torch.float64))
    same = replace(view.transcript, prompt_ids=torch.full_like(view.transcript.prompt_ids, 3))
    same = replace(same, prompt_mask=torch.ones_like(same.prompt_mask))
    memory: dict = {}
    for rewards, k in (([1.0, 1, 1, 1, 1, 0, 0, 0], 5), ([0.0, 1, 0, 0, 1, 0, 0, 0], 2)):
        first_stage(NoLoss(eta=1.0), replace(view, transcript=same, rewards=torch.tensor(rewards).double()), memory)
        # eight responses to one prompt: its second four are not compared with its first
        assert memory["mu"].tolist() == pytest.approx([math.log(5.5 / (k + 0.5))])
    assert memory["first"].tolist() == pytest.approx([math.log(5.5 / 9)])


def test_bounds_and_delta():
    memory: dict = {}
    for step in range(20):
        seen(NoLoss(eta=1.0, mu_max=2.5), [[1, 1, 1, 1] if step == 0 else [0, 0, 0, 1]] * 2, memory, step)
    assert memory["mu"].tolist() == [2.5, 2.5]
    for step in range(20):
        seen(NoLoss(eta=1.0, mu_max=2.5, delta=9.0), [[1, 0, 0, 0]] * 2, memory, step)
    assert memory["mu"].tolist() == [0.0, 0.0]
    assert memory["first"].exp().tolist() == pytest.approx([0.9, 0.9])  # of the first rollout, whatever came after


def test_a_prompt_without_a_right_answer_replays_its_own():
    term, memory, step = NoLoss(eta=1.0), {}, make_step(1, torch.float64)
    seen(term, [[1, 1, 0, 0], [1, 0, 0, 0]], memory)
    first = seen(term, [[0, 0, 0, 0], [0, 1, 0, 0]], memory, step=1, seed=1)
    assert (first.columns["link/replay"] >= 0).tolist() == [True] * 4 + [False] * 4
    mu = math.log(2.5 / 0.5)
    assert first.columns["link/mu"].tolist() == pytest.approx([mu] * 4 + [0.0] * 4, rel=1e-6)
    batch = replace(token_batch(step), score=lambda text, scorer="policy": (reading(text, step.head), None))
    asked = second_stage(term, batch, first, memory).losses["link"]
    alone = replace(first, columns={"link/replay": first.columns["link/replay"]})
    held = second_stage(RightAnchor(), batch, alone, memory).losses["link"]
    assert held.sum() > 0
    torch.testing.assert_close(
        asked, held * torch.tensor([mu] * 4 + [0.0] * 4).double().unsqueeze(1), rtol=1e-6, atol=0
    )


def test_unscored_responses_count_neither_way():
    memory: dict = {}
    seen(NoLoss(eta=1.0), [[1, math.nan, math.nan, 0], [math.nan] * 4], memory)
    assert memory["first"].exp().tolist() == pytest.approx([1.5 / 3])  # 1 of 2; the other prompt was not judged


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"eta": 0.0}, "eta must be a positive number, got 0.0"),
        ({"mu_max": math.inf}, "mu_max must be a positive number, got inf"),
        ({"delta": -0.1}, "delta is a number of nats, at least 0, got -0.1"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        NoLoss(**wrong)
    assert str(error.value) == sentence


def test_prompts_that_never_come_twice_are_told_in_words_of_its_own(caplog):
    memory: dict = {}
    with caplog.at_level(logging.WARNING):
        for number in range(PATIENCE + 3):
            view = rollout(make_step())
            alone = replace(view.transcript, prompt_ids=torch.full_like(view.transcript.prompt_ids, number))
            first_stage(NoLoss(right_at=1.0), replace(view, transcript=alone), memory)
    [record] = caplog.records
    assert record.getMessage() == (
        f"no_loss: no prompt with a right answer has come again in {PATIENCE} rollouts, so it compares and holds "
        "nothing yet; right_anchor with source: any holds the right answers of all prompts"
    )
