"""What is kept of the hidden states between the scoring pass and stage 1: once, and only where somebody asks."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch

from hclm_rl import Effect, Term
from hclm_rl.recipe.config import build_chain
from hclm_rl.trainer import mixin
from hclm_rl.trainer.hooks import Seen
from hclm_rl.trainer.states import Packing, Shuffled

from ..counted import Counted
from ..tiny import make

CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}  # the first stage cannot wait for the loss
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()


def test_a_scoring_pass_leaves_its_tokens_states_and_nothing_else():
    width, prompt = 1000, 5
    passes = torch.randn(6, prompt + 3, width, generator=torch.Generator().manual_seed(0)).split(2)
    packing = Packing(MASK)
    with Counted() as seen:
        for each in passes:
            packing.take(each)
    packed = packing.packed()
    assert packed is not None
    expected = torch.cat([each[:, -4:-1] for each in passes])
    assert torch.equal(packed.rows, expected[MASK]) and torch.equal(packed.of(MASK), expected[MASK])
    assert torch.equal(packed.whole()[MASK], expected[MASK]) and (packed.whole()[~MASK] == 0).all()
    of_rows = 11 * width * 4  # 11 tokens
    assert of_rows <= seen.held < 1.1 * of_rows  # the prompts' are not kept
    assert seen.peak < of_rows + 6 * width * 4  # beside them one pass's at most, 5 of the 11: no concatenation
    # of a tool's tokens the first stage reads none
    assert torch.equal(packed.of(MASK & (torch.arange(3) != 1)), expected[MASK & (torch.arange(3) != 1)])


def test_what_all_tokens_count_in_is_not_copied():
    packing = Packing(MASK)
    packing.take(torch.randn(6, 8, 4))
    packed = packing.packed()
    assert packed is not None and packed.of(MASK) is packed.rows


def test_the_losss_own_states_are_not_copied_and_come_in_the_order_of_the_generation():
    states = torch.arange(6.0).view(6, 1, 1).expand(6, 9, 2).clone()
    hidden = Seen(states=[states]).hidden(3)
    assert hidden is not None and hidden.untyped_storage().data_ptr() == states.untyped_storage().data_ptr()
    row = torch.tensor([2, 0, 1, 5, 4, 3])  # of the generation batch, in the micro-batch's order
    shuffled = Shuffled(hidden, row.argsort())
    in_order = hidden[row.argsort()]
    assert torch.equal(shuffled.whole(), in_order) and torch.equal(shuffled.of(MASK), in_order[MASK])


class SecondStageOnly(Term):
    """Declares hidden states and reads them in its second stage."""

    needs_hidden: ClassVar[bool] = True

    def __call__(self, batch, memory) -> Effect:
        return Effect(metrics={"size": batch.hidden().square().mean()})


READS = {
    "information_force": True,
    "log_det": False,  # the moments alone: test_passing.py
    "force_reweight": True,  # the next-token distribution of the sampling policy
    "siren": True,
    "feature_softmax": False,
    "forking_tokens": False,
}


@pytest.mark.parametrize("name", READS)
def test_who_reads_the_sampling_policys_states(name: str):
    assert bool(build_chain([name]).needs_sampled_states) == READS[name]


@pytest.mark.parametrize(
    "terms", [["information_force"], ["forking_tokens", SecondStageOnly()]], ids=["asked", "not asked"]
)
def test_the_first_stage_is_given_states_where_a_term_asks(terms: list, policy: str, tmp_path: Path, monkeypatch):
    seen = []

    def told(trainer, output, generation, scores):
        seen.append((output, scores))
        return stage_one(trainer, output, generation, scores)

    stage_one = mixin.stage_one
    monkeypatch.setattr(mixin, "stage_one", told)
    make(policy, tmp_path, terms=terms, fixed=True, **CUT).train()
    assert len(seen) == 2
    for output, scores in seen:
        assert scores.hidden is None
        if terms == ["information_force"]:
            assert len(scores.states.rows) == output["completion_mask"].sum() < output["completion_mask"].numel()
        else:
            assert scores.states is None


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_the_references_pass_is_none_of_the_policy(algorithm: str, policy: str, tmp_path: Path, monkeypatch):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    passes = []

    class Watched(Packing):
        def __init__(self, present):
            passes.append(present)
            super().__init__(present)

    monkeypatch.setattr("hclm_rl.trainer.hooks.Packing", Watched)
    # off-policy, so that TRL scores with the policy itself, and then with its reference through the same model
    changes = {"beta": 0.1, "steps_per_generation": 2} | CUT | {"gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = make(
        policy, tmp_path, algorithm=algorithm, terms=["information_force"], trainer={"peft_config": lora}, **changes
    )
    trainer.train()
    assert len(passes) == 1
