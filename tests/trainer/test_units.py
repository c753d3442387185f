"""The trainer's small parts, each by itself, on a made-up trainer of two processes and numbers worked by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from hclm_rl import Linear, Link, Rollout, Term
from hclm_rl.chain.chain import Chain
from hclm_rl.chain.state import ChainState
from hclm_rl.terms.spectrum import Spectrum
from hclm_rl.trainer import stage_one, stage_two
from hclm_rl.trainer.hooks import Seen
from hclm_rl.trainer.mixin import EntropyTermsMixin
from hclm_rl.trainer.run import Generation, Run, Scores, generator, mask_of, progress, strengths
from hclm_rl.trainer.stage_one import catch_up, renormalise, rollout_of
from hclm_rl.trainer.stage_two import share_of_step, token_batch
from hclm_rl.watch.trace import Trace

from ..tiny import make

NAN = math.nan


def made_up(
    step: int = 6, rank: int = 0, processes: int = 2, links: tuple[Link, ...] = (), **changes
) -> SimpleNamespace:
    """Eight responses in groups of four, a half on each process; step 6 of 8."""
    chain = Chain(links)
    trace = Trace(folder=Path(), steps=(), every=None)
    given = {
        "_hclm": Run(chain=chain, state=ChainState.fresh(chain), trace=trace),
        "args": SimpleNamespace(
            seed=3,
            steps_per_generation=4,
            per_device_train_batch_size=2,
            num_iterations=2,
            gradient_accumulation_steps=2,
        ),
        "state": SimpleNamespace(global_step=step, max_steps=8),
        "accelerator": SimpleNamespace(
            process_index=rank,
            num_processes=processes,
            device=torch.device("cpu"),
            reduce=lambda x, reduction: x,
        ),
        "num_generations": 4,
        "_hclm_is_sequence_level": lambda: False,
        "reward_weights": torch.tensor([1.0, 0.5]),
        "current_gradient_accumulation_steps": 2,
        "loss_is_scaled_for_ga": True,
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.3,
        "_tokenizer": None,
        "_hclm_reward_scale": lambda rewards: torch.full_like(rewards, 2.0),
        "_hclm_centre": lambda rewards: rewards - rewards.nanmean(),
    }
    return SimpleNamespace(**{**given, **changes})


def numbers(device_generator: torch.Generator) -> list[float]:
    return torch.rand(4, generator=device_generator).tolist()


def test_every_link_stage_step_and_seed_has_a_generator_of_its_own():
    first = numbers(generator(made_up(), "rollout", "a"))
    assert numbers(generator(made_up(rank=1), "rollout", "a")) == first, "the same on every process"
    others = [
        generator(made_up(), "rollout", "b"),
        generator(made_up(), "micro-batch 0", "a"),
        generator(made_up(step=7), "rollout", "a"),
        generator(made_up(args=SimpleNamespace(seed=4)), "rollout", "a"),
    ]
    drawn = [first, *map(numbers, others)]
    assert all(drawn.count(each) == 1 for each in drawn)


def test_progress_is_the_share_of_the_steps_that_are_done():
    assert progress(made_up()) == 0.75


def test_strengths_are_made_anew_at_each_step_and_kept_within_it():
    link = Link(name="a", term=Term(), coef=Linear(start=8.0, end=0.0))
    trainer = made_up(links=(link,), step=2)
    found = strengths(trainer)
    assert found.coefs == {"a": 6.0} and strengths(trainer) is found  # 8 (1 - 2 / 8)
    trainer.state.global_step = 3
    assert strengths(trainer).coefs == {"a": 5.0}


def test_what_a_tool_wrote_counts_as_padding_does():
    batch = {"completion_mask": torch.tensor([[1, 1, 1, 0]]), "tool_mask": torch.tensor([[1, 0, 1, 1]])}
    assert mask_of(batch).tolist() == [[True, False, True, False]]
    assert mask_of({"completion_mask": torch.tensor([[1, 1, 1, 0]])}).tolist() == [[True, True, True, False]]


def test_the_states_are_those_that_predict_each_token():
    # positions 0 to 4, the response at 3 and 4: position 2 predicts token 3, and 3 predicts 4
    states = torch.arange(5.0).view(1, 5, 1)
    assert Seen(states=[states, states + 10]).hidden(2).flatten().tolist() == [2.0, 3.0, 12.0, 13.0]  # type: ignore[union-attr]


def generated(rank: int) -> tuple[Rollout, torch.Tensor]:
    """A process's rollout; rewards of both processes by two functions, of which some left responses out."""
    parts = torch.tensor(
        [[1.0, 2.0], [0.0, 4.0], [NAN, 2.0], [NAN, NAN], [3.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
    )
    ids = torch.arange(12).view(4, 3)
    output = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones(4, 3, dtype=torch.long),
        "advantages": torch.arange(4.0),
    }
    return rollout_of(made_up(rank=rank), output, Generation(reward_parts=parts), None), parts


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rollout_numbers_its_groups_over_all_processes(rank: int):
    view, _ = generated(rank)
    assert view.group.tolist() == [rank] * 4
    # 1 a + 0.5 b; the third has one reward alone, the fourth none
    rewards = [[2.0, 2.0, 1.0, NAN], [3.0, 1.0, 0.0, 3.0]][rank]
    assert view.rewards.tolist() == pytest.approx(rewards, nan_ok=True)
    for row in view.group_rewards.tolist():
        assert row == pytest.approx(rewards, nan_ok=True)


def test_groups_of_two_that_share_a_process():
    trainer = made_up(rank=1, num_generations=2)
    output = {
        "prompt_ids": torch.zeros(4, 2, dtype=torch.long),
        "completion_ids": torch.zeros(4, 3, dtype=torch.long),
        "completion_mask": torch.ones(4, 3, dtype=torch.long),
        "advantages": torch.zeros(4),
    }
    parts = torch.stack([torch.arange(8.0), torch.zeros(8)], dim=1)
    view = rollout_of(trainer, output, Generation(reward_parts=parts), None)
    assert view.group.tolist() == [2, 2, 3, 3]
    assert view.group_rewards.tolist() == [[4.0, 5.0], [4.0, 5.0], [6.0, 7.0], [6.0, 7.0]]


def test_advantages_of_shaped_rewards_are_centred_and_scaled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_one, "acts_between", lambda args: None)
    # the other process's rewards are 5 and 7: the mean of all is 4, the scale 2
    monkeypatch.setattr(stage_one, "everywhere", lambda trainer, x: torch.cat([x.new_tensor([5.0, 7.0]), x]))
    advantages, scale = renormalise(made_up(rank=1), torch.tensor([1.0, 3.0]))
    assert advantages.tolist() == [-1.5, -0.5] and scale.tolist() == [2.0, 2.0]


def inputs_of(**changes) -> dict:
    """A micro-batch of two responses of two tokens, the last of which is padding."""
    ids = torch.tensor([[1, 2], [3, 0]])
    given = {"completion_ids": ids, "completion_mask": torch.tensor([[1, 1], [1, 0]]), "advantages": torch.ones(2)}
    given |= {"hclm/rewards": torch.zeros(2), "hclm/group_rewards": torch.zeros(2, 4), "hclm/items": torch.tensor(12.0)}
    return {**given, **changes}


def batch_of(inputs: dict, is_on_policy: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage_two, "is_on_policy", lambda args: is_on_policy)
    logps = torch.full((2, 2), -1.0, requires_grad=True) * 1.0
    scores = Scores(logps=logps, entropy=torch.ones(2, 2), hidden=None)
    return token_batch(made_up(), None, inputs, scores, None)


@pytest.mark.parametrize("is_on_policy", [True, False])
def test_old_log_probs_of_the_same_pass_are_detached(is_on_policy: bool, monkeypatch: pytest.MonkeyPatch):
    batch = batch_of(inputs_of(), is_on_policy, monkeypatch)
    assert batch.logps.requires_grad and not batch.old_logps.requires_grad
    assert torch.equal(batch.old_logps, batch.logps)


def test_old_log_probs_are_those_of_the_sampling_policy_where_it_is_another(monkeypatch: pytest.MonkeyPatch):
    given = inputs_of(old_per_token_logps=torch.full((2, 2), -2.0))
    assert (batch_of(given, False, monkeypatch).old_logps == -2.0).all()
    assert (batch_of(given, True, monkeypatch).old_logps == -1.0).all()  # on policy they are the pass's own
    # a micro-batch is 2 of the 4 of a rollout
    assert batch_of(given, True, monkeypatch).share == 0.5


def test_a_loss_is_averaged_over_the_tokens_of_the_optimiser_step():
    # 12 tokens on two processes in four micro-batches, two of which make a step: 12 / 2 * 2 / 4 = 3 tokens of it here
    loss = torch.tensor([[3.0, 6.0], [9.0, NAN]])
    assert share_of_step(made_up(), loss, inputs_of()).item() == pytest.approx((3 + 6 + 9) / 3)
    assert share_of_step(made_up(), torch.tensor(5.0), inputs_of()).item() == 2.5  # a scalar: half of its mean
    # RLOO's trainer divides by the accumulation once more
    again = made_up(loss_is_scaled_for_ga=False)
    assert share_of_step(again, torch.tensor(5.0), inputs_of()).item() == 5.0


def test_a_first_stage_that_waited_sees_the_order_of_the_generation(monkeypatch: pytest.MonkeyPatch):
    reads_states = Link(name="a", term=Spectrum(), coef=Linear(start=1.0, end=1.0))
    trainer, seen = made_up(links=(reads_states,)), []
    trainer._hclm.deferred = ({"of": "rollout"}, Generation())

    def told(trainer, output, generation, scores) -> dict:
        seen.append(scores)
        return {"hclm/column/a/x": scores.logps[:, 0] * 10, "hclm/items": torch.tensor(7)}

    monkeypatch.setattr(stage_one, "stage_one", told)
    # the micro-batch's rows are responses 2, 0, 1
    inputs = {stage_one.ROW: torch.tensor([2, 0, 1])}
    row = torch.tensor([[2.0], [0.0], [1.0]])
    catch_up(trainer, inputs, Scores(logps=row, entropy=row + 0.5, hidden=row.unsqueeze(2) + 0.25))
    assert seen[0].logps.flatten().tolist() == [0.0, 1.0, 2.0]
    assert seen[0].entropy.flatten().tolist() == [0.5, 1.5, 2.5]
    assert seen[0].states.whole().flatten().tolist() == [0.25, 1.25, 2.25]
    assert inputs["hclm/column/a/x"].tolist() == [20.0, 0.0, 10.0] and inputs["hclm/items"] == 7
    assert trainer._hclm.deferred is None


class Stock:
    """A loss that writes into what it was given, as the chain does through it."""

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        inputs["advantages"] = inputs["advantages"] * 2
        self._hclm.outcome = SimpleNamespace(losses={})  # type: ignore[attr-defined]
        return inputs["advantages"].sum()


class Ours(EntropyTermsMixin, Stock):
    def __init__(self, of: SimpleNamespace) -> None:
        vars(self).update(vars(of), model=torch.nn.Linear(1, 1))


def test_a_buffered_batch_is_not_shaped_twice():
    trainer = Ours(made_up(links=(Link(name="a", term=Term(), coef=Linear(start=1.0, end=1.0)),)))
    buffered = {"advantages": torch.ones(3)}
    for _ in range(2):
        assert trainer._compute_loss(None, buffered) == 6.0
    assert torch.equal(buffered["advantages"], torch.ones(3))
    assert trainer._hclm.micro_batches == 2


def test_idle_steps_are_counted_in_a_row_and_for_those_that_are_on(policy: str, tmp_path: Path):
    counted = []

    class Reads(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            counted.append(dict(trainer._hclm.state.idle_steps))

    # one acts at steps 0 and 4, one is absent, one only measures
    terms = [
        "tests.own_terms.Rarely",
        {"tests.own_terms.Rarely": {"name": "absent", "every": 100, "coef": 0}},
        {"spectrum": {}},
    ]
    trainer = make(policy, tmp_path, terms=terms, max_steps=6)
    trainer.add_callback(Reads())
    trainer.train()
    assert [each["Rarely"] for each in counted] == [0, 1, 2, 3, 0, 1]
    assert {each["absent"] for each in counted} == {each["spectrum"] for each in counted} == {0}
