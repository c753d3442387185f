"""What hclm_rl leans on in TRL, transformers and accelerate: when one of them moves, this says where."""

import inspect

import pytest
import trl
from packaging.version import Version
from transformers import PreTrainedModel, Trainer

from hclm_rl.trainer.mixin import EntropyTermsMixin

TRAINERS = [trl.GRPOTrainer, trl.RLOOTrainer]


def test_the_version_of_trl():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17")


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (
            "evaluation_loop",
            ["self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ),
    ],
)
def test_signatures_that_are_overridden(trainer: type, name: str, parameters: list[str]):
    found = list(inspect.signature(inspect.unwrap(getattr(trainer, name))).parameters)
    assert found == parameters, f"TRL changed {trainer.__name__}.{name}: {found}; hclm_rl/trainer/mixin.py overrides it"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_scoring_method_takes_what_our_own_pass_gives_it(trainer: type):
    found = list(inspect.signature(inspect.unwrap(trainer._get_per_token_logps_and_entropies)).parameters)
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert found[:7] == expected, f"TRL changed {trainer.__name__}._get_per_token_logps_and_entropies: {found}"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_loss_asks_for_log_probs_before_it_reads_advantages(trainer: type):
    source = inspect.getsource(inspect.unwrap(trainer._compute_loss))
    asks, reads = source.index("_get_per_token_logps_and_entropies("), source.index('inputs["advantages"]')
    assert asks < reads, f"{trainer.__name__}._compute_loss reads advantages first: shaping in between is lost"
    assert source.count("_get_per_token_logps_and_entropies(") == 1


def test_every_override_exists_upstream():
    # a method that TRL never calls is a silent no-op
    added = "sample_responses"  # the one public method of our own
    own = [name for name in vars(EntropyTermsMixin) if not name.startswith(("_hclm", "__", added))]
    assert not any(hasattr(trainer, added) for trainer in (trl.GRPOTrainer, trl.RLOOTrainer))
    for trainer in TRAINERS:
        for name in own:
            assert hasattr(trainer, name), f"{trainer.__name__} has no {name}: the override is never called"


def test_no_name_of_ours_collides():
    ours = [name for name in vars(EntropyTermsMixin) if name.startswith("_hclm")]
    for trainer in [*TRAINERS, Trainer]:
        assert not [name for name in ours if hasattr(trainer, name)]


def test_loss_scaling_for_accumulation():
    assert trl.GRPOTrainer.loss_is_scaled_for_ga is True
    assert trl.RLOOTrainer.loss_is_scaled_for_ga is False


def test_backbones_are_found_by_base_model():
    assert isinstance(inspect.getattr_static(PreTrainedModel, "base_model"), property)
