"""The adapter against verl 0.9.1 itself, on a CPU: its registries, its losses, its trainer's advantages.

Run by `make test-integrations`, which has verl. Nothing here trains on a GPU or starts Ray; where verl's trainer asks
the TransferQueue, a dictionary answers.
"""

import dataclasses
import functools
import importlib.util
import logging
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from hclm_rl.integrations.recipe import chain_of_section
from hclm_rl.integrations.verl import plugin

from .recorded import SEED, record
from .test_stages import TERMS

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not here: make test-integrations has it", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of engines that are not installed
    import verl
    from omegaconf import OmegaConf
    from tensordict import NonTensorStack, TensorDict
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import FSDPActorConfig
    from verl.workers.engine.utils import prepare_micro_batches
    from verl.workers.utils.losses import ppo_loss

from hclm_rl.integrations.verl import seam, settings
from hclm_rl.integrations.verl import trainer as adapter
from hclm_rl.integrations.verl.loss import PREFIX, TOLD, TermsLoss
from hclm_rl.integrations.verl.policy_loss import chain_from, compute_policy_loss_hclm_rl
from hclm_rl.integrations.verl.settings import TAKES_TOKEN_ADVANTAGES, VARIABLE

PROMPT = 3  # tokens of every prompt
EXAMPLES = Path(__file__).parents[2] / "examples" / "verl"


class Queue:
    """The TransferQueue as one process needs it."""

    def __init__(self) -> None:
        self.fields: dict = {}

    def kv_batch_get(self, keys, partition_id, select_fields):
        found = {name: self.fields[name] for name in select_fields if name in self.fields}
        return TensorDict(found, batch_size=len(keys))

    def kv_batch_put(self, keys, partition_id, fields):
        self.fields |= {name: fields[name] for name in fields.keys()}  # noqa: SIM118 (it iterates over rows)
        return Meta(keys)


class Meta:
    """A KVBatchMeta as the queue gives it back."""

    def __init__(self, keys) -> None:
        self.keys, self.partition_id, self.extra_info, self.fields = keys, "train", {}, None
        self.tags = [{"is_padding": key.startswith("pad")} for key in keys]

    def __len__(self) -> int:
        return len(self.keys)


class Tokenizer:
    def decode(self, ids, skip_special_tokens):
        return " ".join(str(int(each)) for each in ids)


def config_of(terms, estimator="grpo", loss_mode="vanilla", **actor):
    """As hydra composes it, as far as the adapter and verl's advantages read it."""
    return OmegaConf.create(
        {
            "hclm_rl": {"entropy_terms": terms, "seed": SEED},
            "algorithm": {"adv_estimator": estimator, "gamma": 1.0, "lam": 1.0, "use_kl_in_reward": False,
                          "norm_adv_by_std_in_grpo": True, "rollout_correction": None},
            "actor_rollout_ref": {
                "actor": {"use_kl_loss": False, "kl_loss_coef": 0.0, "entropy_coeff": 0, "ppo_mini_batch_size": 2,
                          "loss_agg_mode": "token-mean", "policy_loss": {"loss_mode": loss_mode}, **actor},
                "rollout": {"n": 4},
            },
            "data": {"train_batch_size": 2},
            "trainer": {"v1": {"trainer_mode": "hclm_rl_sync"}},
        }
    )  # fmt: skip


def nested(values, mask):
    lengths = mask.sum(dim=1).tolist()
    return torch.nested.as_nested_tensor([row[:n] for row, n in zip(values, lengths, strict=True)], layout=torch.jagged)


def whole(values, mask):
    """(N, T) of the response to prompt and response, where verl's engine has the value one token earlier."""
    lengths = mask.sum(dim=1).tolist()
    rows = [torch.nn.functional.pad(row[:n], (PROMPT - 1, 1)) for row, n in zip(values, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def fields_of(recorded):
    """The queue before verl computes advantages."""
    given = recorded.given
    last = torch.nn.functional.one_hot(given.mask.sum(dim=1) - 1, given.mask.size(1))
    prompts = torch.stack([torch.tensor([2, 3, 4 + int(uid[-1])]) for uid in given.uid])
    return {
        "uid": NonTensorStack(*given.uid),
        "prompts": torch.nested.as_nested_tensor(list(prompts), layout=torch.jagged),
        "responses": nested(given.ids, given.mask),
        "response_mask": nested(given.mask.long(), given.mask),
        "rm_scores": nested(given.rewards.unsqueeze(1) * last, given.mask),
        "old_log_probs": nested(recorded.old_logps, given.mask),
        "entropy": nested(recorded.entropy if given.entropy is None else given.entropy, given.mask),
    }


def driver(config, queue, monkeypatch):
    """verl's synchronous trainer with terms, without what starts Ray; deviations plus 1e-4, as TRL has them."""
    grpo = functools.partial(core_algos.ADV_ESTIMATOR_REGISTRY["grpo"], epsilon=1e-4)
    monkeypatch.setitem(core_algos.ADV_ESTIMATOR_REGISTRY, "grpo", grpo)
    monkeypatch.setattr(core_algos, "compute_grpo_outcome_advantage", grpo)
    monkeypatch.setattr(settings, "EPSILON", 1e-4)
    monkeypatch.setattr(trainer_base, "tq", queue)
    monkeypatch.setattr(adapter, "tq", queue)
    monkeypatch.setattr(trainer_base.PPOTrainer, "__init__", lambda self, config: setattr(self, "config", config))
    made = get_trainer_cls("hclm_rl_sync")(config)
    made.global_steps, made.total_training_steps, made.tokenizer = 1, 10, Tokenizer()
    made.use_reference_policy = False
    return made


def actor_config(loss_mode="vanilla", **changes):
    made = FSDPActorConfig(strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=8, **changes)
    object.__setattr__(made.policy_loss, "loss_mode", loss_mode)
    return made


def mini_batch(queue, given):
    """What a worker's engine has: the queue's fields, and the numbers of the mini-batch."""
    data = TensorDict(dict(queue.fields), batch_size=len(given.rewards))
    numbers = {"dp_size": 1, "batch_num_tokens": int(given.mask.sum()), "global_batch_size": len(given.rewards)}
    tu.assign_non_tensor(data, **numbers)
    return data


@pytest.fixture(scope="module", params=TERMS, ids=TERMS.keys())
def recorded(request, tmp_path_factory, policy):
    terms, off_policy = TERMS[request.param]
    return terms, record(policy, tmp_path_factory.mktemp("run"), terms, off_policy=off_policy)


def worked(terms, recorded, monkeypatch, micro_batches=1, loss_mode="vanilla", **actor):
    """The gradients at log-probs and entropies after verl's own driver and loss with the terms in between."""
    queue = Queue()
    queue.fields = fields_of(recorded)
    made = driver(config_of(terms, loss_mode=loss_mode), queue, monkeypatch)
    metrics: dict = {}
    batch = made._compute_advantage(Meta([f"{uid}_{i}_0" for i, uid in enumerate(recorded.given.uid)]), metrics)
    monkeypatch.setattr(trainer_base.PPOTrainer, "_update_actor", lambda self, batch, metrics: batch)
    told = made._update_actor(batch, metrics).extra_info[TOLD]
    data = mini_batch(queue, recorded.given)
    logps, entropy = (values.clone().requires_grad_() for values in (recorded.logps, recorded.entropy))
    tu.assign_non_tensor(data, **{TOLD: told})
    tu.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=len(logps) // micro_batches)
    [data] = tu.make_iterator(data, mini_batch_size=len(logps), epochs=1)  # as verl's workers cut mini-batches
    loss_fn = pickle.loads(
        pickle.dumps(TermsLoss(config=actor_config(loss_mode, **actor), chain=made.hclm_first.chain))
    )
    rows = torch.arange(len(logps)).chunk(micro_batches)
    found, total = [], 0
    for own, micro in zip(rows, prepare_micro_batches(data)[0], strict=True):
        mask = recorded.given.mask[own]
        output = {"log_probs": whole(logps[own], mask), "entropy": whole(entropy[own], mask)}
        loss, said = loss_fn(model_output=output, data=micro, dp_group=None)
        total = total + loss
        found.append(said)
    at = torch.autograd.grad(total, [logps, entropy], allow_unused=True)
    at = [torch.zeros_like(logps) if each is None else each for each in at]
    return at, metrics, found


def test_a_step_is_the_one_under_trl(recorded, monkeypatch):
    terms, recorded = recorded
    (at_logps, at_entropy), metrics, said = worked(terms, recorded, monkeypatch)
    assert recorded.at_logps.abs().max() > 1e-3
    torch.testing.assert_close(at_logps, recorded.at_logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(at_entropy, recorded.at_entropy, atol=1e-5, rtol=0)
    for link in recorded.chain.links:
        assert metrics[f"{PREFIX}{link.name}/coef"] == link.coef.value(0.0, {})
        assert 0 < said[0][f"{PREFIX}{link.name}/affected"].aggregate() <= 1


def test_the_step_does_not_depend_on_the_cut_into_micro_batches(recorded, monkeypatch):
    terms, recorded = recorded
    (whole, at_entropy), _, _ = worked(terms, recorded, monkeypatch)
    (cut, cut_at_entropy), _, said = worked(terms, recorded, monkeypatch, micro_batches=4)
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(cut_at_entropy, at_entropy, atol=1e-6, rtol=0)
    assert len(said) == 4


def test_a_batch_without_terms_effect_is_verls_own(tmp_path_factory, policy, monkeypatch):
    """At coef 0 the loss and its gradient are verl's, bit for bit."""
    recorded = record(policy, tmp_path_factory.mktemp("run"), [{"clip_cov": {"coef": 0}}])
    (at_logps, _), metrics, _ = worked([{"clip_cov": {"coef": 0}}], recorded, monkeypatch)
    queue = Queue()
    queue.fields = fields_of(recorded)
    made = driver(config_of(["clip_cov"]), queue, monkeypatch)
    trainer_base.PPOTrainer._compute_advantage(made, Meta([f"{i}_0_0" for i in range(8)]), {})
    logps = recorded.logps.clone().requires_grad_()
    output = {"log_probs": whole(logps, recorded.given.mask), "entropy": whole(recorded.entropy, recorded.given.mask)}
    loss, _ = ppo_loss(actor_config(), output, mini_batch(queue, recorded.given))
    assert torch.equal(torch.autograd.grad(loss, logps)[0], at_logps)
    assert metrics["hclm_rl/clip_cov/coef"] == 0


def test_rows_that_fill_a_batch_up_have_no_part_in_it(tmp_path_factory, policy, monkeypatch):
    """verl appends rows of a prompt of their own until the batch divides: two of them, in which all else is real."""
    recorded = record(policy, tmp_path_factory.mktemp("run"), ["max_rl"])
    queue, given = Queue(), recorded.given
    order = [*range(8), 0, 1]
    fields = fields_of(dataclasses.replace(recorded, given=taken(given, order), old_logps=recorded.old_logps[order],
                                           entropy=recorded.entropy[order]))  # fmt: skip
    queue.fields = fields | {"uid": NonTensorStack(*given.uid, "pad", "pad")}
    made = driver(config_of(["max_rl"]), queue, monkeypatch)
    made._compute_advantage(Meta([*(f"{uid}_{i}_0" for i, uid in enumerate(given.uid)), "pad_0_0", "pad_1_0"]), {})
    filled = queue.fields["advantages"].to_padded_tensor(0.0)
    of_prompt = {uid: given.rewards[[each == uid for each in given.uid]].mean() for uid in given.uid}
    for row, uid in enumerate(given.uid):  # (R - m) / m, as the card has it
        torch.testing.assert_close(filled[row, 0], (given.rewards[row] - of_prompt[uid]) / of_prompt[uid])
    group = queue.fields["hclm_rl/group_rewards"]
    assert group.shape == (10, 4) and not group[8:].any()


def taken(given, order):
    """Those rows of a batch."""
    rows = {name: value[order] for name, value in vars(given).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(given, **rows, uid=[given.uid[i] for i in order], counts=[True] * len(order))


REFUSED = {
    "group_log_det": "reads hidden states, which it does not get under verl's trainer",
    "right_anchor": "reads passes of its own over other texts, which it does not get under verl's trainer",
    "log_det": "reads hidden states",
    "lp_reg": "reads the whole next-token distribution",
    "bapo": "reads what a whole optimiser step measured",
}


@pytest.mark.parametrize(("term", "sentence"), REFUSED.items(), ids=REFUSED)
def test_what_verl_cannot_give_is_refused_when_the_trainer_is_made(term, sentence, monkeypatch):
    with pytest.raises(ValueError, match=f"the entropy term '{term}' {sentence}"):
        driver(config_of([term]), Queue(), monkeypatch)


def test_verl_keeps_its_own_name_of_the_trainer(monkeypatch):
    """verl asks in many places whether trainer_mode is "sync"."""
    made = driver(config_of(["clip_cov"]), Queue(), monkeypatch)
    assert made.config.trainer.v1.trainer_mode == "sync"
    assert made.config.actor_rollout_ref.actor.calculate_entropy is True


@pytest.mark.parametrize("mode", sorted(set(core_algos.POLICY_LOSS_REGISTRY) - {"hclm_rl", "bypass_mode", "dro"}))
def test_loss_modes_in_which_an_advantage_of_0_stops_its_token_and_no_other(mode):
    """The list in settings.py is what verl 0.9.1 does."""
    torch.manual_seed(0)
    mask, advantages = torch.ones(2, 4), torch.tensor([[1.0] * 4, [-1.0] * 4])
    old = -torch.rand(2, 4)

    def gradient(advantages):
        logps = (old + 0.01).requires_grad_()
        config = actor_config(mode)
        given = {"old_log_prob": old, "log_prob": logps, "advantages": advantages, "response_mask": mask}
        loss, _ = core_algos.get_policy_loss_fn(mode)(**given, loss_agg_mode="token-mean", config=config)
        return torch.autograd.grad(loss, logps)[0]

    stopped = advantages.clone()
    stopped[0, 2] = 0.0
    before, after = gradient(advantages), gradient(stopped)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[0, 2] = False
    stops = after[0, 2] == 0 and before[0, 2] != 0 and torch.allclose(after[others], before[others])
    assert (stops and mode not in ("clip_cov", "kl_cov")) == (mode in TAKES_TOKEN_ADVANTAGES)


# ---- the light way


def test_the_policy_loss_is_verls_plain_one_on_the_advantages_that_the_terms_leave(tmp_path, monkeypatch):
    terms = tmp_path / "terms.yaml"
    terms.write_text("entropy_terms: [{clip_cov: {ratio: 1.0, lower: 0.0, statistics: micro_batch}}]")
    monkeypatch.setenv(VARIABLE, str(terms))
    # A = 1, 1, -1, -1 and log p = -1, -3, -1, -3: cov = A (log p + 2) = 1, -1, -1, 1, so tokens 0 and 3 are dropped
    advantages, old = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -3.0, -1.0, -3.0]])
    logps = old.clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn("hclm_rl")(
        old_log_prob=old, log_prob=logps, advantages=advantages, response_mask=torch.ones(1, 4),
        loss_agg_mode="token-mean", config=actor_config("hclm_rl"), rollout_is_weights=None,
    )  # fmt: skip
    # d loss / d log p = -A / 4 at a ratio of 1
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], torch.tensor([[0.0, -0.25, 0.25, 0.0]]))
    assert metrics["hclm_rl/clip_cov/affected"] == 0.5


@pytest.mark.parametrize(
    ("terms", "sentence"),
    {
        "[clip_cov]": "reads log-probs of the whole rollout before the update, which it does not get in",
        "[max_rl]": "reads the whole rollout, with its rewards and groups",
        "[{forking_tokens: {statistics: micro_batch}}]": "verl hands no entropies to a policy loss: use trainer",
        "[{position_advantage: {coef: {kind: linear, start: 1.0, end: 0.0}}}]": "changes over time",
        "[]": "names no entropy term",
    }.items(),
)
def test_what_a_policy_loss_cannot_do_is_refused(terms, sentence, tmp_path, monkeypatch):
    (file := tmp_path / "terms.yaml").write_text(f"entropy_terms: {terms}")
    monkeypatch.setenv(VARIABLE, str(file))
    given = {name: torch.zeros(1, 2) for name in ("old_log_prob", "log_prob", "advantages")}
    with pytest.raises(ValueError, match=sentence):
        compute_policy_loss_hclm_rl(**given, response_mask=torch.ones(1, 2), config=actor_config("hclm_rl"))


def test_a_policy_loss_without_a_file_says_how_to_name_one(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match="loss_mode=hclm_rl needs HCLM_RL_TERMS"):
        chain_from(None)


# ---- that it is on, or that somebody hears of it


def test_verl_knows_the_names():
    assert {"hclm_rl_sync", "hclm_rl_colocate_async", "hclm_rl_separate_async"} <= set(trainer_base.TRAINER_REGISTRY)
    assert "hclm_rl" in core_algos.POLICY_LOSS_REGISTRY


def test_a_plug_in_that_fails_says_so_and_its_names_are_unknown(monkeypatch, caplog):
    monkeypatch.setattr(seam, "LEANS_ON", {"_compute_advantage": ["self", "elsewhere"]})
    monkeypatch.setattr(trainer_base, "TRAINER_REGISTRY", {})
    with caplog.at_level(logging.ERROR, logger="hclm_rl"):
        plugin.register("verl.trainer.ppo.v1")
    assert f"verl {verl.__version__} has other parameters in _compute_advantage than 0.9.1" in caplog.text
    with pytest.raises(ValueError, match="Unknown trainer 'hclm_rl_sync'"):
        get_trainer_cls("hclm_rl_sync")


def test_a_loss_whose_first_stage_did_not_run_stops(tmp_path_factory, policy):
    recorded = record(policy, tmp_path_factory.mktemp("run"), ["clip_cov"])
    queue = Queue()
    queue.fields = fields_of(recorded)
    with pytest.raises(ValueError, match="the batch brought nothing of hclm_rl's first stage to the loss"):
        TermsLoss(actor_config(), recorded.chain)(model_output={}, data=mini_batch(queue, recorded.given))


def test_a_checkpoint_keeps_what_terms_remember(tmp_path, monkeypatch):
    """canon counts; the state of a run goes on in another."""
    monkeypatch.setattr(trainer_base.PPOTrainer, "_save_checkpoint", lambda self: None)
    monkeypatch.setattr(trainer_base.PPOTrainer, "_load_checkpoint", lambda self: setattr(self, "global_steps", 3))
    config = config_of(["canon"])
    config.trainer.default_local_dir, config.trainer.resume_mode = str(tmp_path), "auto"
    one, two = (driver(config.copy(), Queue(), monkeypatch) for _ in range(2))
    one.global_steps, one.hclm_first.state.memory["canon"]["seen"] = 3, 5
    with pytest.raises(ValueError, match="was written without entropy terms"):
        two._load_checkpoint()
    one._save_checkpoint()
    two._load_checkpoint()
    assert two.hclm_first.state.memory["canon"] == {"seen": 5}


def test_the_example_is_what_verl_composes_and_the_adapter_takes():
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose("gsm8k_7b")
        by_flags = compose("gsm8k_7b", ["hclm_rl.entropy_terms=[max_rl,{clip_cov:{ratio:0.02}}]", "+hclm_rl.seed=3"])
    chain, _ = chain_of_section(OmegaConf.to_container(config.hclm_rl), "+hclm_rl")
    assert [link.name for link in chain.links] == ["clip_cov"]
    settings.refuse_settings(config, chain)
    assert config.actor_rollout_ref.actor.loss_agg_mode == "token-mean"
    assert settings.share_of_update(config) == 0.25 and settings.epsilon(config) == 1e-6
    chain, seed = chain_of_section(OmegaConf.to_container(by_flags.hclm_rl), "+hclm_rl")
    assert [link.name for link in chain.links] == ["max_rl", "clip_cov"] and seed == 3
