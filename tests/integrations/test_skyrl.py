"""The adapter against SkyRL 0.3.0 itself, on a CPU: its trainer's advantages, its normalisation, its losses.

Run by `make test-integrations`, which has SkyRL. Nothing here trains on a GPU or starts Ray.
"""

import functools
import importlib.util
import json
import shlex
import sys
import typing
from pathlib import Path

import pytest
import torch
import typing_extensions

from hclm_rl.integrations.skyrl.arguments import TAKES_TOKEN_ADVANTAGES, refuse_settings, split

from .recorded import SEED, record
from .test_stages import TERMS

if importlib.util.find_spec("skyrl") is None:
    pytest.skip("SkyRL is not here: make test-integrations has it", allow_module_level=True)
if sys.version_info < (3, 12):
    # pydantic refuses the TypedDict of Python 3.11, which SkyRL's tinker part uses; nothing here reads that part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
        import skyrl.backends  # noqa: F401 (its import is what the patch is for)

from skyrl.backends.skyrl_train.training_batch import TrainingInputBatch
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.trainer import RayPPOTrainer

from hclm_rl.integrations.skyrl import trainer as adapter

WORKS = {name: TERMS[name] for name in ("clip_cov", "max_rl")}
PROMPT = 3
ROOT = Path(__file__).parents[2]


def config_of(**changes):
    wanted = {"generator.n_samples_per_prompt": 4, "trainer.train_batch_size": 2, "trainer.policy_mini_batch_size": 2}
    return SkyRLTrainConfig.from_cli_overrides(
        wanted | {key.replace("__", "."): value for key, value in changes.items()}
    )


def made(terms, monkeypatch, config=None, **settings):
    """SkyRL's trainer with terms, without what starts Ray; deviations plus 1e-4, as TRL has them."""
    config = config or config_of(**settings)
    functions = ppo_utils.AdvantageEstimatorRegistry._functions
    monkeypatch.setitem(functions, "grpo", functools.partial(functions["grpo"], epsilon=1e-4))
    monkeypatch.setattr(adapter, "EPSILON", 1e-4)
    monkeypatch.setattr(RayPPOTrainer, "__init__", lambda self, cfg: vars(self).update(cfg=cfg, all_metrics={}))
    chain, seed, _ = split([f"hclm_rl.recipe={terms}", f"hclm_rl.seed={SEED}"])
    trainer = adapter.TermsTrainer(config, chain=chain, seed=seed)
    trainer.global_step, trainer.total_training_steps, trainer.tokenizer = 1, 10, None
    return trainer


def batch_of(recorded):
    given = recorded.given
    last = torch.nn.functional.one_hot(given.mask.sum(dim=1) - 1, given.mask.size(1))
    mask = given.mask.long()
    prompts = torch.full((len(mask), PROMPT), 2)
    data = TrainingInputBatch(
        {
            "sequences": torch.cat([prompts, given.ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(prompts), mask], dim=1),
            "response_mask": mask,
            "loss_mask": mask,
            "rewards": given.rewards.unsqueeze(1) * last,
            "action_log_probs": recorded.old_logps,
            "base_action_log_probs": None,
            "values": None,
        }
    )
    data.metadata = {"uids": given.uid, "avg_response_length": 4.0, "response_length": mask.size(1)}
    return data


def file_of(folder, terms):
    (file := folder / "terms.yaml").write_text(f"entropy_terms: {json.dumps(terms)}")
    return file


@pytest.mark.parametrize(("terms", "off_policy"), WORKS.values(), ids=WORKS)
def test_a_step_is_the_one_under_trl(terms, off_policy, policy, tmp_path, monkeypatch):
    """token_mean, which is TRL's dapo: the advantages are divided before, and the loss is a sum."""
    recorded = record(policy, tmp_path, terms, off_policy=off_policy)
    trainer = made(file_of(tmp_path, terms), monkeypatch)
    data = trainer.compute_advantages_and_returns(batch_of(recorded))
    data = trainer._normalize_advantages(data, [(0, 8)])
    logps = recorded.logps.clone().requires_grad_()
    loss, _ = ppo_utils.PolicyLossRegistry.get("regular")(
        logps, recorded.old_logps, data["advantages"], trainer.cfg.trainer.algorithm, data["loss_mask"], None
    )
    (at_logps,) = torch.autograd.grad(loss, logps)
    assert recorded.at_logps.abs().max() > 1e-3
    torch.testing.assert_close(at_logps, recorded.at_logps, atol=1e-5, rtol=0)
    link = recorded.chain.links[0].name
    assert trainer.all_metrics[f"hclm_rl/{link}/coef"] == 1.0
    assert 0 < trainer.all_metrics[f"hclm_rl/{link}/affected"] <= 1


REFUSED = {
    "kl_cov": "the entropy term 'kl_cov' failed in stage 2 at step 0: SkyRL's loss does not call terms",
    "forking_tokens": "SkyRL computes no entropies before the update",
    "entropy_bonus": "none can read the policy as it is in the update",
    "group_log_det": "reads hidden states, which it does not get under SkyRL",
    "right_anchor": "reads passes of its own over other texts, which it does not get under SkyRL",
}


@pytest.mark.parametrize(("term", "sentence"), REFUSED.items(), ids=REFUSED)
def test_what_skyrl_cannot_give_is_refused_before_an_update(term, sentence, policy, tmp_path, monkeypatch):
    recorded = record(policy, tmp_path, ["max_rl"])
    with pytest.raises(ValueError, match=sentence):
        made(file_of(tmp_path, [term]), monkeypatch).compute_advantages_and_returns(batch_of(recorded))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trainer__algorithm__use_entropy_loss": "true"}, "use_entropy_loss beside entropy_terms"),
        ({"trainer__algorithm__policy_loss_type": "clip_cov"}, "policy_loss_type clip_cov does not take"),
        ({"generator__step_wise_trajectories": "true"}, "step_wise_trajectories gives several outputs"),
        ({"trainer__algorithm__advantage_batch_normalize": "true"}, "advantage_batch_normalize takes the mean off"),
        ({"trainer__algorithm__advantage_estimator": "reinforce++"}, "max_rl: makes advantages anew"),
        ({"trainer__algorithm__use_kl_in_reward": "true"}, "max_rl: would not see the KL"),
        ({"generator__n_samples_per_prompt": 1}, "max_rl: needs groups of 2 responses or more"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_settings_that_work_against_terms_are_refused(settings, sentence, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=sentence.replace("+", r"\+")):
        made(file_of(tmp_path, ["max_rl"]), monkeypatch, **settings)


@pytest.mark.parametrize(
    "name",
    sorted({kind.value for kind in ppo_utils.PolicyLossType} - {"cross_entropy", "importance_sampling", "rollout_is"}),
)
def test_policy_losses_in_which_an_advantage_of_0_stops_its_token_and_no_other(name):
    """The list in arguments.py is what SkyRL 0.3.0 does."""
    torch.manual_seed(0)
    mask, advantages, old = torch.ones(2, 4), torch.tensor([[1.0] * 4, [-1.0] * 4]), -torch.rand(2, 4)
    reduction = {"trainer__algorithm__loss_reduction": "sequence_mean"} if name == "gspo" else {}
    config = config_of(trainer__algorithm__policy_loss_type=name, **reduction).trainer.algorithm

    def gradient(advantages):
        logps = (old + 0.01).requires_grad_()
        loss, _ = ppo_utils.PolicyLossRegistry.get(name)(logps, old, advantages, config, mask, old)
        return torch.autograd.grad(loss, logps)[0]

    stopped = advantages.clone()
    stopped[0, 2] = 0.0
    before, after = gradient(advantages), gradient(stopped)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 2] = False
    stops = after[0, 2] == 0 and before[0, 2] != 0 and torch.allclose(after[others], before[others])
    assert (stops and name not in ("clip_cov", "kl_cov")) == (name in TAKES_TOKEN_ADVANTAGES)


def test_a_checkpoint_keeps_what_terms_remember(tmp_path, monkeypatch):
    terms, config = file_of(tmp_path, ["canon"]), config_of(trainer__ckpt_path=str(tmp_path))
    folder = str(tmp_path / "global_step_3")
    monkeypatch.setattr(RayPPOTrainer, "save_checkpoints", lambda self: folder)
    monkeypatch.setattr(RayPPOTrainer, "load_checkpoints", lambda self: (3, folder))
    one, two = made(terms, monkeypatch, config), made(terms, monkeypatch, config)
    one.global_step, one.hclm_first.state.memory["canon"]["seen"] = 3, 5
    with pytest.raises(ValueError, match="was written without entropy terms"):
        two.load_checkpoints()
    assert one.save_checkpoints() == folder
    assert two.load_checkpoints() == (3, folder)
    assert two.hclm_first.state.memory["canon"] == {"seen": 5}


def test_skyrl_calls_the_entry_point_with_its_command_line(tmp_path, monkeypatch):
    """`trainer.override_entrypoint` imports a module and calls its `main`, before it reads the rest."""
    from skyrl.train.entrypoints import main_base

    from hclm_rl.integrations.skyrl import entrypoint

    seen = {}
    monkeypatch.setattr(entrypoint, "validate_cfg", lambda config: seen.update(config=config))
    monkeypatch.setattr(entrypoint, "initialize_ray", lambda config: None)
    monkeypatch.setattr(entrypoint.ray, "get", lambda handle: None)
    remote = lambda config, chain, seed: seen.update(chain=chain, seed=seed)  # noqa: E731 (one line)
    monkeypatch.setattr(entrypoint, "train", type("Remote", (), {"remote": staticmethod(remote)}))
    own = [f"hclm_rl.recipe={file_of(tmp_path, ['max_rl'])}", "hclm_rl.seed=3"]
    line = ["main_base", "trainer.override_entrypoint=hclm_rl.integrations.skyrl", *own, "trainer.epochs=2"]
    monkeypatch.setattr(sys, "argv", line)
    main_base.main()
    assert [link.name for link in seen["chain"].links] == ["max_rl"] and seen["seed"] == 3
    assert seen["config"].trainer.epochs == 2


def test_the_example_is_what_skyrl_reads_and_the_adapter_takes(monkeypatch):
    """The words of the script's array, as bash would hand them over."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "examples" / "skyrl" / "gsm8k_1.5b.sh").read_text()
    lines = text[text.index("settings=(") :].splitlines()[1:]
    words = [word for line in lines[: lines.index(")")] for word in shlex.split(line, comments=True)]
    chain, _, rest = split(words)
    config = SkyRLTrainConfig.from_cli_overrides(rest)
    assert len(rest) == len(words) - 2 and [link.name for link in chain.links] == ["clip_cov"]
    refuse_settings(config, chain)
    assert config.trainer.algorithm.loss_reduction == "token_mean" and config.trainer.algorithm.grpo_norm_by_std
