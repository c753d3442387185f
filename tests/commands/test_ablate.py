"""`hclm-rl ablate`: a step without parts of its tokens, put back; what a score said beside what they did."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

from hclm_rl.commands.ablation import SCORES, Ablation, Step, ablated, prepared, sorted_parts
from hclm_rl.commands.cli import main

from .test_doctor import recipe

SGD = "optim: sgd\nmax_grad_norm: 0.0\nlearning_rate: 1.0e-4\n"


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """A step of plain SGD, in float64."""
    folder = tmp_path_factory.mktemp("ablate")
    return prepared(recipe(folder, more=SGD), str(folder), prompts=4, batches=3).in_float64()


def test_parts_are_all_trained_tokens_once_by_the_score(step: Step):
    parts = sorted_parts(step, "head", 10)
    counts = [int(part.sum()) for part in parts]
    assert torch.equal(torch.stack(parts).sum(dim=0) == 1, step.trained) and max(counts) - min(counts) <= 1
    ends = [(step.batch.scores["head"][part].min(), step.batch.scores["head"][part].max()) for part in parts]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ends))


def test_the_rollouts_held_out_are_of_other_prompts(step: Step):
    asked = set(step.batch.prompts)
    assert step.held_out and not any(asked & set(each.prompts) for each in step.held_out)
    assert all(len(each.prompts) == len(each.mask) == len(each.transcript.ids) for each in step.held_out)


def test_what_the_parts_do_adds_up_to_what_the_step_does(step: Step):
    # a small step of SGD is linear in its gradient, and the gradient is the sum of the parts'
    found = ablated(step, "logits", "r", parts=4)
    # TRL's head gives entropies in float32, 1e-7 each
    assert abs(found.step) > 5e-6 and sum(found.did) == pytest.approx(found.step, abs=5e-7)
    assert found.tokens == int(step.trained.sum()) and found.entropy == pytest.approx(0.44, abs=0.1)


def test_the_parts_move_the_entropy_as_its_gradient_says(step: Step):
    # <grad H, -lr g_part> by autograd, beside the entropy measured after steps with and without the part
    parts = sorted_parts(step, "head", 3)
    model, held = step.trainer.model, step.held_out
    model.zero_grad()
    total, count = 0.0, sum(int(each.mask.sum()) for each in held)
    for each in held:
        ids = torch.cat([each.transcript.prompt_ids, each.transcript.ids], dim=1)
        seen = torch.cat([each.transcript.prompt_mask, each.transcript.present], dim=1).long()
        states = model.base_model(input_ids=ids, attention_mask=seen).last_hidden_state[:, -each.mask.size(1) - 1 : -1]
        logps = model.lm_head(states).log_softmax(-1)
        total = total - torch.where(each.mask, (logps.exp() * logps).sum(-1), 0).sum() / count
    pull = torch.autograd.grad(total, step.parameters)  # type: ignore[arg-type]
    expected = [
        -step.learning_rate * sum((a * b).sum().item() for a, b in zip(pull, step.gradient(part), strict=True))
        for part in parts
    ]
    # TRL's head gives entropies in float32, so a change below 2e-7 is rounding
    assert max(map(abs, expected)) > 2e-5 and step.moved_by(parts) == pytest.approx(expected, rel=0.02, abs=2e-7)


def test_model_and_optimiser_are_put_back(tmp_path: Path):
    step = prepared(recipe(tmp_path, more="learning_rate: 1.0e-3\n"), str(tmp_path), prompts=4, batches=2)
    before = [p.detach().clone() for p in step.parameters], copy.deepcopy(step.optimizer.state_dict())
    assert before[1]["state"][0]["step"] == 2 and before[1]["state"][0]["exp_avg"].any()  # Adam's memory of dry steps
    ablated(step, "steer", "r", parts=2)
    after = step.optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before[0], step.parameters, strict=True))
    assert all(torch.equal(of[key], after["state"][i][key]) for i, of in before[1]["state"].items() for key in of)
    assert [group["lr"] for group in after["param_groups"]] == [0.0] * len(after["param_groups"])
    assert all(p.grad is None or not p.grad.any() for p in step.parameters)


def test_the_rank_correlation():
    found = Ablation(
        score="head", recipe="r", tokens=3, held_out=1, entropy=0.4, step=0.0, said=[1.0, 2.0, 3.0], did=[0.1, 0.3, 0.2]
    )
    assert found.correlation == pytest.approx(1 - 6 * 2 / (3 * 8))  # 1 - 6 sum d^2 / (n (n^2 - 1)), d = 0, 1, -1


def test_the_command_prints_the_correlation_beside_the_claim(tmp_path: Path, capsys: pytest.CaptureFixture):
    line = ["ablate", *recipe(tmp_path), "--prompts", "2", "--batches", "2", "--parts", "3", "--score", "head"]
    assert main(line) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "Claim: tokens with a lower score burn more entropy. Rank correlation of score and change over 3 parts:" in out
    )
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["said"]) == len(found["did"]) == 3 and -1 <= found["correlation"] <= 1
    assert found["said"] == sorted(found["said"])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--parts", "1"], "--parts, --prompts and --batches must be at least 2, got 1, 16 and 4"),
        (
            ["--prompts", "16", "--batches", "2"],
            "no prompt is held out: give data with more prompts than one step takes",
        ),
        (["--prompts", "2", "--batches", "2", "--parts", "5000"], "5000 parts need as many tokens with an advantage"),
        (["--entropy_terms", "[]", "--learning_rat", "1"], "learning_rat"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["ablate", *recipe(tmp_path), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_the_scores_are_named():
    assert list(SCORES) == ["logits", "head", "steer", "log_det"]
