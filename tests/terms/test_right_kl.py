"""KL among right answers against its card: numbers, a loop, what it leaves alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.recipe.refusals import refuse_without_reference
from hclm_rl.terms.right_kl import RightKl, among_right

from ..term_batches import first_stage, make_step, rollout
from ..tiny import CONFIGS

ALL = torch.ones(1, 3).bool()


@pytest.mark.parametrize(
    ("c", "shaped"),
    [
        (5.0, [0.333333, 0.533333, 0.633333]),
        # clipped at 1: [1, -1/3, -1], whose mean -1/9 is taken off again: 10/9, -2/9, -8/9
        (1.0, [0.388889, 0.522222, 0.588889]),
    ],
)
def test_the_cards_worked_example(c, shaped):
    s = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    assert (0.5 - 0.1 * among_right(s, ALL, c)).flatten().tolist() == pytest.approx(shaped, abs=5e-7)


def test_wrong_ones_and_the_only_right_one_are_left_alone():
    s = torch.tensor([[2.0, 0.0, -1.0], [3.0, 1.0, 7.0]])
    right = torch.tensor([[True, False, True], [False, False, True]])
    assert among_right(s, right, 5.0).tolist() == [[1.5, 0.0, -1.5], [0.0, 0.0, 0.0]]


def moved(step, by: float):
    """The same responses, each of whose tokens has become likelier or less by its place in the batch."""
    return replace(step, old_logps=step.old_logps + by * torch.arange(8, dtype=step.old_logps.dtype).unsqueeze(1))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("against", ["first", "reference"])
def test_agrees_with_a_loop(against, per_token):
    step, memory = make_step(dtype=torch.float64), {}
    term = RightKl(against=against, lam=0.2, c=1.5, right_at=0.5)
    first_stage(term, rollout(step), memory)
    now = moved(step, 0.1)
    view = replace(rollout(now), ref_logps=step.old_logps)
    if per_token:
        view = replace(view, advantages=view.advantages.unsqueeze(1).expand(8, 6))
    shaped = first_stage(term, view, memory).advantages
    for group in ([0, 1, 2, 3], [4, 5, 6, 7]):
        right = [i for i in group if step.rewards[i] >= 0.5]
        s = {i: 0.1 * i * int(step.mask[i].sum()) for i in right}
        clipped = {i: min(max(s[i] - sum(s.values()) / len(s), -1.5), 1.5) for i in right}
        for i in group:
            correction = 0.2 * (clipped[i] - sum(clipped.values()) / len(s)) if i in right else 0.0
            found = shaped[i][step.mask[i]] if per_token else shaped[i : i + 1]
            # the first log-probs are kept in float64, so the rounding is that of sums
            assert found.tolist() == pytest.approx([step.advantages[i].item() - correction] * len(found), abs=1e-9)


def test_what_is_seen_for_the_first_time_is_its_own_start():
    step, memory = make_step(), {}
    effect = first_stage(RightKl(right_at=0.5), rollout(step), memory)
    assert torch.equal(effect.advantages, step.advantages)
    assert len(memory["answers"]) == 4  # right ones alone
    # the floor stays that of the first time
    first = memory["first"].clone()
    first_stage(RightKl(right_at=0.5), rollout(moved(step, 0.3)), memory)
    assert torch.equal(memory["first"], first)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"lam": -0.1}, "lam must not be negative, got -0.1"),
        ({"c": 0.0}, "c must be positive, got 0.0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        RightKl(**wrong)
    assert str(error.value) == sentence


def test_a_run_without_a_reference_is_told_before_loading(tmp_path: Path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    chain = build_chain([{"right_kl": {"against": "reference"}}])
    with pytest.raises(ValueError, match=r"right_kl: .* beta is 0"):
        refuse_without_reference(chain, CONFIGS["grpo"](beta=0.0, **given))
    refuse_without_reference(chain, CONFIGS["grpo"](beta=1e-3, **given))
    refuse_without_reference(build_chain(["right_kl"]), CONFIGS["grpo"](beta=0.0, **given))
    for beta in (0.0, 0.05):  # RLOO keeps no log-probs of its reference
        with pytest.raises(ValueError, match=r"right_kl: .* use GRPO"):
            refuse_without_reference(chain, CONFIGS["rloo"](beta=beta, **given))
    with pytest.raises(ValueError, match="set beta above 0, or against: first"):
        first_stage(RightKl(against="reference"), replace(rollout(make_step()), ref_logps=None), {})
