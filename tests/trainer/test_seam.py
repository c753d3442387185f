"""What hclm_rl leans on in TRL, transformers and accelerate: when one of them moves, this says where."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import transformers
import trl
from packaging.version import Version
from transformers import PreTrainedModel, Trainer

import hclm_rl
from hclm_rl.recipe.trl_range import BELOW, LOWEST, other_trl
from hclm_rl.trainer.mixin import EntropyTermsMixin

TRAINERS = [trl.GRPOTrainer, trl.RLOOTrainer]
ROOT = Path(__file__).parents[2]
OURS = {trl.GRPOTrainer: hclm_rl.GRPOTrainer, trl.RLOOTrainer: hclm_rl.RLOOTrainer}


def test_the_version_of_trl():
    assert Version(LOWEST) <= Version(trl.__version__) < Version(BELOW)
    assert f'"trl>={LOWEST},<{BELOW}"' in (ROOT / "pyproject.toml").read_text()
    tested = re.search(r"^TRLS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested is not None and tested[1].split() == ["1.16"]  # every minor version of the range


@pytest.mark.parametrize(
    ("version", "is_allowed"), [("1.15.0", False), ("1.16.0", True), ("1.16.3", True), ("1.17.0", False)]
)
def test_what_is_said_of_a_version(version: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trl, "__version__", version)
    said = f"hclm_rl works with trl>=1.16,<1.17, and trl {version} is installed: pip install 'trl>=1.16,<1.17'"
    assert other_trl() == (None if is_allowed else said)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("save_model", ["self", "output_dir", "_internal_call"]),
        ("_get_train_sampler", ["self", "dataset"]),
        ("_generate", ["self", "prompts"]),
        ("_tokenize_prompts", ["self", "prompts"]),
        (
            "evaluation_loop",
            ["self", "dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
        ),
    ],
)
def test_signatures_that_are_overridden(trainer: type, name: str, parameters: list[str]):
    found = list(inspect.signature(inspect.unwrap(getattr(trainer, name))).parameters)
    assert found == parameters, f"TRL changed {trainer.__name__}.{name}: {found}; hclm_rl/trainer/mixin.py overrides it"


def test_an_epoch_is_a_method_of_its_own():
    assert "self._run_epoch(" in inspect.getsource(transformers.Trainer._inner_training_loop), (
        "transformers runs its epochs otherwise: hclm_rl/trainer/mixin.py keeps a run that is done from one more step"
    )


def test_the_weights_of_vespo():
    found = inspect.signature(inspect.unwrap(trl.GRPOTrainer.get_gamma_weights)).parameters
    assert {"advantages", "mask"} <= found.keys(), "TRL changed get_gamma_weights, which hclm_rl/trainer/grpo.py reads"
    loss = inspect.getsource(inspect.unwrap(trl.GRPOTrainer._compute_loss))
    assert "self.get_gamma_weights(\n                advantages=advantages" in loss, (
        "TRL calls get_gamma_weights otherwise"
    )
    assert '["vespo/phi_seq_mean"].append(' in loss, "TRL's metric of vespo is gone: trainer/stage_two.py replaces it"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_our_trainers_take_what_trls_take(trainer: type):
    """Names, order, kinds, defaults and annotations; an argument that TRL adds must be handed on."""
    theirs = list(inspect.signature(trainer.__init__).parameters.values())
    *ours, entropy_terms = inspect.signature(OURS[trainer].__init__).parameters.values()
    assert ours == theirs, f"TRL changed {trainer.__name__}.__init__: hclm_rl/trainer names its parameters one by one"
    assert (entropy_terms.name, entropy_terms.kind) == ("entropy_terms", inspect.Parameter.KEYWORD_ONLY)
    assert entropy_terms.default is None


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_our_trainers_take_goes_to_trl_unchanged(trainer: type, monkeypatch: pytest.MonkeyPatch):
    class Got(Exception):
        pass

    def init(self: object, **given: object) -> None:
        raise Got(given)

    monkeypatch.setattr(EntropyTermsMixin, "__init__", init)
    names = [name for name in inspect.signature(OURS[trainer].__init__).parameters if name != "self"]
    takes = inspect.unwrap(OURS[trainer].__init__)  # past the type checks of the tests: anything will do
    with pytest.raises(Got) as caught:
        takes(object.__new__(OURS[trainer]), **{name: f"of {name}" for name in names})
    assert caught.value.args[0] == {name: f"of {name}" for name in names}


@pytest.mark.parametrize("trainer", [*OURS.values()])
def test_every_argument_is_described(trainer: type):
    described = [line.split(" (")[0].strip() for line in inspect.getdoc(trainer).splitlines() if line[:4] == "    "]
    named = [name for name in inspect.signature(trainer.__init__).parameters if name != "self"]
    assert [line for line in described if line in named] == named


@pytest.mark.parametrize("config", [hclm_rl.GRPOConfig, hclm_rl.RLOOConfig])
def test_every_new_field_is_described(config: type):
    new = [
        each.name for each in fields(config) if each.name not in {theirs.name for theirs in fields(config.__mro__[2])}
    ]
    assert len(new) == 9
    for name in new:
        assert f"`{name}`" in config.__doc__ and f"    {name} (`" in config.__mro__[1].__doc__


@pytest.mark.slow  # pyright reads torch and TRL first
def test_an_editor_knows_a_wrong_keyword(tmp_path: Path):
    file = tmp_path / "train.py"
    file.write_text(
        "from hclm_rl import GRPOTrainer\n"
        'GRPOTrainer("model", "judge", entropy_terms=["clip_cov", {"entropy_bonus": {"coef": 0.1}}])\n'
        'GRPOTrainer("model", "judge", entropy_term=["clip_cov"])\n'
    )
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}))
    check = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    said = json.loads(subprocess.run(check, capture_output=True, text=True).stdout)["generalDiagnostics"]
    errors = [(each["range"]["start"]["line"] + 1, each["message"]) for each in said if each["severity"] == "error"]
    assert errors == [(3, 'No parameter named "entropy_term"')]


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
    ours = [name for each in (EntropyTermsMixin, *OURS.values()) for name in vars(each) if name.startswith("_hclm")]
    for trainer in [*TRAINERS, Trainer]:
        assert not [name for name in ours if hasattr(trainer, name)]


def test_loss_scaling_for_accumulation():
    assert trl.GRPOTrainer.loss_is_scaled_for_ga is True
    assert trl.RLOOTrainer.loss_is_scaled_for_ga is False


def test_backbones_are_found_by_base_model():
    assert isinstance(inspect.getattr_static(PreTrainedModel, "base_model"), property)
