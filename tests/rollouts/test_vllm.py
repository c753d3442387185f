"""Rollouts that draw with vLLM. A stand-in draws here: the real one needs a GPU."""

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hclm_rl.trainer.rollouts as trainers
from tests.cpu_processes import run_by_two
from tests.rollouts import own
from tests.rollouts.test_contract import IN_A_TRAINER
from tests.rollouts.test_seam import CURE, PLAIN, check_resumed_runs, keeping, logs_of
from tests.rollouts.vllm_stand_in import Reseeded, StandIn, install
from tests.tiny import largest_difference, make, prompts, weights_of
from tests.trainer.test_invariance import ROUNDING
from tests.two_processes import ROLLOUT

ALGORITHMS = ["grpo", "rloo"]
# what a term that shapes rewards asks of RLOO
PLAIN_REWARDS: dict[str, dict] = {"grpo": {}, "rloo": {"beta": 0.0, "normalize_advantages": False}}
CASES = {name: {name: given} for name, given in IN_A_TRAINER.items()}
CASES["arbitrary_entropy, replace"] = {"arbitrary_entropy": {"form": "replace"}}
BATCH = ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps", "advantages")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return install(monkeypatch)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_each_rollout_trains(case: str, algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path):
    settings = {"rollout": CASES[case], "use_vllm": True, **PLAIN_REWARDS[algorithm]}
    trainer = make(policy, tmp_path, algorithm=algorithm, **settings)
    trainer.train()
    [engine] = engines
    assert len(logs_of(trainer)) == 2 and engine.did == ["sync", "sync"]  # once a step
    for entry in logs_of(trainer):
        assert float(entry["grad_norm"]) > 0 and entry["rollout/tokens_reused"] > 0
        assert all(torch.tensor(float(value)).isfinite() for value in entry.values())
        if algorithm == "grpo":  # weights as they are now: the engine's log-probs are the trainer's
            assert entry["sampling/sampling_logp_difference/max"] < 1e-4
            assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_sees_what_it_sees_without_vllm(
    case: str, algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where both draw the same words, batches and weights are the same: the ratio is 1 here."""
    monkeypatch.setattr(trainers, "Sampler", Reseeded)
    found = []
    for use_vllm in (False, True):
        settings = {"rollout": CASES[case], "use_vllm": use_vllm, "temperature": 0.8}
        settings |= PLAIN_REWARDS[algorithm]
        trainer = keeping(policy, tmp_path / str(use_vllm), algorithm, monkeypatch, **settings)
        trainer.train()
        found.append((trainer.batches, weights_of(trainer)))
    (due, weights), (batches, other) = found
    assert largest_difference(weights, other) < 1e-5
    assert engines[0].asked and len(batches) == len(due) == 2
    for batch, stock in zip(batches, due, strict=True):
        assert {key for key in BATCH if key in batch} == {key for key in BATCH if key in stock}
        for key in BATCH:
            if key in batch:
                torch.testing.assert_close(batch[key].float(), stock[key].float(), atol=1e-5, rtol=1e-5)


def test_trl_weighs_tokens_by_the_engines_log_probs(monkeypatch: pytest.MonkeyPatch, policy: str, tmp_path: Path):
    """0.5 nats below the trainer's make a ratio of e^0.5 on each token that is trained."""
    install(monkeypatch, apart=0.5)
    settings = {"rollout": CURE, "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"}
    trainer = keeping(policy, tmp_path, "grpo", monkeypatch, **settings)
    trainer.train()
    for entry, batch in zip(logs_of(trainer), trainer.batches, strict=True):
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(math.exp(0.5), abs=1e-4)
        assert entry["sampling/sampling_logp_difference/mean"] == pytest.approx(0.5, abs=1e-4)
        counts = (batch["completion_mask"] * batch["tool_mask"]).bool()
        gap = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"])[counts]
        torch.testing.assert_close(gap, torch.full_like(gap, 0.5), atol=1e-4, rtol=0)
        weights = batch["importance_sampling_ratio"][counts]
        torch.testing.assert_close(weights, torch.full_like(weights, math.exp(0.5)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_budget_and_seeds(algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path):
    """The seeds are those of the streams' names, and the same in a run anew."""
    asked = []
    for run in range(2):
        own.SEEN.clear()
        make(policy, tmp_path / str(run), algorithm=algorithm, rollout=PLAIN, use_vllm=True).train()
        assert [len(each["ids"]) for each in own.SEEN] == [8, 8]
        asked.append([(text, params.seed) for text, params in engines[run].asked])
    assert asked[0] == asked[1]
    due = [
        random.Random(f"7/{step}/0/{prompt}/{i}").getrandbits(63)
        for step in range(2) for prompt in range(2) for i in range(4)
    ]  # fmt: skip
    assert [seed for _, seed in asked[0]] == due


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_was_resumed_is_the_run(algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path):
    check_resumed_runs(policy, tmp_path, algorithm=algorithm, use_vllm=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_engine_that_sleeps_gets_its_weights_anew(
    algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path
):
    """Two generation batches a step: awake within each, asleep behind it."""
    settings = {"algorithm": algorithm, "rollout": CURE, "use_vllm": True, "vllm_enable_sleep_mode": True}
    settings |= {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1}
    make(policy, tmp_path, **settings).train()
    batch = ["wake weights", "sync", "wake kv_cache", "sleep"]
    assert engines[0].did == ["sleep", *batch, *batch]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_go_over_once_a_step(algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path):
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1}  # two generation batches a step
    make(policy, tmp_path, algorithm=algorithm, rollout=CURE, use_vllm=True, **settings).train()
    assert engines[0].did == ["sync", "sync"]


def test_two_processes_draw_what_one_draws(engines: list[StandIn], policy: str, tmp_path: Path):
    run_by_two("tests.rollouts.two_processes", policy, str(tmp_path))
    for algorithm in ALGORITHMS:
        trainer = make(policy, tmp_path / "one", algorithm=algorithm, rollout=ROLLOUT, use_vllm=True)
        trainer.train()
        both = load_file(tmp_path / f"{algorithm}.safetensors")
        assert largest_difference(weights_of(trainer), both) < ROUNDING


def test_an_adapter_is_what_draws(engines: list[StandIn], policy: str, tmp_path: Path):
    """TRL merges it into the engine's weights; the policy scores with it."""
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make(policy, tmp_path, rollout=CURE, use_vllm=True, trainer={"peft_config": adapter})
    trainer.train()
    assert float(logs_of(trainer)[0]["grad_norm"]) > 0
    for entry in logs_of(trainer):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
    base = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert not torch.allclose(engines[0].model.get_parameter("model.layers.0.self_attn.q_proj.weight"), base)


def test_evaluation_is_trls(engines: list[StandIn], policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, rollout=PLAIN, use_vllm=True, trainer={"eval_dataset": prompts(4)})
    own.SEEN.clear()
    trainer.evaluate()
    assert not own.SEEN and {params.seed for _, params in engines[0].asked} == {None}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_the_package_it_is_trls_sentence(algorithm: str, policy: str, tmp_path: Path):
    with pytest.raises(ImportError, match="vLLM is not available and `use_vllm` is set to True"):
        make(policy, tmp_path, algorithm=algorithm, rollout=CURE, use_vllm=True)
