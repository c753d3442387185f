"""Reinforcement by sign against its card (arXiv:2506.01347): numbers, the loss and the logits, what it refuses."""

import math
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.negative_reinforcement import NegativeReinforcement

from ..term_batches import Processes, first_stage, groups_view, make_step, mean_over, surrogate, token_batch

NAN = math.nan


def shaped(*groups: list[float], **settings) -> list[float]:
    return first_stage(NegativeReinforcement(**settings), groups_view(*groups), {}).advantages.tolist()


@pytest.mark.parametrize(
    ("form", "rewards", "expected"),
    [
        ("weighted", [1, 1, 0, 0], [0.1, 0.1, -1, -1]),
        ("weighted", [0, 0, 0, 0], [-1, -1, -1, -1]),
        ("weighted", [1, 1, 1, 1], [0.1] * 4),
        ("negative", [1, 1, 0, 0], [0, 0, -1, -1]),
        ("positive", [1, 1, 0, 0], [1, 1, 0, 0]),
        ("weighted", [1, NAN, 0, NAN], [0.1, 0, -1, 0]),
        ("negative", [NAN] * 4, [0] * 4),
    ],
)
def test_the_cards_advantages(form, rewards, expected):
    assert shaped(rewards, form=form) == expected


def loss_of(**settings) -> float:
    """On-policy, responses of 2, 4, 3 and 1 tokens, the first two right: the mean over the tokens."""
    step = make_step(dtype=torch.float64)
    step = replace(
        step,
        mask=torch.arange(6) < torch.tensor([2, 4, 3, 1]).repeat(2).unsqueeze(1),
        rewards=torch.tensor([1.0, 1.0, 0.0, 0.0] * 2, dtype=torch.float64),
        logps=step.old_logps,
    )
    view = groups_view([1, 1, 0, 0], logps=[[0.0] * n for n in (2, 4, 3, 1)])
    a = first_stage(NegativeReinforcement(**settings), view, {}).advantages
    batch = token_batch(step, slice(0, 4))
    return mean_over(batch.mask, surrogate(batch, a.unsqueeze(1).expand(4, 6))).item()


def test_the_cards_token_losses():
    assert loss_of() == pytest.approx((-0.1 * 6 + 1 * 4) / 10)  # 0.34
    assert loss_of(form="negative") == pytest.approx(0.4)
    assert loss_of(form="negative", mean_over="kept") == pytest.approx(1.0)
    assert loss_of(form="positive", mean_over="kept") == pytest.approx(-1.0)


def test_the_cards_logits():
    """The second of three tokens, p = 0.6, 0.3, 0.1, in a wrong response, ratio 1."""
    [a] = shaped([0], form="negative")
    z = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log().requires_grad_()
    logp = z.log_softmax(0)[1]
    (-a * (logp - logp.detach()).exp()).backward()
    assert z.grad.tolist() == pytest.approx([-0.6, 0.7, -0.1])


def test_kept_is_of_the_whole_step_and_of_the_losss_own_mean():
    step, term = make_step(), NegativeReinforcement(form="negative", mean_over="kept", right_at=0.5)
    # wrong: the second, the fourth, the seventh and the eighth: 4 + 3 + 1 + 5 of 32 tokens
    alone = term.on_rollout(Processes(1).views(step, [6])[0], {}).advantages
    assert alone.tolist() == pytest.approx([-32 / 13 * wrong for wrong in (0, 1, 0, 1, 0, 0, 1, 1)])
    processes = Processes(2)
    views = processes.views(step, [6, 5])
    both = processes.run(lambda rank: term.on_rollout(views[rank], {}).advantages)
    assert torch.equal(torch.cat(both), alone)
    # a mean over responses of their means: four of eight
    view = replace(Processes(1).views(step, [6])[0], loss_mean="sequences")
    assert term.on_rollout(view, {}).advantages.tolist() == pytest.approx([-2.0 * (a < 0) for a in alone.tolist()])


def test_rewards_that_are_not_0_or_1_are_told(caplog: pytest.LogCaptureFixture):
    assert shaped([1, 0.5, -1, 0]) == [0.1, -1, -1, -1]
    [sentence] = [record.message for record in caplog.records]
    assert sentence.startswith("negative_reinforcement: rewards should be 0 or 1, 2 of 4 are neither, such as 0.5")
    assert shaped([1, 0.5, -1, 0], right_at=0.5) == [0.1, 0.1, -1, -1]
    assert len(caplog.records) == 1


def test_what_it_seeks():
    assert NegativeReinforcement().seeks == NegativeReinforcement(form="negative").seeks == "more"
    assert NegativeReinforcement(form="positive").seeks == NegativeReinforcement(lam=3.0).seeks == "less"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lam": -0.1}, "lam must be finite and at least 0, got -0.1"),
        ({"lam": math.inf}, "lam must be finite and at least 0, got inf"),
        (
            {"mean_over": "kept"},
            "mean_over: kept belongs to form: negative or positive; weighted leaves nothing out",
        ),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        NegativeReinforcement(**wrong)
    assert str(error.value) == sentence
