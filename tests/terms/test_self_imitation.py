"""SPEAR's self-imitation against its card (arXiv:2509.22601): numbers, a loop, the buffer's rules, and the traps."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.responses.replay import Replay, kept_in, left_padded
from hclm_rl.terms.clip_cov import ClipCov
from hclm_rl.terms.self_imitation import SelfImitation, gamma

from ..term_batches import (
    card_step,
    first_stage,
    make_step,
    reading,
    rollout,
    second_stage,
    surrogate,
    token_batch,
    transcript_of,
)

FREE = {"needs_tool_call": False, "cov_lower": 1e6, "cov_upper": 2e6}  # no covariance is in that band


def replays(rewards: list[float], ids: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor, steps=None) -> Replay:
    text = transcript_of(ids, mask)
    return Replay(
        prompt_ids=text.prompt_ids,
        prompt_mask=text.prompt_mask,
        ids=ids,
        present=text.present,
        mask=mask,
        logps=torch.where(mask, logps, 0),
        reward=torch.tensor(rewards, dtype=logps.dtype),
        advantage=torch.tensor(rewards, dtype=logps.dtype),
        step=torch.tensor(steps or [2] * len(rewards)),
    )


def remembering(kept: Replay, baselines: list[list[float]]) -> dict:
    memory: dict = {"baselines": baselines}
    kept.save(memory)
    return memory


def test_the_cards_schedule():
    assert gamma(50, 200) == pytest.approx(0.146447, abs=5e-7)
    assert gamma(0, 200) == 0 and gamma(200, 200) == gamma(900, 200) == 1


def replayed_loss(term: SelfImitation, memory: dict, at: int, seed: int = 0, shift: float = 0.0):
    """The added loss, as the trainer averages it, of a step whose replays read as `reading` says plus `shift`."""
    step = make_step(seed, torch.float64)
    batch = replace(token_batch(step), step=at, score=lambda text: (reading(text, step.head) + shift, None))
    first = first_stage(term, replace(rollout(step), step=3), memory)
    outcome = second_stage(term, batch, first, memory)
    if "link" not in outcome.losses:
        return None, first
    return outcome.losses["link"][batch.mask].mean().item(), first


def the_cards_buffer(step) -> dict:
    # D_R = 0.2, 0.4, 0.5, 0.9, so b = 0.45; rewards 1.0, 0.4, 0.7: A = 0.55, out, 0.25. At r = 1: as they now read
    ids, mask = step.ids[:3], step.mask[:3] & (torch.arange(6) < 3)
    return remembering(
        replays([1.0, 0.4, 0.7], ids, mask, reading(transcript_of(ids, mask), step.head)), [[0.2, 0.4], [0.5], [0.9]]
    )


def test_the_cards_replay():
    # two above b are more than 1.5 * 1, but only one of them would be drawn; the card replays both, so ask for more
    step = make_step(dtype=torch.float64)
    memory = the_cards_buffer(step)
    term = SelfImitation(buffer=1, warm_up=200, **FREE)
    loss, _ = replayed_loss(term, memory, at=200)
    assert loss == pytest.approx(-0.55, rel=1e-9) or loss == pytest.approx(-0.25, rel=1e-9)
    # both, as the card has them: (0.55 + 0.25) / 2, and gamma(50) of it
    both = kept_in(the_cards_buffer(step)).rows(torch.tensor([0, 2]))
    columns = term._columns(rollout(step), both, 0.45, step.mask.any(dim=1))
    batch = replace(token_batch(step), columns=columns, score=lambda text: (reading(text, step.head), None))
    for at, expected in ((200, -0.4), (50, -0.058579)):
        loss = term(replace(batch, step=at), {}).loss[batch.mask].mean().item()
        assert loss == pytest.approx(expected, abs=5e-7)
    # sum over tokens / width 3, then the mean of two: the same here, for the rows are full
    columns = SelfImitation(average="width", **FREE)._columns(rollout(step), both, 0.45, step.mask.any(dim=1))
    loss = term(replace(batch, step=200, columns=columns), {}).loss[batch.mask].mean().item()
    assert loss == pytest.approx(-0.4, rel=1e-9)


def test_the_cards_covariance():
    logps = [[-0.1, -3.0, -0.05], [-0.2, -2.5, -0.4]]
    _, batch = card_step([[1] * 3] * 2, logps, logps, [[2.0] * 3, [-2.0] * 3])
    left = ClipCov(ratio=0.5, lower=1.0, upper=40.0, statistics="micro_batch")(batch, {}).advantages
    losses = surrogate(batch, left)
    assert losses.flatten().tolist() == pytest.approx([0, -2, 0, 2, 0, 2])
    assert losses.mean().item() == pytest.approx(0.333333, abs=5e-7)


def test_replayed_tokens_in_the_band_lose_their_gradient():
    step = make_step(dtype=torch.float64)
    memory = remembering(
        replays([1.0, 0.5, 1.0, 0.5], step.ids[:4], step.mask[:4], step.old_logps[:4]), [[0.0]]
    )  # fmt: skip
    first = first_stage(
        SelfImitation(buffer=2, needs_tool_call=False, cov_ratio=1.0, cov_lower=-100.0), rollout(step), memory
    )
    columns = {name.removeprefix("link/"): value for name, value in first.columns.items()}
    assert torch.equal(columns["is_dropped"] & columns["mask"], columns["mask"])  # a band that takes all


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_loop(seed):
    step = make_step(seed, torch.float64)
    ids, mask, old = step.ids[[1, 4, 7, 0]], step.mask[[1, 4, 7, 0]], step.old_logps[[1, 4, 7, 0]]
    now = reading(transcript_of(ids, mask), step.head)
    memory = remembering(replays([1.0, 0.9, 0.8, 0.7], ids, mask, now - 0.3 * old.sin()), [[0.2], [0.6, 0.4]])
    loss, first = replayed_loss(SelfImitation(buffer=2, warm_up=10, **FREE), memory, at=4, seed=seed)
    assert first.metrics["link/replayed"] == 2
    chosen = {round(float(a), 9) for a, w in zip(first.columns["link/advantage"].flatten(),
                                                 first.columns["link/weight"].flatten(), strict=True) if w}  # fmt: skip
    total, tokens = 0.0, 0
    for row, reward in enumerate([1.0, 0.9, 0.8, 0.7]):
        advantage = reward - 0.4  # the median of 0.2, 0.6, 0.4
        if round(advantage, 9) in chosen:
            for t in mask[row].nonzero().squeeze(1).tolist():
                ratio = math.exp(0.3 * math.sin(old[row, t].item()))
                total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
                tokens += 1
    assert loss == pytest.approx((1 - math.cos(math.pi * 0.4)) / 2 * total / tokens, rel=1e-9)


def test_a_token_that_has_risen_enough_stops():
    step = make_step(dtype=torch.float64)
    memory, term = the_cards_buffer(step), SelfImitation(buffer=1, warm_up=1, **FREE)
    batch = token_batch(step)
    first = first_stage(term, rollout(step), memory)
    hidden = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for shift, moves in ((0.1, True), (0.3, False)):  # e^0.1 < 1.2 < e^0.3
        scored = replace(batch, score=lambda text, s=shift: (reading(text, step.head) + s + hidden, None))
        hidden.grad = None
        second_stage(term, scored, first, memory).losses["link"].sum().backward()
        assert (hidden.grad.item() != 0) == moves


def test_the_buffer_keeps_good_responses_of_recent_steps():
    step, memory = make_step(), {}
    term = SelfImitation(keep_steps=2, needs_tool_call=False, baselines=3)
    for at in range(5):
        first_stage(term, replace(rollout(step), step=at), memory)
        kept = kept_in(memory)
        # four of eight responses beat their group; entries of step m are there up to two steps after the update m
        assert kept.step.tolist() == [m for m in range(max(0, at - 3), at + 1) for _ in range(4)]
    assert set(kept.reward.tolist()) == {1.0, 0.5}
    assert memory["baselines"] == [[0.375, 0.5625]]  # two values a step: two steps would be more than three values


def test_tool_calls_are_asked_for():
    step, memory = make_step(), {}
    first_stage(SelfImitation(), rollout(step), memory)
    assert len(kept_in(memory)) == 0
    step = replace(step, mask=step.mask.index_fill(1, torch.tensor([1]), False))
    memory = {}
    first_stage(SelfImitation(), rollout(step), memory)
    assert len(kept_in(memory)) > 0


def test_a_replay_waits_for_more_than_one_and_a_half_buffers_and_empties_it():
    step = make_step(dtype=torch.float64)
    ids, mask, old = step.ids[:4], step.mask[:4], step.old_logps[:4]
    for rewards, replayed in (([1.0] * 3 + [0.0], 0), ([1.0] * 4, 2)):
        memory = remembering(replays(rewards, ids, mask, old), [[0.5]])
        loss, first = replayed_loss(SelfImitation(buffer=2, warm_up=1, **FREE), memory, at=9)
        assert first.metrics["link/replayed"] == replayed and (loss is None) == (replayed == 0)
        left = kept_in(memory).step.tolist()
        assert left == ([2] * 4 if not replayed else []) + [3] * 4  # and this step's come after


def test_more_replays_than_rows_travel_together():
    step = make_step(dtype=torch.float64)
    index = torch.arange(16) % 8
    memory = remembering(
        replays([1.0] * 16, step.ids[index], step.mask[index], step.old_logps[index]), [[0.5]]
    )  # fmt: skip
    term = SelfImitation(buffer=10, warm_up=1, **FREE)  # 16 > 15; the smaller of 10 and 16
    step = replace(step, mask=step.mask & (torch.arange(8) < 5).unsqueeze(1))  # three rows without tokens
    first = first_stage(term, rollout(step), memory)
    weight = first.columns["link/weight"]
    assert weight.shape == (8, 2) and weight.count_nonzero() == 10 and (weight[5:] == 0).all()


def test_padding_moves_to_the_left():
    ids, mask = torch.tensor([[0, 5, 6, 0], [7, 8, 9, 0]]), torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]]).bool()
    moved, where = left_padded(ids, mask)
    assert where.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert moved[where].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"buffer": 0}, "buffer must be at least 1, got 0"),
        ({"warm_up": 0}, "warm_up must be at least 1, got 0"),
        ({"cov_ratio": 1.5}, "cov_ratio must be in (0, 1], got 1.5"),
        ({"cov_lower": 50.0}, "cov_lower must be below cov_upper, got 50.0 and 40.0"),
        ({"keep_steps": 11}, "keep_steps must be at most 10, the authors' limit, got 11"),
        ({"decay": 1.5}, "decay must be in (0, 1] or None, got 1.5"),
        ({"width": 8}, "width is a number of tokens for average='width', got 8 for 'tokens'"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        SelfImitation(**wrong)
    assert str(error.value) == sentence


def test_an_answer_of_a_tool_at_the_end_counts_as_a_call():
    step, memory = make_step(), {}
    mask = step.mask.clone()
    last = step.mask.sum(dim=1) - 1
    mask[torch.arange(len(mask)), last] = False  # in the text, but not the model's
    first_stage(
        SelfImitation(), rollout(replace(step, mask=mask), transcript=transcript_of(step.ids, step.mask)), memory
    )
    assert len(kept_in(memory)) > 0


def test_the_authors_other_advantage_and_mean():
    step = make_step(dtype=torch.float64)
    ids, mask = step.ids[[1, 4, 7]], step.mask[[1, 4, 7]]
    now = reading(transcript_of(ids, mask), step.head)
    kept = replace(
        replays([1.0, 1.0, 1.0], ids, mask, now), advantage=torch.tensor([0.8, 0.8, 0.8], dtype=torch.float64)
    )
    term = SelfImitation(buffer=1, warm_up=1, decay=0.5, average="width", width=20, **FREE)
    loss, _ = replayed_loss(term, remembering(kept, [[0.5]]), at=9)
    # ratio 1, advantage 0.5 * 0.8: the tokens of the one replay over 20
    tokens = {0.4 * int(row.sum()) / 20 for row in mask}
    assert any(loss == pytest.approx(-value, rel=1e-9) for value in tokens)


def test_with_a_decay_all_that_is_kept_counts():
    # four replays of reward 0.5 below the median of 2: none beats it, and 4 > 1.5 * 2 all the same
    step = make_step(dtype=torch.float64)
    kept = replays([0.5] * 4, step.ids[:4], step.mask[:4], step.old_logps[:4])
    for decay, replayed in ((None, 0), (0.5, 2)):
        term = SelfImitation(buffer=2, warm_up=1, decay=decay, **FREE)
        _, first = replayed_loss(term, remembering(kept, [[2.0]]), at=9)
        assert first.metrics["link/replayed"] == replayed
    # and before there is a median: 4 is more than 1.5 * 2
    _, first = replayed_loss(SelfImitation(buffer=2, warm_up=1, decay=0.5, **FREE), remembering(kept, []), at=9)
    assert first.metrics["link/replayed"] == 2


def test_the_old_leave_after_the_step_that_might_have_replayed_them():
    # after step 5 the newest before it were those of step 4, and those of step 2 are 2 older, no more: at step 6 they
    # are still there, with those of step 5; it is after it that they go, 3 older than these
    step = make_step(dtype=torch.float64)
    kept = replays([1.0] * 4, step.ids[:4], step.mask[:4], step.old_logps[:4], steps=[2, 2, 2, 5])
    for buffer, replayed, left in ((2, 2, []), (3, 0, [5])):
        term, memory = SelfImitation(buffer=buffer, keep_steps=2, **FREE), remembering(kept, [[0.5]])
        first = first_stage(term, replace(rollout(step), step=6), memory)
        assert first.metrics["link/replayed"] == replayed
        assert kept_in(memory).step.tolist() == left + [6] * 4
