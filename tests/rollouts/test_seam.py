"""How a rollout sits in TRL's trainers: budgets, seeds, masks, terms, resume, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import hclm_rl
from hclm_rl.recipe.arguments import parse
from hclm_rl.trainer.checkpoints import ROLLOUT_NAME
from hclm_rl.watch.meanings import meanings
from tests.rollouts import own
from tests.tiny import largest_difference, make, prompts, weights_of

CURE = {"cure": {"branches": 3, "top": 2, "least_characters": 1}}
FORK = {"entropy_fork": {"forks": 3, "branches": 1}}
PLAIN = "tests.rollouts.own.Plain"
ALGORITHMS = ["grpo", "rloo"]


def logs_of(trainer: Any) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    own.SEEN.clear()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rollout", [CURE, FORK])
def test_a_rollout_trains(algorithm: str, rollout: dict, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, algorithm=algorithm, rollout=rollout)
    trainer.train()
    assert len(logs_of(trainer)) == 2
    for entry in logs_of(trainer):
        assert float(entry["grad_norm"]) > 0
        # what was not drawn was taken over from an original, and CURE leaves that out of the loss
        drawn, returned = entry["rollout/tokens_drawn"], entry["rollout/tokens_returned"]
        assert drawn < returned and entry["rollout/share_trained"] == (
            pytest.approx(drawn / returned) if rollout == CURE else 1.0
        )
        assert entry["rollout/tokens_reused"] > 0 > entry["rollout/logp"]
        assert not {name for name in entry if name != "step" and not meanings(name)}  # all is said in words


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_rollout_trains_under_autocast(algorithm: str, policy: str, tmp_path: Path):
    # where keys are float32 and values bfloat16
    trainer = make(policy, tmp_path, algorithm=algorithm, rollout=CURE, bf16=True, max_steps=1)
    trainer.train()
    assert logs_of(trainer)[0]["rollout/tokens_reused"] > 0


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (FORK, r'with the rollout \{"cure": .*, and this run has \{"entropy_fork"'),
        ({"cure": {**CURE["cure"], "top": 3}}, r'"top": 2.*"top": 3'),
        (None, r'"cure": .* and this run has that of TRL'),
    ],
)
def test_another_rollout_is_refused_where_a_run_goes_on(
    now: dict | None, said: str, policy: str, tmp_path: Path, caplog
):
    make(policy, tmp_path, rollout=CURE, save_strategy="steps", save_steps=1, max_steps=1).train()
    assert (tmp_path / "checkpoint-1" / ROLLOUT_NAME).exists()
    later = {"rollout": now, "max_steps": 2}
    with pytest.raises(ValueError, match=said):
        make(policy, tmp_path, **later).train(resume_from_checkpoint=True)
    make(policy, tmp_path, **later, allow_changed_terms=True).train(resume_from_checkpoint=True)
    assert "was written with the rollout" in caplog.text


def test_a_column_of_the_data_is_not_overwritten(policy: str, tmp_path: Path):
    data = prompts().add_column("template", ["mine"] * len(prompts()))
    trainer = make(policy, tmp_path, rollout="prompt_augmentation", max_completion_length=4)
    trainer.train_dataset = data
    with pytest.raises(ValueError, match="the data has a column 'template', which the rollout gives its responses"):
        trainer.train()


def test_an_adapter_is_what_draws(policy: str, tmp_path: Path):
    """With LoRA the log-probs that were drawn by are those of the model with its adapter."""
    peft = pytest.importorskip("peft", reason="needs the extra `peft`")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make(policy, tmp_path, rollout=CURE, trainer={"peft_config": adapter})
    trainer.train()
    for entry in logs_of(trainer):
        assert entry["rollout/tokens_drawn"] < entry["rollout/tokens_returned"] and float(entry["grad_norm"]) > 0


class Keeping:
    """Keeps each generation batch; mixed into a trainer of ours."""

    batches: list[dict]

    def _generate_and_score_completions(self, inputs: list) -> dict:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        self.batches = [*getattr(self, "batches", []), output]
        return output


class KeepingGrpo(Keeping, hclm_rl.GRPOTrainer):
    pass


class KeepingRloo(Keeping, hclm_rl.RLOOTrainer):
    pass


def keeping(policy: str, out: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    classes = {"grpo": (None, KeepingGrpo), "rloo": (None, KeepingRloo)}
    monkeypatch.setattr("tests.tiny.PAIRS", classes)
    return make(policy, out, algorithm=algorithm, **changes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trl_gets_the_responses_and_the_log_probs_of_the_loss(
    algorithm: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = keeping(policy, tmp_path, algorithm, monkeypatch, rollout=PLAIN, temperature=0.7, max_steps=1)
    logps: list[torch.Tensor] = []
    stock = trainer._hclm_trls_pass

    def kept(*args: Any, **kwargs: Any) -> tuple:
        found = stock(*args, **kwargs)
        logps.append(found[0].detach())
        return found

    trainer._hclm_trls_pass = kept
    trainer.train()
    [seen], [batch] = own.SEEN, trainer.batches
    assert len(seen["prompts"]) == 2 and len(seen["ids"]) == 8  # two groups of four
    ids = [
        row[mask.bool()].tolist() for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    asked = [row[mask.bool()].tolist() for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    assert ids == seen["ids"] and asked == [each for each in seen["prompts"] for _ in range(4)]
    if algorithm == "grpo":  # which hands them on; rows are shuffled before the loss, so sorted sums are compared
        drawn = torch.where(batch["completion_mask"].bool(), batch["sampling_per_token_logps"], 0).sum(dim=1)
        of_loss = logps[-1].sum(dim=1)
        torch.testing.assert_close(drawn.sort().values, of_loss.sort().values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_left_out_has_no_gradient(algorithm: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The gradient at the log-probs of tokens that the rollout does not train is 0, that of the others is not."""
    trainer = keeping(policy, tmp_path, algorithm, monkeypatch, rollout=CURE, max_steps=1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    stock = trainer._hclm_trls_pass

    def kept(*args: Any, **kwargs: Any) -> tuple:
        found = stock(*args, **kwargs)
        if found[0].requires_grad:
            mask = trainer._hclm.inputs["tool_mask"].bool() & trainer._hclm.inputs["completion_mask"].bool()
            found[0].register_hook(lambda gradient: seen.append((gradient, mask)))
        return found

    trainer._hclm_trls_pass = kept
    trainer.train()
    [(gradient, mask)] = seen
    assert (~mask & trainer.batches[0]["completion_mask"].bool().any()).any()
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))
    assert (gradient[mask] != 0).any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_that_was_resumed_is_the_run(algorithm: str, policy: str, tmp_path: Path):
    check_resumed_runs(policy, tmp_path, algorithm=algorithm)


def check_resumed_runs(policy: str, folder: Path, **changes: Any) -> None:
    """A run of CURE that is resumed ends bit for bit as the one that was not."""
    settings = {"rollout": CURE, "max_steps": 4, "steps_per_generation": 2, **changes}
    settings |= {"save_strategy": "steps", "save_steps": 1, "terms": ["entropy_bonus"]}
    trainer = make(policy, folder, **settings)
    trainer.train()
    whole = weights_of(trainer)
    for step in (1, 2):  # within a generation batch, and at its end
        resumed = make(policy, folder / f"from {step}", **settings)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert largest_difference(whole, weights_of(resumed)) == 0


def test_every_generation_batch_draws_anew(policy: str, tmp_path: Path):
    """Two batches in each of two optimiser steps, of the same prompts; the seed decides."""
    one = Dataset.from_dict({"prompt": ["1 2 3"] * 8})
    settings = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "learning_rate": 0.0}
    seen = []
    for seed in (7, 7, 8):
        trainer = make(policy, tmp_path, rollout=PLAIN, **settings, seed=seed)
        trainer.train_dataset = one  # all alike
        trainer.train()
        seen.append([each["ids"] for each in own.SEEN])
        own.SEEN.clear()
    assert len(seen[0]) == 4 and len({str(each) for each in seen[0]}) == 4
    assert seen[0] == seen[1] != seen[2]


def test_evaluation_is_trls(policy: str, tmp_path: Path):
    found = []
    for rollout in (None, PLAIN):
        trainer = make(policy, tmp_path, rollout=rollout, trainer={"eval_dataset": prompts(4)})
        torch.manual_seed(3)
        found.append(trainer.evaluate())
    assert not own.SEEN
    assert {k: v for k, v in found[0].items() if "time" not in k and "second" not in k} == {
        k: v for k, v in found[1].items() if "time" not in k and "second" not in k
    }


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_columns_reach_rewards_and_terms(algorithm: str, policy: str, tmp_path: Path):
    given: list = []

    def reward(completions: list, marked: list[int], **columns: Any) -> list[float]:
        given.append(marked)
        return [float(each) for each in marked]

    trainer = make(policy, tmp_path, algorithm=algorithm, rollout=PLAIN, terms=["entropy_bonus"], max_steps=1)
    trainer.reward_funcs, trainer.reward_func_names = [reward], ["reward"]
    trainer.train()
    assert given == [[0, 1] * 4]
    assert logs_of(trainer)[0]["reward"] == 0.5


FAULTS = {
    "few": "returned 7 responses; it must return 8, 4 to each of 2 prompts: response 7 is the first that is missing",
    "long": ", response 7 of 8 .counted from 0.: has 50 tokens; at most max_completion_length, 6, are allowed",
    "no log-probs": ", response 7 of 8 .counted from 0.: has no log-probs; one for each of its",
    "nan": ", response 7 of 8 .counted from 0.: the log-prob of token 0 is nan; finite numbers of at most 0 are",
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rollout_with_a_fault_is_refused(algorithm: str, fault: str, policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, algorithm=algorithm, rollout={PLAIN: {"fault": fault}})
    with pytest.raises(ValueError, match=f"^the rollout 'Plain'.?{FAULTS[fault]}"):
        trainer.train()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_press_within_a_rollout_leaves_the_last_checkpoint(algorithm: str, policy: str, tmp_path: Path):
    settings = {"algorithm": algorithm, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make(policy, tmp_path / "whole", rollout=PLAIN, **settings)
    whole.train()
    out = tmp_path / "stopped"
    stopped = make(policy, out, rollout={PLAIN: {"fault": "interrupt", "at": 2}}, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert stopped._hclm.rolling is None and getattr(stopped, "rollout_func", None) is None
    assert stopped.model.training  # as it was before the rollout
    assert json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    # the fault is a value of this rollout, which is another without it
    resumed = make(policy, out, rollout=PLAIN, allow_changed_terms=True, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0


# of stage R and of stage T, and with statistics of the step
TERMS = [
    ["max_rl", {"entropy_bonus": {"coef": 0.01}}],
    ["perplexity_advantage", "forking_tokens"],
    ["steer", "entropy_advantage"],
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(str(each)[:12] for each in terms))
@pytest.mark.parametrize(("algorithm", "rollout"), [("grpo", CURE), ("grpo", FORK), ("rloo", CURE)])
def test_terms_work_with_every_rollout(algorithm: str, rollout: dict, terms: list, policy: str, tmp_path: Path):
    settings = {"beta": 0.0} if algorithm == "grpo" else {"beta": 0.0, "normalize_advantages": False}
    trainer = make(policy, tmp_path, algorithm=algorithm, rollout=rollout, terms=terms, **settings)
    trainer.train()
    for entry in logs_of(trainer):
        assert all(torch.tensor(float(value)).isfinite() for value in entry.values())
    names = [each if isinstance(each, str) else next(iter(each)) for each in terms]
    assert all(max(float(entry[f"{name}/affected"]) for entry in logs_of(trainer)) > 0 for name in names)


REFUSED = {
    "a group of another size": ({"num_generations": 2}, "cure: num_generations must be a multiple of 1 . branches, 4"),
    "a server of vLLM": (
        {"use_vllm": True, "vllm_mode": "server"},
        "the rollout 'cure' asks vLLM as often as its own responses need, and a server, .* set vllm_mode: colocate",
    ),
    "vLLM over several GPUs": (
        {"use_vllm": True, "vllm_tensor_parallel_size": 2},
        "or an engine over several GPUs, must be asked by all processes at once: .* vllm_tensor_parallel_size: 1",
    ),
    "vLLM with a grammar": (
        {"use_vllm": True, "vllm_structured_outputs_regex": "a"}, "draws from all words: drop vllm_structured_outputs"
    ),
    "settings of generate": ({"generation_kwargs": {"num_beams": 2}}, "the rollout 'cure' draws tokens itself"),
    "batching": ({"use_transformers_continuous_batching": True}, "the rollout 'cure' draws tokens itself"),
    "a second source": ({"fixed": True}, "the rollout 'cure' beside rollout_func: the responses have one source"),
    "no tools": ({"rollout": "arpo"}, "the rollout 'arpo' branches behind the replies of tools, and this run has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_cannot_give_is_refused_before_it_begins(case: str, policy: str, tmp_path: Path):
    changes, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as caught:
        make(policy, tmp_path, **{"rollout": CURE, **changes})
    assert "\n" not in str(caught.value)


def test_a_recipes_own_rollout_needs_the_flag(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: coins\nmodel_name_or_path: testbed\noutput_dir: {tmp_path}\nrollout: {PLAIN}\n")
    line = ["--config", str(recipe), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match=r"the rollout 'tests\.rollouts\.own\.Plain' is code from outside the library"):
        parse("grpo", line)
    assert parse("grpo", [*line, "--allow_custom_code", "true"])[1].rollout == PLAIN
    settings = parse(
        "rloo", ["--use_cpu", "true", "--bf16", "false", "--num_generations", "4", "--rollout", json.dumps(CURE)]
    )
    assert json.loads(str(settings[1].rollout)) == CURE or settings[1].rollout == CURE
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_an_object_stands_in_the_config_as_a_recipe_has_it(tmp_path: Path):
    config = hclm_rl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, rollout=own.Plain(fault="few"))
    assert config.to_dict()["rollout"] == {PLAIN: {"fault": "few", "at": 0}}
