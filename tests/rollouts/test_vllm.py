"""Rollouts that draw with vLLM. A stand-in draws here: the real one needs a GPU."""

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hclm_rl.trainer.rollouts as trainers
from hclm_rl.rollouts import Branch, Sampler
from hclm_rl.rollouts.vllm_sampler import VllmSampler
from hclm_rl.trainer.engine import VllmEngine
from tests.cpu_processes import run_by_two
from tests.rollouts import own
from tests.rollouts.test_contract import IN_A_TRAINER
from tests.rollouts.test_sampler import model_of
from tests.rollouts.test_seam import CURE, PLAIN, keeping, logs_of
from tests.rollouts.vllm_stand_in import StandIn, install
from tests.tiny import largest_difference, make, prompts, weights_of
from tests.trainer.test_invariance import ROUNDING
from tests.two_processes import ROLLOUT

ALGORITHMS = ["grpo", "rloo"]
# what a term that shapes rewards asks of RLOO
PLAIN_REWARDS: dict[str, dict] = {"grpo": {}, "rloo": {"beta": 0.0, "normalize_advantages": False}}
BATCH = ("prompt_ids", "completion_ids", "completion_mask", "tool_mask", "sampling_per_token_logps", "advantages")


class Reseeded(Sampler):
    """Draws by a stream that is sown from the branch's, as an engine with a seed for each request does."""

    def extend(self, branches: Any, **given: Any) -> None:
        for each in branches:
            if self.is_open(each):
                each.stream = random.Random(each.stream.getrandbits(63))
        super().extend(branches, **given)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return install(monkeypatch)


# ---- the sampler by itself


@pytest.fixture
def model() -> Any:
    return model_of("llama")


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def drawing(model: Any, *, settings: dict | None = None, engine: dict | None = None, **changes: Any) -> VllmSampler:
    stand_in = StandIn(model, **(engine or {}))
    asks = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, **(settings or {})}
    given = VllmEngine(llm=stand_in, context=stand_in.context, ends=[1], settings=asks)
    return VllmSampler(**{"model": model, "ends": [1], "pad": 0, "longest": 8, **changes}, engine=given)


def grown(sampler: Sampler, **given: Any) -> list[Branch]:
    """Texts of unlike lengths, and branches from their middle."""
    roots = sampler.begin([[2, 3], [4, 4, 2, 3, 2], [3]])
    rows = [root.fork(0, random.Random(f"{p}/{i}")) for p, root in enumerate(roots) for i in range(3)]
    sampler.extend(rows, **given)
    forks = [each.fork(len(each.ids) // 2, random.Random(f"fork {i}")) for i, each in enumerate(rows)]
    sampler.extend(forks, **given)
    return [*rows, *forks]


@pytest.mark.parametrize("kind", ["llama", "grouped heads, sliding window", "learned positions"])
@pytest.mark.parametrize("at_once", [1, 2**27])  # a token at a time, and all
def test_what_it_says_of_a_text_is_what_the_transformers_sampler_says(
    kind: str, at_once: int, params: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hclm_rl.rollouts.vllm_sampler.AT_ONCE", at_once)
    model = model_of(kind)
    due = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, temperature=0.7, likeliest=3))
    found = grown(drawing(model, temperature=0.7, likeliest=3))
    for one, other in zip(found, due, strict=True):
        assert (one.ids, one.is_own, one.is_ended, one.shared) == (
            other.ids,
            other.is_own,
            other.is_ended,
            other.shared,
        )
        for name in ("logps", "entropies", "of_likeliest"):
            torch.testing.assert_close(torch.tensor(getattr(one, name)), torch.tensor(getattr(other, name)))


def test_another_temperature_is_the_draws_alone(model: Any, params: None):
    """The log-probs stay those of the loss's temperature, and the engine's error stays in them."""
    due = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, temperature=0.7), temperature=1.4)
    found = grown(drawing(model, temperature=0.7, engine={"apart": 0.25}), temperature=1.4)
    assert [each.ids for each in found] == [each.ids for each in due]
    for one, other in zip(found, due, strict=True):
        # 0.25 below the policy's
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps) - 0.25)
        torch.testing.assert_close(torch.tensor(one.entropies), torch.tensor(other.entropies))


def test_the_log_probs_are_those_of_what_was_drawn_from(model: Any, params: None):
    """Of two words that are left, so the whole distribution's are lower."""
    found = grown(drawing(model, settings={"top_k": 2}, engine={"apart": 0.0}, top_k=2))
    whole = grown(Reseeded(model=model, ends=[1], pad=0, longest=8, top_k=2))
    assert [each.ids for each in found] == [each.ids for each in whole]
    pairs = [pair for a, b in zip(found, whole, strict=True) for pair in zip(a.logps, b.logps, strict=True)]
    assert all(here >= there - 1e-6 for here, there in pairs) and sum(here > there + 0.1 for here, there in pairs) > 5


def test_settings_lengths_and_seeds_reach_the_engine(model: Any, params: None):
    settings = {"top_p": 0.9, "top_k": 3, "min_p": 0.05, "repetition_penalty": 1.2}
    sampler = drawing(model, settings=settings, temperature=0.5)
    rows = grown(sampler)
    asked = sampler.engine.llm.asked  # type: ignore[attr-defined]
    assert len(asked) == 18 and len({params.seed for _, params in asked}) == 18
    for branch, (text, params) in zip(rows, asked, strict=True):
        given = (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty)
        assert given == (0.5, 0.9, 3, 0.05, 1.2) and list(params.stop_token_ids) == [1]
        assert text == branch.prompt + branch.ids[: branch.shared] and params.max_tokens == 8 - branch.shared
    assert any(each.shared for each in rows)
    again = drawing(model, settings=settings, temperature=0.5)
    assert [each.ids for each in grown(again)] == [each.ids for each in rows]
    assert [params.seed for _, params in again.engine.llm.asked] == [params.seed for _, params in asked]  # type: ignore[attr-defined]


def test_tokens_are_counted_where_they_pass(model: Any, params: None):
    """By hand: two responses to one prompt of three, the longest four; then a branch behind two tokens."""
    sampler = drawing(model, longest=4, ends=[])
    sampler.engine.llm.end = None  # type: ignore[attr-defined]
    [root] = sampler.begin([[2, 3, 4]])
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (0, 2, 0)
    rows = [root.fork(0, random.Random(i)) for i in range(2)]
    sampler.engine = VllmEngine(llm=sampler.engine.llm, context=64, ends=[], settings={})  # type: ignore[attr-defined]
    sampler.extend(rows)
    # the engine reads the first prompt but for its last token, which draws, and finds it in its cache for the second;
    # the policy reads each response behind the prompt's two: the prompt's last and three of the four
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (8, 2 + 2 + 8, 2)
    sampler.extend([rows[0].fork(2, random.Random(9))], with_entropies=False)
    assert (sampler.counts.drawn, sampler.counts.read, sampler.counts.reused) == (10, 12, 2 + 4)


def test_without_entropies_the_policy_does_not_read(model: Any, params: None):
    sampler = drawing(model)
    found = grown(sampler, with_entropies=False)
    assert all(math.isnan(value) for each in found for value in each.entropies)
    assert [each.logps for each in found] == [each.logps for each in grown(drawing(model), with_entropies=False)]
    scored = drawing(model)
    assert [each.ids for each in grown(scored)] == [each.ids for each in found]
    assert sampler.counts.read < scored.counts.read and sampler.counts.drawn == scored.counts.drawn


def test_a_log_prob_that_the_engine_lacks_is_the_policys(model: Any, params: None):
    whole = grown(drawing(model))
    lacking = grown(drawing(model, engine={"apart": math.nan}), with_entropies=False)
    for one, other in zip(lacking, whole, strict=True):
        assert one.ids == other.ids
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps))


def test_the_engines_context_ends_a_text(model: Any, params: None):
    sampler = drawing(model, engine={"context": 6, "end": None}, ends=[])
    sampler.engine = VllmEngine(llm=sampler.engine.llm, context=6, ends=[], settings={})  # type: ignore[attr-defined]
    [root] = sampler.begin([[2, 3, 4, 2]])
    row = root.fork(0, random.Random(0))
    sampler.extend([row])
    assert len(row.ids) == 2 and not sampler.is_open(row)
    with pytest.raises(ValueError, match="a prompt has 6 tokens, and vLLM takes texts of 6 with the response: raise"):
        sampler.begin([[2] * 6])


# ---- in a trainer


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_each_rollout_trains(name: str, algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path):
    settings = {"rollout": {name: IN_A_TRAINER[name]}, "use_vllm": True, **PLAIN_REWARDS[algorithm]}
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
@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_the_loss_sees_what_it_sees_without_vllm(
    name: str, algorithm: str, engines: list[StandIn], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where both draw the same words, batches and weights are the same: the ratio is 1 here."""
    monkeypatch.setattr(trainers, "Sampler", Reseeded)
    found = []
    for use_vllm in (False, True):
        settings = {"rollout": {name: IN_A_TRAINER[name]}, "use_vllm": use_vllm, "temperature": 0.8}
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
    settings = {"algorithm": algorithm, "rollout": CURE, "max_steps": 4, "steps_per_generation": 2, "use_vllm": True}
    settings |= {"save_strategy": "steps", "save_steps": 1, "terms": ["entropy_bonus"]}
    trainer = make(policy, tmp_path, **settings)
    trainer.train()
    whole = weights_of(trainer)
    for step in (1, 2):  # within a generation batch, and at its end
        resumed = make(policy, tmp_path / f"from {step}", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert largest_difference(whole, weights_of(resumed)) == 0


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
