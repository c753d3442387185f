"""Resume (invariant 5), broken terms and rewards, what is refused before a model is loaded, what is logged."""

import functools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trl

import hclm_rl
from hclm_rl import Constant, Link, NotFinite, build_chain
from hclm_rl.chain.state import FILE_NAME, read
from hclm_rl.recipe.refusals import refuse_small_groups
from hclm_rl.terms.entropy_bonus import EntropyBonus
from hclm_rl.trainer.head import output_head
from hclm_rl.trainer.stage_one import count_unscored

from ..tiny import fixed_rollout, largest_difference, low_words, make, prompts, settings, weights_of
from .test_invariance import STRONG, all_terms_in_order

ALL_TERMS = [{name: STRONG.get(name, {})} for name in all_terms_in_order()]
CONTROLLED = {"entropy_bonus": {"name": "controlled", "coef": {"kind": "step_to_target", "target": 5.0, "delta": 0.1}}}
STATEFUL = [*ALL_TERMS, "tests.own_terms.Remembers", CONTROLLED]


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"lora": True}], ids=["plain", "off-policy", "LoRA"])
def test_a_run_killed_and_resumed_is_the_uninterrupted_one(changes: dict, policy: str, tmp_path: Path):
    more = {}
    if changes.pop("lora", False):
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    changes = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", **changes}
    whole = make(policy, tmp_path / "whole", terms=STATEFUL, save_steps=2, trainer=more, **changes)
    whole.train()
    assert (tmp_path / "whole/checkpoint-2/entropy_terms.safetensors").exists()
    resumed = make(policy, tmp_path / "resumed", terms=STATEFUL, save_steps=2, trainer=more, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0.0
    ends = [(tmp_path / run / "checkpoint-6" / FILE_NAME).read_bytes() for run in ("whole", "resumed")]
    assert ends[0] == ends[1]
    memory = read(tmp_path / "whole/checkpoint-6")[0]["memory"]
    assert len(memory["Remembers"]["history"]) == 6 // changes.get("num_iterations", 1)


def test_resume_without_the_terms_state_would_differ(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make(policy, tmp_path / "whole", terms=STATEFUL, **changes)
    whole.train()
    (tmp_path / "whole/checkpoint-2" / FILE_NAME).unlink()
    with pytest.raises(ValueError, match="so the entropy terms would start afresh: resume without terms, or set allow"):
        make(policy, tmp_path / "no", terms=STATEFUL, **changes).train(str(tmp_path / "whole/checkpoint-2"))
    resumed = make(policy, tmp_path / "resumed", terms=STATEFUL, allow_changed_terms=True, **changes)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert "the entropy terms start afresh" in caplog.text
    assert largest_difference(weights_of(whole), weights_of(resumed)) > 0


def test_resume_with_other_terms_is_refused(policy: str, tmp_path: Path):
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make(policy, tmp_path, terms=["qae"], **changes).train()
    other = make(policy, tmp_path, terms=["clip_cov"], **{**changes, "max_steps": 4})
    with pytest.raises(ValueError, match=r"\['qae'\], this run has \['clip_cov'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("quantity", ["reward", "advantage", "loss", "column"])
def test_a_nan_stops_the_run_and_the_checkpoint_is_intact(quantity: str, policy: str, tmp_path: Path):
    terms = [{"tests.own_terms.BreaksAt": {"at": 2, "quantity": quantity, "name": "mine"}}]
    trainer = make(policy, tmp_path, terms=terms, max_steps=4, save_strategy="steps", save_steps=1)
    with pytest.raises(NotFinite, match=rf"'mine' produced .* in its (\w+ )?'?{quantity[:4]}.* at step 2"):
        trainer.train()
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())
    mended = [{"tests.own_terms.BreaksAt": {"at": 9, "name": "mine"}}]
    again = make(policy, tmp_path, terms=mended, max_steps=4, allow_changed_terms=True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


@pytest.mark.parametrize("bad", [math.inf, -math.inf, "1.5", [1.0, 2.0]])
def test_a_reward_that_is_no_number_is_named(bad: object, policy: str, tmp_path: Path):
    def my_reward(completions: list[str], **_) -> list:
        return [0.0, bad, *[1.0] * (len(completions) - 2)]

    args = hclm_rl.GRPOConfig(str(tmp_path), entropy_terms=["qae"], **settings())
    trainer = hclm_rl.GRPOTrainer(policy, my_reward, args, prompts())
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert str(error.value) == (
        f"the reward function 'my_reward' returned {bad!r} for response 1 of 8; return a finite number, or None for a "
        "response that it does not score"
    )


def test_a_reward_model_that_gives_an_infinity_is_named(policy: str, tmp_path: Path):
    def my_reward(completions: list[str], **_) -> list[float]:
        return [1.0] * len(completions)

    args = hclm_rl.GRPOConfig(str(tmp_path), entropy_terms=["qae"], **settings())
    trainer = hclm_rl.GRPOTrainer(policy, my_reward, args, prompts())
    trainer.model.train()
    count_unscored(trainer, torch.tensor([[1.0], [math.nan], [0.0], [math.nan]]))
    assert trainer._metrics["train"]["rewards/my_reward/not_scored"] == [0.5]
    with pytest.raises(ValueError, match="'my_reward' returned 1 infinities for 2 responses; return a finite number"):
        count_unscored(trainer, torch.tensor([[math.inf], [1.0]]))


def test_nan_from_a_reward_is_not_scored_and_counted(policy: str, tmp_path: Path):
    def scored(given: float | None, out: str, terms: list) -> tuple[dict, dict]:
        def my_reward(completions: list[str], **_) -> list:
            return [given, 1.0, *[float(len(text)) for text in completions[2:]]]

        args = hclm_rl.GRPOConfig(str(tmp_path / out), entropy_terms=terms, **settings())
        trainer = hclm_rl.GRPOTrainer(policy, my_reward, args, prompts())
        trainer.train()
        return weights_of(trainer), trainer.state.log_history[0]

    of_nan, said = scored(math.nan, "nan", ["qae"])
    assert largest_difference(of_nan, scored(None, "none", ["qae"])[0]) == 0.0
    assert float(said["rewards/my_reward/not_scored"]) == 0.125  # one of eight


def test_without_terms_a_reward_is_trls_matter(policy: str, tmp_path: Path):
    def my_reward(completions: list[str], **_) -> list[float]:
        return [math.nan, math.inf, *[float(len(text)) for text in completions[2:]]]

    ends = []
    for trainer_class, config in ((trl.GRPOTrainer, trl.GRPOConfig), (hclm_rl.GRPOTrainer, hclm_rl.GRPOConfig)):
        trainer = trainer_class(policy, my_reward, config(str(tmp_path), **settings(max_steps=1)), prompts())
        trainer.train()
        ends.append((weights_of(trainer), trainer.state.log_history[0].keys()))
    (stock, stock_keys), (ours, our_keys) = ends
    assert stock_keys == our_keys - {"collapse/state"}  # the detector watches every run of ours
    assert all(torch.equal(stock[name], ours[name]) or stock[name].isnan().any() for name in stock)


def test_a_reward_of_the_wrong_length_is_named(policy: str, tmp_path: Path):
    def my_reward(completions: list[str], **_) -> list[float]:
        return [1.0]

    trainer = hclm_rl.GRPOTrainer(policy, my_reward, hclm_rl.GRPOConfig(str(tmp_path), **settings()), prompts())
    with pytest.raises(ValueError, match=r"'my_reward' returned 1 rewards, but 8 were expected"):
        trainer.train()


class Scaled:
    """A reward with a setting that a callback may change while the run goes on; a generator, which TRL takes too."""

    scale = 1.0

    def __call__(self, completions: list[str], **_: object) -> Iterator[float]:
        return (self.scale * len(text) for text in completions)


class Asks:
    """An asynchronous one, as for a judge behind a network."""

    async def __call__(self, completions: list[str], weight: float, **_: object) -> list[float]:
        return [weight * len(text) for text in completions]


@pytest.mark.parametrize("terms", [[], ["qae"]])
def test_the_users_reward_functions_stay_what_they_are(terms: list, policy: str, tmp_path: Path):
    scaled, asks = Scaled(), functools.partial(Asks(), weight=2.0)
    rewards = [scaled, asks]
    args = hclm_rl.GRPOConfig(str(tmp_path), entropy_terms=terms, **settings())
    trainer = hclm_rl.GRPOTrainer(policy, rewards, args, prompts())
    assert rewards == [scaled, asks] and trainer.reward_funcs == [scaled, asks]
    trainer.reward_funcs[0].scale = 5.0
    trainer.train()
    assert trainer.reward_funcs == [scaled, asks]
    for entry in trainer.state.log_history[:2]:
        assert float(entry["rewards/Scaled/mean"]) == pytest.approx(2.5 * float(entry["rewards/Asks/mean"]), rel=1e-3)


def test_a_reward_may_leave_a_response_out(policy: str, tmp_path: Path):
    def some(completions: list[str], **_) -> list[float | None]:
        return [None if i == 0 else float(len(text)) for i, text in enumerate(completions)]

    args = hclm_rl.GRPOConfig(str(tmp_path), entropy_terms=["qae", "clip_cov"], **settings())
    trainer = hclm_rl.GRPOTrainer(policy, some, args, prompts())
    trainer.train()
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer).values())


def test_trls_own_config_and_terms_as_objects(policy: str, tmp_path: Path):
    args = trl.GRPOConfig(str(tmp_path), **settings())
    terms = [
        hclm_rl.Link(
            name="bonus",
            term=hclm_rl.build_chain(["entropy_bonus"]).links[0].term,
            coef=hclm_rl.Linear(start=0.1, end=0.0),
        )
    ]
    trainer = hclm_rl.GRPOTrainer(policy, low_words, args, prompts(), entropy_terms=terms)
    trainer.train()
    assert [float(entry["bonus/coef"]) for entry in trainer.state.log_history[:2]] == pytest.approx([0.1, 0.05])


def test_entries_of_the_log_share_the_names_of_our_metrics(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=["entropy_flow", "kl_cov"], max_steps=2, logging_steps=1)
    trainer.train()
    first, second = ({name: name for name in entry} for entry in trainer.state.log_history[:2])
    own = {name for name in first if name.startswith(("entropy_flow/", "kl_cov/")) or name.endswith("not_scored")}
    assert len(own) > 10 and all(first[name] is second[name] for name in own)


def test_terms_twice_are_refused(policy: str, tmp_path: Path):
    args = hclm_rl.GRPOConfig(str(tmp_path), entropy_terms=["qae"], **settings())
    with pytest.raises(ValueError, match="came twice"):
        hclm_rl.GRPOTrainer(policy, low_words, args, prompts(), entropy_terms=["qae"])


def test_what_the_run_cannot_give_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}, "text_config": {}}))
    args = hclm_rl.GRPOConfig(str(tmp_path / "out"), entropy_terms=["qae", "log_det"], **settings())
    with pytest.raises(ValueError, match=r"log_det: reads scores or hidden states .* vision models"):
        hclm_rl.GRPOTrainer(str(tmp_path), low_words, args, prompts())  # there are no weights to load
    gate = {"kind": "step_to_target", "target": 0.2, "rule": "paper"}
    args = hclm_rl.GRPOConfig(str(tmp_path / "out"), entropy_terms=[{"entropy_bonus": {"coef": gate}}], **settings())
    with pytest.raises(ValueError, match=r"^entropy_bonus: its coefficient reads the entropy of the sampled batch, .*"):
        hclm_rl.GRPOTrainer(str(tmp_path), low_words, args, prompts())
    monkeypatch.setattr("hclm_rl.recipe.refusals.is_deepspeed_zero3_enabled", lambda: True)
    args = hclm_rl.GRPOConfig(str(tmp_path / "out"), entropy_terms=["tests.own_terms.ReadsVocabulary"], **settings())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ValueError, match=r"ReadsVocabulary: reads the whole next-token distribution with grad.* ZeRO-3"
    ):
        hclm_rl.GRPOTrainer(str(tmp_path), low_words, args, prompts())


@pytest.mark.parametrize("way", ["config", "launcher"])
def test_fsdp1_is_refused_where_the_head_is_read(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    given = {"fsdp": True, "fsdp_config": {"version": 1}} if way == "config" else {}
    args = hclm_rl.GRPOConfig(str(tmp_path / "out"), entropy_terms=["entropy_flow"], **settings(), **given)
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # accelerate takes version 1 where none is named
    with pytest.raises(ValueError, match="entropy_flow: reads the whole next-token distribution, for which FSDP1"):
        hclm_rl.GRPOTrainer(str(tmp_path), low_words, args, prompts())  # there are no weights to load


def test_a_head_that_is_not_whole_is_refused(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, terms=[{"entropy_flow": {"through": "head"}}])
    trainer.model.lm_head.weight = torch.nn.Parameter(trainer.model.lm_head.weight.detach().flatten())
    sentence = r"^entropy_flow: reads the output head, which is not whole here .* DDP, FSDP2"
    with pytest.raises(ValueError, match=sentence), output_head(trainer):
        pass


def test_an_inert_term_is_said_at_the_start(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        make(policy, tmp_path, terms=["kl_cov"], num_iterations=2)
    assert "kl_cov" not in caplog.text
    with caplog.at_level(logging.WARNING):
        make(policy, tmp_path, terms=["kl_cov"])
    assert "the entropy term 'kl_cov' does nothing in this run" in caplog.text


def test_an_idle_term_is_said_once(policy: str, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hclm_rl.trainer.step.IDLE_STEPS_BEFORE_WARNING", 2)
    with caplog.at_level(logging.WARNING):
        make(policy, tmp_path, terms=[{"clip_cov": {"lower": 900.0, "upper": 901.0}}], max_steps=5).train()
    assert caplog.text.count("'clip_cov' has affected no token for 2 optimiser steps") == 1


def test_idle_is_fifty_steps_in_a_row(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def after(steps: int, *terms: object) -> list[str]:
        caplog.clear()
        trainer = make(policy, tmp_path, terms=list(terms), fixed=True, max_steps=steps, logging_steps=100)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        return [record.getMessage() for record in caplog.records if "affected no token" in record.getMessage()]

    nothing = {"clip_cov": {"lower": 900.0, "upper": 901.0}}
    said = "the entropy term 'clip_cov' has affected no token for 50 optimiser steps"
    assert after(49, nothing) == []
    # of the others none is idle: at coef 0, a diagnostic, one that acts in every fourth step
    friends = [{"entropy_bonus": {"coef": 0.0}}, "information_force", {"tests.own_terms.Rarely": {"every": 4}}]
    assert after(51, nothing, *friends) == [said]


def test_affected_shares(policy: str, tmp_path: Path):
    # forking_tokens keeps the top 20 %; of the rest it changes those whose advantage was not 0, and of the kept those
    # too (normalise_by "kept"), so with "all" the share is at most 80 %
    terms = [{"forking_tokens": {"normalise_by": "all"}}, {"entropy_bonus": {"coef": 0.0}}, "information_force"]
    trainer = make(policy, tmp_path, terms=terms, fixed=True)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert 0.3 < float(entry["forking_tokens/affected"]) <= 0.8
        assert float(entry["forking_tokens/kept"]) == pytest.approx(0.2, abs=0.05)
        assert float(entry["entropy_bonus/affected"]) == 0.0
        # a gauge changes no token and has no strength: neither is logged
        assert not {"information_force/affected", "information_force/coef"} & entry.keys()
        assert "information_force/force_norm" in entry


def test_tokens_that_a_tool_wrote_are_left_out(policy: str, tmp_path: Path):
    def with_tool(batch: list[str], trainer) -> dict:
        rollout = fixed_rollout(batch, trainer)
        masks = [[0 if t == 1 else 1 for t in range(len(ids))] for ids in rollout["completion_ids"]]
        return rollout | {"env_mask": masks}

    trainer = make(policy, tmp_path, terms=ALL_TERMS, trainer={"rollout_func": with_tool})
    seen = []
    chain_call = type(trainer._hclm.chain).__call__
    masks = lambda self, batch, *rest: (seen.append(batch.mask), chain_call(self, batch, *rest))[1]  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer._hclm.chain), "__call__", masks)
        trainer.train()
    assert seen and all(not mask[:, 1].any() and mask[:, 0].all() for mask in seen)


def test_a_controller_that_gates_by_the_sampling_entropy_moves_by_it_too(policy: str, tmp_path: Path):
    seen: list[tuple[str, float]] = []

    class Watched(Constant):
        """Notes which entropy it is told."""

        @property
        def needs_entropy(self) -> bool:
            return True

        def initial_state(self) -> dict:
            return {"n": 0.0}

        def value(self, progress: float, state: dict, entropy: float | None = None) -> float:
            assert entropy is not None
            seen.append(("value", entropy))
            return self.coefficient

        def update(self, entropy: float, state: dict) -> dict:
            seen.append(("update", entropy))
            return {"n": state["n"] + 1}

    link = Link(name="bonus", term=EntropyBonus(), coef=Watched(coefficient=0.5))
    # four updates of one rollout: the entropy of the later ones is not that of the sampling policy
    make(policy, tmp_path, terms=[link], max_steps=4, steps_per_generation=4, per_device_train_batch_size=4).train()
    gates = [entropy for kind, entropy in seen if kind == "value"]
    assert [entropy for kind, entropy in seen if kind == "update"] == gates and len(gates) == 4
    assert len(set(gates)) == 1  # one rollout, one measurement


BETWEEN = [
    ("rloo", {}, r"qae, em_rl: replaces the advantages .* for RLOO only with beta=0"),  # its default beta is 0.05
    ("rloo", {"beta": 0.0, "reward_clip_range": (-1.0, 1.0)}, "reward_clip_range unset"),
    ("rloo", {"beta": 0.0, "normalize_advantages": True}, "normalize_advantages=False"),
    ("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, "set it to 'sum_then_normalize'"),
]


@pytest.mark.parametrize(("algorithm", "changes", "sentence"), BETWEEN)
def test_what_trl_does_to_rewards_is_not_dropped_by_terms_with_a_baseline(
    algorithm: str, changes: dict, sentence: str, policy: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=sentence):
        make(policy, tmp_path, algorithm=algorithm, terms=["qae", {"em_rl": {"coef": 0.1}}], **changes)
    off = [{"qae": {"coef": 0.0}}, "clip_cov"]
    make(policy, tmp_path, algorithm=algorithm, terms=off, **changes).train()


@pytest.mark.parametrize(("algorithm", "changes", "sentence"), BETWEEN)
def test_nor_by_terms_that_shape_rewards(algorithm: str, changes: dict, sentence: str, policy: str, tmp_path: Path):
    with pytest.raises(ValueError, match="^majority_vote: shapes the rewards, .*" + sentence.split(".*")[-1].strip()):
        make(policy, tmp_path, algorithm=algorithm, terms=["clip_cov", "majority_vote"], **changes)
    make(policy, tmp_path, algorithm=algorithm, terms=[{"majority_vote": {"coef": 0.0}}], **changes).train()


@pytest.mark.parametrize(
    ("term", "sentence"),
    [
        ("max_rl", "max_rl: replaces the advantages"),
        ("unlikeliness", "unlikeliness: shapes the rewards, which .* with beta=0"),
        ("mara", "mara: acts against the KL in the loss, which RLOO puts into the rewards: use GRPO"),  # not: beta=0
    ],
)
def test_so_with_trls_own_config_before_loading(term: str, sentence: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # there are no weights to load
    args = trl.RLOOConfig(str(tmp_path / "out"), **settings())
    with pytest.raises(ValueError, match=sentence):
        hclm_rl.RLOOTrainer(str(tmp_path), low_words, args, prompts(), entropy_terms=[term])


def test_groups_smaller_than_a_term_needs_are_refused_before_loading(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # there are no weights to load
    for config, trainer in ((hclm_rl.GRPOConfig, hclm_rl.GRPOTrainer), (trl.GRPOConfig, hclm_rl.GRPOTrainer)):
        args = config(str(tmp_path / "out"), **settings())
        terms: list = [{"passk_advantage": {"k": 5}}]
        with pytest.raises(ValueError) as error:
            trainer(str(tmp_path), low_words, args, prompts(), entropy_terms=terms)
        assert str(error.value) == (
            "passk_advantage: needs groups of 5 responses or more, and num_generations is 4: raise it, or lower what "
            "the term asks for"
        )
    absent = build_chain([{"passk_advantage": {"k": 5, "coef": 0}}, {"passk_advantage": {"k": 4, "name": "four"}}])
    refuse_small_groups(absent, args)


@pytest.mark.parametrize(
    ("algorithm", "changes", "given"),
    [
        ("grpo", {"loss_type": "cispo"}, "loss_type 'cispo' with importance_sampling_level 'token'"),
        ("grpo", {"importance_sampling_level": "sequence"}, "loss_type 'dapo' with importance_sampling_level 'seq"),
        ("rloo", {}, "RLOO"),
    ],
)
def test_a_clip_that_a_loss_has_not_is_not_replaced(
    algorithm: str, changes: dict, given: str, policy: str, tmp_path: Path
):
    changes = {"algorithm": algorithm, **changes}
    with pytest.raises(ValueError, match=f"entropy_balanced: keeps or stops .* which {given}"):
        make(policy, tmp_path, terms=["entropy_balanced"], num_iterations=2, **changes)
    make(policy, tmp_path, terms=["entropy_balanced"], **changes)  # one update a rollout: nothing is clipped
    advantages_alone = {"entropy_balanced": {"keeps_clipped": False, "dual_clip": None}}
    make(policy, tmp_path, terms=[advantages_alone], num_iterations=2, **changes)
    make(policy, tmp_path, terms=["entropy_balanced"], num_iterations=2)


@pytest.mark.parametrize("coef", [
    {"kind": "step_to_target", "target": 5.0, "delta": 0.1, "rule": "paper"},
    {"kind": "proportional_integral", "target": 0.5, "k_i": 0.1, "rule": "same_step"},
])  # fmt: skip
def test_a_rollout_without_tokens_moves_no_controller(coef: dict, policy: str, tmp_path: Path):
    def cut(batch: list[str], trainer) -> dict:
        made = fixed_rollout(batch, trainer)
        return made | {"completion_ids": [6 * [5] for _ in batch]} if trainer.state.global_step == 1 else made

    trainer = make(
        policy, tmp_path, terms=[{"entropy_bonus": {"coef": coef}}], trainer={"rollout_func": cut}, max_steps=3,
        mask_truncated_completions=True, learning_rate=0.0, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    states = [read(tmp_path / f"checkpoint-{step}")[0]["controller"]["entropy_bonus"] for step in (1, 2, 3)]
    assert states[0] == states[1] != states[2]
    assert all(math.isfinite(float(entry["entropy_bonus/coef"])) for entry in trainer.state.log_history[:3])


def test_of_several_rollouts_a_step_gate_and_update_see_the_first(policy: str, tmp_path: Path):
    coef = {"kind": "proportional_integral", "target": 0.0, "k_p": 1.0, "k_i": 0.0, "maximum": 9.0, "rule": "same_step"}
    terms = [{"entropy_bonus": {"coef": coef}}]
    trainer = make(
        policy, tmp_path, terms=terms, fixed=True, max_steps=1, steps_per_generation=1, gradient_accumulation_steps=2,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    kept = read(tmp_path / "checkpoint-1")[0]["controller"]["entropy_bonus"]
    applied = float(trainer.state.log_history[0]["entropy_bonus/coef"])
    assert applied > 0 and kept["coefficient"] == pytest.approx(applied, rel=1e-3)  # logged to four digits


def test_kl_cov_does_nothing_on_policy_though_rloo_scores_twice(policy: str, tmp_path: Path):
    from peft import LoraConfig

    dropout = LoraConfig(
        r=4, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = make(
        policy, tmp_path, algorithm="rloo", terms=[{"kl_cov": {"ratio": 0.5}}],
        trainer={"peft_config": dropout},
    )  # fmt: skip
    trainer.train()
    assert [float(entry["kl_cov/affected"]) for entry in trainer.state.log_history[:2]] == [0.0, 0.0]


def test_a_head_in_float32_over_a_half_precision_model(policy: str, tmp_path: Path):
    kernel = {"entropy_flow": {"name": "kernel", "through": "head"}}
    terms = ["siren", "entropy_flow", kernel, "lp_reg", {"discriminator_clip": {"over": "vocabulary"}}]
    inside = {"attn_implementation": "eager", "dtype": "bfloat16"}
    trainer = make(policy, tmp_path, terms=terms, model_init_kwargs=inside, cast_lm_head_to_fp32=True)
    trainer.train()
    assert trainer.model.lm_head.weight.dtype == torch.float32 and trainer.state.global_step == 2


def test_the_terms_state_is_there_when_a_checkpoint_is_pushed(policy: str, tmp_path: Path):
    trainer, seen = make(policy, tmp_path, terms=["qae"], save_strategy="steps", save_steps=1, max_steps=1), []
    pushes = trl.GRPOTrainer._push_from_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        push = lambda self, folder: seen.append((Path(folder) / FILE_NAME).exists())  # noqa: E731
        patch.setattr(trl.GRPOTrainer, "_push_from_checkpoint", push)
        trainer.args.push_to_hub = True
        patch.setattr(trl.GRPOTrainer, "push_to_hub", lambda self, **_: None)
        trainer.train()
    assert seen == [True] and pushes is trl.GRPOTrainer._push_from_checkpoint
