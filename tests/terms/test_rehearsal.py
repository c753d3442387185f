"""DPH-RL's rehearsal against its card (arXiv:2509.07430): numbers, a loop, which prompts are stored, the traps."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from hclm_rl import Transcript, build_chain
from hclm_rl.responses.right_answers import kept_in
from hclm_rl.terms.rehearsal import Rehearsal

from ..term_batches import Step, first_stage, make_step, reading, rollout, second_stage, token_batch, transcript_of

NOW, OLD = [-1.5, -0.2, -0.8], [-1.0, -0.3, -0.8]
SOLVED = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # the second prompt alone


def f_of(d: list[float], **settings) -> tuple[list[float], list[float]]:
    """f and its slope."""
    x = torch.tensor([d], dtype=torch.float64, requires_grad=True)
    f = Rehearsal(**settings).f(x)
    f.sum().backward()
    return f[0].tolist(), x.grad[0].tolist()


@pytest.mark.parametrize(
    ("mode", "coef", "values", "slopes", "loss"),
    [
        ("forward", 0.01, [0.106531, 0.005171, 0], [-0.393469, 0.105171, 0], 0.000372),
        ("js", 0.05, [0.048678, 0.002628, 0], [-0.170393, 0.053878, 0], 0.000855),
        # (u^-a - 1) u (1 - a) / (a (a - 1)) = (u - u^(1 - a)) / a
        ("alpha", 0.01, [0.093153, 0.005310, 0], [(math.exp(-0.5) - math.exp(-0.4)) / 0.2, 0.109420, 0], None),
    ],
)
def test_the_cards_worked_example(mode, coef, values, slopes, loss):
    found, gradient = f_of([now - old for now, old in zip(NOW, OLD, strict=True)], mode=mode)
    assert found == pytest.approx(values, abs=1.1e-6)
    assert gradient == pytest.approx(slopes, abs=1.1e-6)
    assert Rehearsal(mode=mode).default_coef == coef
    if loss is not None:
        assert coef * sum(found) / 3 == pytest.approx(loss, abs=6e-7)


@pytest.mark.parametrize("mode", ["forward", "js", "alpha"])
def test_in_the_mean_over_the_start_it_is_the_divergence(mode):
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    now = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    f, _ = f_of((now / start).log().tolist(), mode=mode)
    found = (start * torch.tensor(f, dtype=torch.float64)).sum().item()

    def kl(p, q):
        return (p * (p / q).log()).sum().item()

    if mode == "forward":
        expected = kl(start, now)
    elif mode == "js":  # twice the Jensen-Shannon divergence
        expected = kl(start, (start + now) / 2) + kl(now, (start + now) / 2)
    else:
        expected = (1 - (start**0.2 * now**0.8).sum().item()) / (0.2 * 0.8)
    assert found == pytest.approx(expected, rel=1e-12)


def test_far_off_a_token_has_no_gradient_and_nothing_overflows():
    assert f_of([-12.0, 3.0, -10.0])[1] == pytest.approx([0, 0, math.exp(-10) - 1])
    assert f_of([-12.0, 3.0], most=None)[1] == pytest.approx([math.exp(-12) - 1, math.exp(3) - 1])
    for mode in ("forward", "js", "alpha"):
        values, slopes = f_of([1e4, -1e4], mode=mode, most=None)
        assert all(math.isfinite(each) for each in values + slopes) and slopes == [0, 0]


def judged(term: Rehearsal, memory: dict, rewards: torch.Tensor, step: int = 2, seed: int = 20):
    view = rollout(replace(make_step(seed), rewards=rewards))
    return first_stage(term, replace(view, step=step), memory)


def test_a_prompt_that_is_always_solved_is_stored_once_and_not_rewarded():
    memory: dict = {}
    first = judged(Rehearsal(), memory, SOLVED)
    kept = kept_in(memory)
    assert len(kept) == 1 and kept.length.tolist() == [5]  # the first response to it, of five tokens
    assert len(memory["judged"]) == 2 and first.metrics["link/solved"].item() == 0.5
    assert first.advantages[:4].any() and not first.advantages[4:].any()
    # it comes again and is not solved: still stored, still not rewarded; the other one was judged when it first came
    again = judged(Rehearsal(), memory, 1 - SOLVED.flip(0), seed=21)
    assert kept_in(memory).ids.tolist() == kept.ids.tolist()
    assert not again.advantages[4:].any() and again.metrics["link/solved"].item() == 0.5
    # the first prompt is solved, but only now: judged when it first came, it is neither stored nor left unpaid
    solved_late = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    late = judged(Rehearsal(checks=2), memory, solved_late, seed=22)
    assert kept_in(memory).ids.tolist() == kept.ids.tolist() and late.advantages[:4].any()
    paid = judged(Rehearsal(rewarded=True), {}, SOLVED)
    assert paid.advantages is None


def test_how_many_are_checked_and_how_long():
    memory: dict = {}
    judged(Rehearsal(checks=1), memory, SOLVED)
    assert len(kept_in(memory)) == 2
    memory = {}
    judged(Rehearsal(checks=2), memory, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert len(kept_in(memory)) == 1 and kept_in(memory).length.tolist() == [6]
    memory = {}
    late = judged(Rehearsal(fill=2), memory, SOLVED, step=2)
    assert len(kept_in(memory)) == 0 and "judged" not in memory and late.metrics["link/solved"].item() == 0
    judged(Rehearsal(fill=2), memory, SOLVED, step=1)
    assert len(kept_in(memory)) == 1
    assert Rehearsal().least_group == 2 and Rehearsal(checks=8).least_group == 8


def test_a_response_that_is_not_scored_or_has_no_tokens_is_not_right():
    memory: dict = {}
    judged(Rehearsal(), memory, SOLVED.index_fill(0, torch.tensor([6]), math.nan))
    step = replace(make_step(20), rewards=SOLVED)
    first_stage(Rehearsal(), rollout(replace(step, mask=step.mask & (torch.arange(8) != 5).unsqueeze(1))), {})
    assert len(kept_in(memory)) == 0


def test_a_full_store_names_what_the_term_has(caplog):
    memory: dict = {}
    with caplog.at_level(logging.WARNING):
        for seed in range(2):
            judged(Rehearsal(checks=1, most_gb=1e-9), memory, SOLVED, seed=seed + 20)  # one byte
    [record] = caplog.records
    assert record.getMessage().startswith("rehearsal: the store of right answers takes ")
    assert record.getMessage().endswith("so it takes no more than the 2 responses that it has: raise most_gb")
    with pytest.raises(ValueError, match="most_gb must be above 0 and at most this machine's"):
        Rehearsal(most_gb=0.0)


def test_a_recipe_may_leave_the_cut_out():
    [link] = build_chain([{"rehearsal": {"most": None}}]).links
    assert link.term == Rehearsal(most=None)


def test_as_many_rows_replay_as_are_asked_for():
    step, memory = wide_step(), {}
    term = Rehearsal(checks=1, rows=7)
    first_stage(term, step, memory, group_size=5)
    again = first_stage(term, step, memory, group_size=5)
    assert again.metrics["link/replayed"].item() == 7  # 7 / 25 * 25 is 7.000000000000001


def wide_step():
    """25 responses to five prompts, all of them right."""
    ids = torch.arange(50).view(25, 2) % 11
    group = torch.arange(25) // 5
    step = Step(
        ids=ids,
        mask=torch.ones_like(ids).bool(),
        old_logps=-torch.ones(25, 2),
        old_entropy=torch.ones(25, 2),
        old_hidden=torch.zeros(25, 2, 1),
        logps=-torch.ones(25, 2),
        entropy=torch.ones(25, 2),
        hidden=torch.zeros(25, 2, 1),
        head=torch.zeros(11, 1),
        rewards=torch.ones(25),
        group_size=5,
    )
    return replace(rollout(step), transcript=transcript_of(ids, step.mask, group % 3))


@pytest.mark.parametrize("mode", ["forward", "js", "alpha"])
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_a_loop(seed, mode):
    term, memory = Rehearsal(mode=mode, checks=1, rows=3), {}
    judged(term, memory, SOLVED, seed=seed + 20)
    step = make_step(seed, torch.float64)
    first = first_stage(term, rollout(step), memory)
    numbers, shared = first.columns["link/replay"].tolist(), {k[5:]: v for k, v in first.shared.items()}
    assert sum(number >= 0 for number in numbers) == 3
    batch = replace(token_batch(step), score=lambda text, scorer="policy": (reading(text, step.head), None))
    outcome = second_stage(term, batch, first, memory)
    text = Transcript(**{name: shared[name] for name in ("prompt_ids", "prompt_mask", "ids", "present")})
    now = reading(text, step.head)
    total, tokens = 0.0, 0
    for number in numbers:
        if number < 0:
            continue
        for t in range(shared["mask"].size(1)):
            if shared["mask"][number, t]:
                u = math.exp(now[number, t].item() - shared["logps"][number, t].item())
                total += {
                    "forward": min(u - math.log(u) - 1, 10.0),
                    "js": u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
                    "alpha": (u**0.8 - 0.8 * u - 0.2) / (0.2 * -0.8),
                }[mode]
                tokens += 1
    found = outcome.losses["link"][step.mask].mean().item()
    assert found == pytest.approx(total / tokens, rel=1e-6)
    divergence = outcome.metrics["link/divergence"]
    assert divergence.form(*(each.item() for each in divergence.sums)) == pytest.approx(total / 3, rel=1e-6)


def test_nothing_is_read_before_something_is_stored():
    first = first_stage(Rehearsal(), rollout(make_step()), {})
    assert first.columns == {} and second_stage(Rehearsal(), token_batch(make_step()), first, {}).losses == {}
    assert torch.equal(first.advantages, make_step().advantages)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"a": 1.0}, "a must be in (0, 1), got 1.0"),
        ({"most": 0.0}, "most must be above 0 or None, got 0.0"),
        ({"checks": 0}, "checks must be at least 1 or None, got 0"),
        ({"fill": 0}, "fill must be at least 1 or None, got 0"),
        ({"rows": -1}, "rows must be at least 1 or None, got -1"),
        ({"right_at": math.nan}, "right_at must be a finite reward or None, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Rehearsal(**wrong)
    assert str(error.value) == sentence
