"""The parts of the adapters that need neither verl nor SkyRL."""

import importlib
import logging
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import grimp
import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.integrations.absent import Absent
from hclm_rl.integrations.groups import Decoded, Groups, scale_of
from hclm_rl.integrations.recipe import chain_of_file, chain_of_section
from hclm_rl.integrations.second_stage import Kept
from hclm_rl.integrations.skyrl import arguments
from hclm_rl.integrations.told import Told, arrived, carried
from hclm_rl.integrations.verl import plugin, settings
from hclm_rl.integrations.works import works

ROOT = Path(__file__).parents[2]

# what hydra composes of verl 0.9.1's defaults, as far as the adapter reads it
VERL = {
    "algorithm": {
        "adv_estimator": "grpo",
        "use_kl_in_reward": False,
        "norm_adv_by_std_in_grpo": True,
        "rollout_correction": {"bypass_mode": False},
    },
    "actor_rollout_ref": {
        "actor": {
            "strategy": "fsdp",
            "entropy_coeff": 0,
            "use_kl_loss": False,
            "loss_agg_mode": "token-mean",
            "ppo_mini_batch_size": 256,
            "policy_loss": {"loss_mode": "vanilla"},
        },
        "rollout": {"n": 4},
    },
    "data": {"train_batch_size": 1024},
    "distillation": {"enabled": False},
}


def changed(config: dict, path: str, value: object) -> dict:
    """A copy with one value changed."""
    key, _, rest = path.partition(".")
    return config | {key: changed(config.get(key, {}), rest, value) if rest else value}


# ---- rows and groups


def test_rows_of_a_group_come_together_and_a_smaller_group_has_an_empty_place():
    # b, a, b, a, b and a row that only fills the batch up: groups b = rows 0, 2, 4 and a = rows 1, 3
    groups = Groups.of(["b", "a", "b", "a", "b", "pad"], [True] * 5 + [False])
    assert groups.size == 3 and groups.row.tolist() == [0, 2, 4, 1, 3, -1]
    assert groups.number.tolist() == [0, 0, 0, 1, 1, 1]
    placed = groups.placed(torch.tensor([10.0, 11, 12, 13, 14, 99]), -1.0)
    assert placed.tolist() == [10, 12, 14, 11, 13, -1]
    back = groups.back(placed + 100, torch.tensor([0.0, 0, 0, 0, 0, 7]))
    assert back.tolist() == [110, 111, 112, 113, 114, 7]


def test_a_text_is_decoded_when_somebody_reads_it():
    class Tokenizer:
        read = 0

        def decode(self, ids, skip_special_tokens):
            self.read += 1
            return "".join(map(str, ids))

    tokenizer = Tokenizer()
    texts = Groups.of(["a", "b", "a"], [True] * 3).listed(Decoded([(1, 2), (3,), (4,)], tokenizer))
    assert len(texts) == 4 and tokenizer.read == 0
    assert list(texts) == ["12", "4", "3", ""] and texts[1] == "4" and tokenizer.read == 5


def test_the_scale_of_grpo_is_the_deviation_of_the_group():
    # group a: 0 and 2, deviation sqrt(((0 - 1)^2 + (2 - 1)^2) / 1) = sqrt 2; group b is one response
    scale = scale_of(torch.tensor([0.0, 5.0, 2.0]), ["a", "b", "a"], [True] * 3, 0.5)
    torch.testing.assert_close(scale, torch.tensor([2**0.5 + 0.5, 1.0, 2**0.5 + 0.5]))
    assert scale_of(torch.tensor([0.0, 2.0]), ["a", "a"], [True] * 2, None).tolist() == [1, 1]


def test_masks_travel_as_numbers_and_arrive_as_masks():
    rows = {"is_dropped": torch.tensor([True, False]), "weight": torch.tensor([1.0, 2.0])}
    sent = carried(rows)
    assert sent["is_dropped"].tolist() == [1, 0] and sent["is_dropped"].dtype == torch.uint8
    found = arrived(sent, Told(step=0, progress=0.0, coefs={}, masks=("is_dropped",)))
    assert found["is_dropped"].tolist() == [True, False] and found["weight"].dtype == torch.float32


# ---- what is not there


def test_an_absent_tensor_has_a_shape_and_says_why_it_has_no_values():
    absent = Absent.like(torch.ones(2, 3), "nobody made entropies")
    assert absent.shape == (2, 3) and absent.dtype == torch.float32 and absent.dim() == 2
    for read in (lambda: absent + 1, lambda: absent.sum(), lambda: torch.where(absent > 0, 1, 0), lambda: absent[0]):
        with pytest.raises(ValueError, match="nobody made entropies"):
            read()


@pytest.mark.parametrize(
    "write",
    [lambda kept: kept.update(n=1), lambda kept: kept.__setitem__("n", 1), lambda kept: kept.setdefault("n", 1)],
)
def test_a_memory_in_a_worker_cannot_be_written(write):
    kept = Kept(seen=3)
    assert kept["seen"] == 3
    with pytest.raises(ValueError, match="its stage 2 writes into its memory, which under this trainer is a copy"):
        write(kept)


# ---- where terms are named


def test_terms_come_from_a_file_whose_other_keys_are_said_to_be_unread(tmp_path, caplog):
    (file := tmp_path / "terms.yaml").write_text("task: coins\nentropy_terms: [clip_cov]\nlearning_rate: 1.0e-6\n")
    with caplog.at_level(logging.WARNING, logger="hclm_rl"):
        chain = chain_of_file(str(file))
    assert [link.name for link in chain.links] == ["clip_cov"]
    assert "only entropy_terms is read here; not read: task, learning_rate" in caplog.text


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (None, "this run has no \\+hclm_rl that names entropy terms: set `\\+hclm_rl.recipe=terms.yaml`"),
        ({"terms": []}, "\\+hclm_rl has no key 'terms'; allowed: recipe, entropy_terms, seed"),
        ({}, "needs either recipe or entropy_terms"),
        ({"entropy_terms": []}, "names no entropy term"),
        ({"entropy_terms": ["clip_cov"], "seed": "x"}, "\\+hclm_rl.seed must be a whole number, got 'x'"),
        ({"recipe": "/nowhere/terms.yaml"}, "no recipe at '/nowhere/terms.yaml'"),
        ({"entropy_terms": ["clip_cof"]}, "unknown entropy term 'clip_cof'; the nearest are clip_cov"),
    ],
)
def test_a_section_that_names_no_terms_is_refused(section, sentence):
    with pytest.raises(ValueError, match=sentence):
        chain_of_section(section, "+hclm_rl")


def test_skyrls_command_line_is_split(tmp_path):
    (file := tmp_path / "terms.yaml").write_text("entropy_terms: [max_rl]")
    own = [f"hclm_rl.recipe={file}", "hclm_rl.seed=3"]
    chain, seed, rest = arguments.split(["trainer.override_entrypoint=x", *own, "trainer.epochs=2"])
    assert [link.name for link in chain.links] == ["max_rl"] and seed == 3 and rest == ["trainer.epochs=2"]


# ---- verl's settings


@pytest.mark.parametrize(
    ("terms", "path", "value", "sentence"),
    [
        (["clip_cov"], "actor_rollout_ref.actor.entropy_coeff", 0.01, "verl's entropy_coeff 0.01 beside entropy_terms"),
        (["clip_cov"], "actor_rollout_ref.actor.policy_loss.loss_mode", "kl_cov", "loss_mode kl_cov does not take"),
        (["clip_cov"], "actor_rollout_ref.actor.strategy", "megatron", "megatron is not tested with entropy terms"),
        (["clip_cov"], "distillation.enabled", True, "verl's distillation has a loss of its own"),
        (["max_rl"], "algorithm.adv_estimator", "gae", "max_rl: makes advantages anew from the rewards"),
        (["max_rl"], "algorithm.use_kl_in_reward", True, "max_rl: would not see the KL that verl takes off"),
        (["max_rl"], "actor_rollout_ref.rollout.n", 1, "max_rl: needs groups of 2 responses or more"),
        (["clip_cov"], "algorithm.rollout_correction.bypass_mode", True, "reads log-probs of the whole rollout before"),
        (["mara"], "algorithm.gamma", 1.0, "reads log-probs of a frozen model, which this run does not make"),
        (["right_anchor"], "algorithm.gamma", 1.0, "'right_anchor' reads passes of its own over other texts"),
        (
            ["group_log_det"],
            "algorithm.gamma",
            1.0,
            "'group_log_det' reads hidden states, which it does not get under verl",
        ),
    ],
)
def test_settings_that_work_against_terms_are_refused(terms, path, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings.refuse_settings(changed(VERL, path, value), build_chain(terms))


def test_what_is_refused_may_stand_there_at_coef_0_and_the_defaults_are_allowed():
    settings.refuse_settings(VERL, build_chain([{"group_log_det": {"coef": 0}}, "max_rl", "clip_cov"]))
    settings.refuse_settings(changed(VERL, "actor_rollout_ref.actor.use_kl_loss", True), build_chain(["mara"]))


def test_numbers_that_are_verls():
    assert settings.share_of_update(VERL) == 0.25  # 256 of 1024 prompts
    assert settings.epsilon(VERL) == 1e-6 and settings.epsilon(changed(VERL, "algorithm.adv_estimator", "rloo")) is None
    assert settings.progress(1, 10) == 0.0 and settings.progress(6, 10) == 0.5  # verl counts from 1
    assert (
        settings.loss_mean(changed(VERL, "actor_rollout_ref.actor.loss_agg_mode", "seq-mean-token-mean")) == "sequences"
    )


# ---- the plug-in


def test_the_entry_point_is_there_and_needs_no_verl():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["verl.plugins"] == {"hclm_rl": "hclm_rl.integrations.verl.plugin"}
    assert importlib.import_module("hclm_rl.integrations.verl.plugin") is plugin


def test_names_are_registered_when_the_registry_has_run_and_a_failure_is_said(tmp_path, monkeypatch, caplog):
    (tmp_path / "their_registry.py").write_text("NAMES = ['their own']")
    (tmp_path / "their_other.py").write_text("NAMES = []")
    monkeypatch.syspath_prepend(tmp_path)
    ours, broken = ModuleType("ours_for_theirs"), ModuleType("broken_for_theirs")
    ours.register = lambda: sys.modules["their_registry"].NAMES.append("ours")
    broken.register = lambda: [][0]
    for name, module in (("ours_for_theirs", ours), ("broken_for_theirs", broken)):
        monkeypatch.setitem(sys.modules, name, module)
    registries = {"their_registry": "ours_for_theirs", "their_other": "broken_for_theirs"}
    monkeypatch.setattr(plugin, "REGISTRIES", registries)
    others = [finder for finder in sys.meta_path if not isinstance(finder, plugin.After)]
    monkeypatch.setattr(sys, "meta_path", [plugin.After(), *others])
    with caplog.at_level(logging.ERROR, logger="hclm_rl"):
        found = importlib.import_module("their_registry")
        importlib.import_module("their_other")
    assert found.NAMES == ["their own", "ours"] and type(found.__loader__).__name__ == "SourceFileLoader"
    assert "could not register with their_other (IndexError" in caplog.text
    for name in registries:
        monkeypatch.delitem(sys.modules, name)


def test_nothing_that_the_adapters_import_needs_trl():
    """verl's and SkyRL's environments pin another TRL, or have none."""
    graph = grimp.build_graph("hclm_rl", include_external_packages=True)
    needs = graph.find_upstream_modules("hclm_rl.integrations", as_package=True)
    assert {"torch", "hclm_rl.chain.chain", "hclm_rl.recipe.links"} <= needs
    assert "trl" not in needs


@pytest.mark.parametrize(
    ("term", "verl", "loss", "skyrl"),
    [
        ("clip_cov", "yes", "yes, with `statistics: micro_batch`", "yes"),
        ("max_rl", "yes", "the whole rollout, with its rewards and groups", "yes"),
        ("group_log_det", "hidden states", "hidden states", "hidden states"),
    ],
)
def test_where_a_term_works(term: str, verl: str, loss: str, skyrl: str):
    assert works(term) == (verl, loss, skyrl)
