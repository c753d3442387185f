"""What the doctor says of casts, narrow weights, samplers that disagree and masked vocabularies."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hclm_rl.commands.doctor import examine
from hclm_rl.commands.dry_run import DryRun, Sizes, dry_run
from hclm_rl.commands.precision import lost_updates, of_precision, sampler_notes

from ..tiny import make
from .test_doctor import recipe


def run_of(policy: str | LlamaForCausalLM, out: Path, **changes) -> DryRun:
    trainer = make(policy, out, learning_rate=0.0, max_steps=9, **changes)  # type: ignore[arg-type]
    return dry_run(trainer, Sizes(rows=8, pieces=1, updates=1, group=4, is_whole=True), 1, 1, 1e-3)


def test_float32_says_nothing(policy: str, tmp_path: Path):
    assert of_precision(run_of(policy, tmp_path)) == ([], [])


def test_casts_are_named_with_what_they_change(policy: str, tmp_path: Path):
    mistakes, [note] = of_precision(run_of(policy, tmp_path, bf16=True))
    assert mistakes == [] and note.startswith("bf16 casts change the policy's log-probs by ")
    off = float(note.split(" by ")[1].split()[0])
    assert 1e-4 < off < 0.1  # eight bits: a part in 256 of logits of about 1


def test_narrow_weights_are_named_with_what_they_lose(policy: str, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.bfloat16, attn_implementation="eager")
    run = run_of(model, tmp_path, model_init_kwargs=None)
    before = {name: each.clone() for name, each in run.trainer.model.named_parameters()}
    mistakes, [casts, lost] = of_precision(run)
    assert mistakes == [] and casts.startswith("bfloat16 weights change the policy's log-probs by ")
    assert "an update of 0.001, which is about Adam's at this learning rate, is rounded away on " in lost
    after = dict(run.trainer.model.named_parameters())
    assert all(torch.equal(after[name], each) and after[name].dtype == torch.bfloat16 for name, each in before.items())


def test_lost_updates_by_hand():
    # bfloat16 has 8 bits: next to 1 the spacing is 2^-7, next to .25 2^-9; .003 is under half of the one, not the other
    weights = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.bfloat16))
    assert "is rounded away on 75 % of the bfloat16 weights" in lost_updates([weights], 0.003)


def test_a_masked_vocabulary_is_a_mistake(policy: str, tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(policy, attn_implementation="eager")
    head = torch.nn.Linear(16, 26)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias = torch.nn.Parameter(torch.tensor([0.0] * 20 + [-math.inf] * 6), requires_grad=False)
    model.lm_head = head
    [mistake], notes = of_precision(run_of(model, tmp_path, model_init_kwargs=None))
    assert mistake.startswith("6 of the 26 ids of the vocabulary have a logit of -inf") and notes == []


def test_a_sampler_that_disagrees():
    key = "sampling/sampling_logp_difference"
    log = [{f"{key}/mean": 0.01, f"{key}/max": 0.2}, {f"{key}/mean": 0.03, f"{key}/max": 1.5}]
    [note] = sampler_notes(log)
    assert note.startswith(
        "the sampler's log-probs differ from the trainer's by 0.02 nats a token in the mean and 1.5 at"
    )
    assert sampler_notes([{"entropy": 1.0}]) == [] and sampler_notes([{f"{key}/mean": 0.0, f"{key}/max": 0.0}]) == []


@pytest.mark.parametrize("share", ["max_completion_length: 3\n"])
def test_all_cut_off_is_a_share_of_1(share: str, tmp_path: Path):
    found = examine(recipe(tmp_path, more=share), prompts=1, steps=1)
    assert found.cut_off == 1.0 and found.mistakes[0].startswith("all responses of the dry run were cut off")
