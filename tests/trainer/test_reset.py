"""ProRL's reset against its card (arXiv:2505.24864): numbers, what is copied, when, and a run that is resumed."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
import yaml
from peft import LoraConfig

from hclm_rl import ResetReference
from hclm_rl.commands.callbacks import reset_of
from hclm_rl.commands.launch import callbacks_of
from hclm_rl.recipe.arguments import parse
from hclm_rl.trainer.reset import RESET, file_of, forget, has_stalled, pairs_of_weights

from ..tiny import largest_difference, make, weights_of

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "beta": 0.5, "max_steps": 5}
SAVING = {"save_strategy": "steps", "save_steps": 1}


def run(policy: str, out: Path, reset: ResetReference | None = None, checkpoint: str | None = None, **changes):
    """A trained trainer."""
    given = changes.pop("trainer", {}) | ({} if reset is None else {"callbacks": [reset]})
    trainer = make(policy, out, trainer=given, **{**ADAM, **changes})
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def kls(trainer) -> list[float]:
    return [float(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry]


def test_the_cards_validation():
    values = [40.0, 42.0, 43.0, 43.0, 42.5, 43.0]
    # after the fifth the best of the last three, 43, is above 42; after the sixth 43 is not above 43
    assert [has_stalled(values[:n], n, 3, 0.0) for n in range(1, 7)] == [False] * 5 + [True]
    assert has_stalled(values[:5], 5, 3, 1.0)  # a gain of 1 is not above 1
    assert not has_stalled([*values, 43.0], 1, 3, 0.0)  # counted anew after a reset
    assert has_stalled([*values, 43.0, 41.0, 42.0], 3, 3, 0.0)


def adam_step(keeps_scale: bool | None) -> float:
    """The size of the step after the card's 1000, in units of the rate."""
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.999), eps=0.0)
    moments = {"exp_avg": weight.new_tensor([0.5]), "exp_avg_sq": weight.new_tensor([0.04])}
    optimizer.state[weight] = {"step": torch.tensor(1000.0), **{k: v.detach() for k, v in moments.items()}}
    if keeps_scale is not None:
        forget(optimizer, keeps_scale)
    weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()
    return -weight.item()


def test_the_cards_step_of_adam():
    # m = 0.46, v = 0.03997, over 1 - 0.999^1001; printed to six digits
    assert adam_step(None) == pytest.approx(1.830122, abs=5e-7)
    assert adam_step(keeps_scale=False) == pytest.approx(1.0)
    # m = 0.01, the same v
    assert adam_step(keeps_scale=True) == pytest.approx(0.01 / math.sqrt(0.03997 / (1 - 0.999**1001)))


def test_an_optimiser_without_moments_has_no_scale_to_keep():
    optimizer = SimpleNamespace(state={0: {"momentum_buffer": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"keeps_scale is for Adam and its kin.* keeps momentum_buffer"):
        forget(optimizer, keeps_scale=True)


def test_the_policy_becomes_the_reference_and_the_optimiser_forgets(policy: str, tmp_path: Path):
    plain = run(policy, tmp_path / "plain")
    reset = run(policy, tmp_path / "reset", ResetReference(steps=[2]))
    # the KL to the start grows; the rollout after step 2 is scored by the new reference
    before, after = kls(plain), kls(reset)
    assert before[:2] == after[:2] and after[2] == pytest.approx(0, abs=1e-6) and before[2] > 1e-3
    assert {entry["step"]: entry[RESET] for entry in reset.state.log_history if RESET in entry} == {2: 1}
    steps = {float(moments["step"]) for moments in reset.optimizer.state.values()}
    assert steps == {3.0}  # of five
    assert not (tmp_path / "reset/reference").exists()  # which saves no checkpoint


def test_a_copy_of_everything(policy: str, tmp_path: Path):
    trainer = run(policy, tmp_path, ResetReference(every=2))
    assert [entry["step"] for entry in trainer.state.log_history if RESET in entry] == [2, 4]
    # one step was made since
    assert 0 < max(float((a - b).detach().abs().max()) for a, b in pairs_of_weights(trainer)) < 0.011
    assert len(list(pairs_of_weights(trainer))) == len(weights_of(trainer))


def test_an_adapter_has_a_frozen_copy(policy: str, tmp_path: Path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = run(policy, tmp_path, ResetReference(steps=[3]), trainer={"peft_config": config})
    assert kls(trainer)[3] < 1e-6 < 1e-5 < kls(trainer)[2]
    assert "ref" in trainer.model.peft_config and trainer.model.active_adapters == ["default"]
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained and not any(".ref." in name for name in trained)


@pytest.mark.parametrize("has_adapter", [False, True])
def test_a_run_that_is_resumed_is_the_one_that_was_not(has_adapter: bool, policy: str, tmp_path: Path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    more = {"trainer": {"peft_config": config}} if has_adapter else {}
    whole = run(policy, tmp_path / "whole", ResetReference(steps=[2]), **more, **SAVING)
    for step in (2, 3):  # just after the reset, and later; in a folder of its own, which then has the reference too
        out, checkpoint = tmp_path / f"from {step}", str(tmp_path / f"whole/checkpoint-{step}")
        resumed = run(policy, out, ResetReference(steps=[2]), checkpoint, **more, **SAVING)
        assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0, step
        assert kls(whole) == kls(resumed) and file_of(out, 2).is_file()
    file_of(tmp_path / "whole", 2).unlink()
    with pytest.raises(ValueError, match=r"reference was reset at step 2, and .* which keeps it, is not there"):
        run(policy, tmp_path / "lost", ResetReference(steps=[2]), str(tmp_path / "whole/checkpoint-3"), **more)


def test_references_that_no_checkpoint_needs_are_taken_away(policy: str, tmp_path: Path):
    run(policy, tmp_path, ResetReference(every=1), **SAVING, save_total_limit=2)
    # checkpoints 4 and 5; at the reset of step 4 there were 2 and 3
    assert sorted(each.name for each in (tmp_path / "reference").iterdir()) == [
        f"step-{n}.safetensors" for n in (2, 3, 4)
    ]


def test_a_stall_is_found_in_evaluations(policy: str, tmp_path: Path):
    from ..tiny import prompts

    reset = ResetReference(patience=1, min_gain=100.0)  # which no step gains
    given = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8, "num_generations_eval": 1}
    trainer = run(policy, tmp_path, reset, trainer={"eval_dataset": prompts(8)}, warmup_steps=2, **given)
    # the first has none before it, the second lies within the warm-up, the fifth is the end
    assert [entry["step"] for entry in trainer.state.log_history if RESET in entry] == [3, 4]
    trainer.evaluate()  # on one's own, it resets nothing
    unknown = ResetReference(patience=1, metric="eval_accuracy")
    with pytest.raises(ValueError, match="no evaluation has the metric 'eval_accuracy'; there are eval_loss"):
        run(policy, tmp_path, unknown, trainer={"eval_dataset": prompts(8)}, **given)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({}, "needs `every`, `steps` or `patience`: when it is to reset"),
        ({"every": 0}, "every of reset_reference must be whole numbers of at least 1, got 0"),
        ({"steps": [2, 0]}, "steps of reset_reference must be whole numbers of at least 1, got 0"),
        ({"patience": True}, "patience of reset_reference must be whole numbers of at least 1, got True"),
        ({"patience": 1, "min_gain": -1.0}, "min_gain of reset_reference must be a number >= 0, got -1.0"),
        ({"patients": 1}, "reset_reference has no 'patients'; it has: patience, "),
    ],
)
def test_what_it_refuses(given: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        reset_of(given)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"beta": 0.0}, "reset_reference has no reference to reset: set beta, the strength of the KL to it, above 0"),
        ({"sync_ref_model": True}, "reset_reference beside sync_ref_model: both move the reference"),
        ({"warmup_steps": 4}, "steps holds 2, within the warm-up of the rate, which is over after step 4"),
    ],
)
def test_runs_that_it_refuses(changes: dict, sentence: str, policy: str, tmp_path: Path):
    with pytest.raises(ValueError, match=sentence):
        run(policy, tmp_path, ResetReference(steps=[2, 5]), **changes)


def test_patience_needs_evaluations_and_trls_own_trainer_is_refused(policy: str, tmp_path: Path):
    with pytest.raises(ValueError, match="patience looks at evaluations, and this run makes none: set eval_strategy"):
        run(policy, tmp_path, ResetReference(patience=2))
    with pytest.raises(ValueError, match="works with the GRPOTrainer and RLOOTrainer of hclm_rl"):
        run(policy, tmp_path, ResetReference(every=2), ours=False)
    assert issubclass(trl.GRPOTrainer, object)


@pytest.mark.parametrize("terms", [[{"rep_exp": {}}], [{"unsolved_kl": {}}]])
def test_terms_that_compare_with_the_start_are_told_of(terms: list, policy: str, tmp_path: Path, caplog):
    run(policy, tmp_path, ResetReference(steps=[2]), terms=terms, max_steps=3)
    [name] = terms[0]
    assert f"after a reset {name} compares with the policy at that step, not at the start" in caplog.text


def test_a_recipe_names_it(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"task": "coins", "beta": 0.1, "reset_reference": {"every": 3}, "use_cpu": True}))
    arguments, config, *_ = parse("grpo", ["--config", str(recipe)])
    [found] = [each for each in callbacks_of(tmp_path, None, arguments, config) if isinstance(each, ResetReference)]
    assert found.every == 3
    arguments, config, *_ = parse(
        "grpo", ["--config", str(recipe), "--reset_reference", '{"steps": [5]}', "--beta", "0.0"]
    )
    with pytest.raises(ValueError, match="reset_reference has no reference to reset"):
        callbacks_of(tmp_path, None, arguments, config)
