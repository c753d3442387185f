"""Invariants 1 to 3: without terms, and with terms at coef 0, the trainers are TRL's, bit for bit."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from hclm_rl import known_terms

from ..tiny import ALONE, LOSSES, largest_difference, make, weights_after, weights_of

OFF_POLICY = {"num_iterations": 2, "beta": 0.04, "max_steps": 4}
VARIANTS = {
    **{f"{loss} off-policy with KL": {"loss_type": loss, **OFF_POLICY} for loss in LOSSES},
    **{
        f"{loss} with LoRA and checkpointing": {
            "loss_type": loss,
            "lora": True,
            "gradient_checkpointing": True,
            **OFF_POLICY,
        }
        for loss in LOSSES
    },
    "on-policy, accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "two steps a generation batch": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
    "sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "luspo as in its paper": {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "gradient checkpointing": {"gradient_checkpointing": True, "num_iterations": 2},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "num_iterations": 2,
    },
    "LoRA with dropout, KL": {"lora": True, **OFF_POLICY},
    "LoRA with dropout, KL, on-policy": {"lora": True, "beta": 0.04},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8},
    "Adam": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "rloo": {"algorithm": "rloo"},
    "rloo off-policy with KL, accumulated": {
        "algorithm": "rloo",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        **OFF_POLICY,
    },
}


def run(policy: str, out: Path, *, ours: bool, terms: list | None = None, **changes) -> dict[str, torch.Tensor]:
    more = {}
    if changes.pop("lora", False):
        more["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.2, task_type="CAUSAL_LM"
        )
    if "eval_strategy" in changes:
        from ..tiny import prompts

        more["eval_dataset"] = prompts(2)
    return weights_after(policy, out, ours=ours, terms=terms, trainer=more, **changes)


@pytest.fixture(scope="module")
def stock(policy: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """TRL's own weights after training, once per variant."""
    return {
        name: run(policy, tmp_path_factory.mktemp("stock"), ours=False, **changes) for name, changes in VARIANTS.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_chain_is_trl_bit_for_bit(variant: str, policy: str, stock: dict, tmp_path: Path):
    assert largest_difference(run(policy, tmp_path, ours=True, **VARIANTS[variant]), stock[variant]) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_terms_at_coef_zero_are_trl_bit_for_bit(variant: str, policy: str, stock: dict, tmp_path: Path):
    terms = [{name: {"coef": 0.0, **ALONE.get(name, {})}} for name in known_terms()]
    weights = run(policy, tmp_path, ours=True, terms=terms, **VARIANTS[variant])
    assert largest_difference(weights, stock[variant]) == 0.0


@pytest.mark.parametrize("name", known_terms())
def test_each_term_at_coef_zero_is_trl_bit_for_bit(name: str, policy: str, stock: dict, tmp_path: Path):
    variant = "dapo off-policy with KL"
    weights = run(policy, tmp_path, ours=True, terms=[{name: {"coef": 0.0}}], **VARIANTS[variant])
    assert largest_difference(weights, stock[variant]) == 0.0


def test_the_weights_moved(policy: str, stock: dict, tmp_path: Path):
    start = weights_of(make(policy, tmp_path))
    for variant, weights in stock.items():
        if "LoRA" not in variant:
            assert largest_difference(start, weights) > 1e-4, variant


@pytest.mark.parametrize("coef", [0.01, 0.3])
def test_the_plain_bonus_is_trls_entropy_coef_bit_for_bit(coef: float, policy: str, tmp_path: Path):
    changes = {"loss_type": "dapo", "num_iterations": 2, "max_steps": 4}
    trls = weights_after(policy, tmp_path / "trl", ours=False, entropy_coef=coef, **changes)
    ours = weights_after(policy, tmp_path / "ours", terms=[{"entropy_bonus": {"coef": coef}}], **changes)
    plain = weights_after(policy, tmp_path / "plain", **changes)
    assert largest_difference(trls, ours) == 0.0
    assert largest_difference(trls, plain) > 1e-4


def test_the_adaptive_bonus_is_trls_adaptive_entropy_bit_for_bit(policy: str, tmp_path: Path):
    # the tiny policy's entropy is near 3 nats: target 5 is reached from below, so the coefficient rises every step
    changes = {"loss_type": "dapo", "max_steps": 4}
    trls = weights_after(
        policy,
        tmp_path / "a",
        ours=False,
        use_adaptive_entropy=True,
        entropy_target=5.0,
        entropy_coef_delta=0.1,
        **changes,
    )
    coef = {"kind": "step_to_target", "target": 5.0, "delta": 0.1}
    ours = weights_after(policy, tmp_path / "b", terms=[{"entropy_bonus": {"coef": coef}}], **changes)
    assert largest_difference(trls, ours) == 0.0
    assert largest_difference(trls, weights_after(policy, tmp_path / "c", **changes)) > 1e-4
