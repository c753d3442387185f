from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from hclm_rl.testbed import evaluate, find_task
from hclm_rl.testbed.policy import load_policy, new_policy, new_tokenizer, policy_path, save_policy
from hclm_rl.testbed.warm_start_recipe import warm_start

TEXT = "7 3 5 : 35 ! 4 5 7 > 3 32"


def test_tokenizer_has_one_token_a_word_and_gives_the_text_back():
    tokenizer = new_tokenizer()
    assert len(tokenizer) == 46
    ids = tokenizer(TEXT + " <eos> <pad>")["input_ids"]
    assert len(ids) == 14
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT


def test_a_word_outside_the_vocabulary_is_an_error():
    with pytest.raises(Exception, match="Missing"):
        new_tokenizer()("41")


def test_shipped_policy_is_small_and_loads_in_float32_by_its_path():
    model, tokenizer = load_policy()
    from_path = AutoModelForCausalLM.from_pretrained(policy_path())
    assert {parameter.dtype for parameter in from_path.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), from_path.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(policy_path())(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert (Path(policy_path()) / "model.safetensors").stat().st_size <= 300_000
    # embedding 46 * 64; a layer: attention 4 * 64^2, MLP 3 * 64 * 192, two norms of 64; last norm 64
    assert model.num_parameters() == 46 * 64 + 2 * (4 * 64**2 + 3 * 64 * 192 + 2 * 64) + 64


def test_a_saved_policy_loads_in_float32_with_weights_rounded_to_float16(tmp_path):
    model = new_policy(seed=3)
    save_policy(model, new_tokenizer(), str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for saved, read in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved.half().float(), read)


def test_a_new_policy_follows_from_its_seed_and_leaves_the_global_generator():
    state = torch.random.get_rng_state()
    weights = [new_policy(seed).model.embed_tokens.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_trl_trains_the_policy_by_its_path(tmp_path):
    task = find_task("coins", prompts=8, eval_prompts=2)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=32,
        num_generations=16,
        max_completion_length=task.max_completion_length,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(policy_path(), task.reward_funcs, args, train_dataset=task.train_dataset)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    # of 64 completions of the warm start, about 40 % are right: the chance of none is 0.6^64
    assert sum(entry["reward"] for entry in steps) > 0
    assert all(0.2 < entry["entropy"] < 0.7 for entry in steps)  # 0.44 nats over many prompts


@pytest.mark.slow
def test_the_recipe_gives_the_stated_warm_start(tmp_path):
    warm_start(str(tmp_path), seed=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    task = find_task("coins", eval_split="test")
    measured = evaluate(model, tokenizer, task.eval_dataset, task)
    # shipped (seed 0): 0.40 +- 0.02 and 0.44 +- 0.01; the band leaves room for other seeds and other CPUs
    assert 0.30 < measured.pass_at[1] < 0.50
    assert 0.38 < measured.token_entropy < 0.50
    assert measured.pass_at[32] > 0.98


def test_the_policy_of_products_is_shipped_small_and_reads_a_prompt_of_six_tokens():
    model, tokenizer = load_policy("products")
    assert len(tokenizer) == 14 and len(tokenizer("4 7 3 * 8 =")["input_ids"]) == 6
    assert (Path(policy_path("products")) / "model.safetensors").stat().st_size <= 2_000_000
    # embedding 14 * 96; a layer: attention 4 * 96^2, MLP 3 * 96 * 288, two norms of 96; last norm 96
    assert model.num_parameters() == 14 * 96 + 3 * (4 * 96**2 + 3 * 96 * 288 + 2 * 96) + 96
