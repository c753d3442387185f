"""The smallest run that exercises the whole trainer: a 1-layer policy, eight completions, a graded reward."""

import random
import zlib
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hclm_rl
from hclm_rl.recipe.config import find_term

LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"]
WITH_TOOLS = {"info_po", "tool_bonus"}  # terms that do nothing in text without tools
# what a term must be told in a run without a KL, which loads no reference model
ALONE = {"rep_exp": {"features": "policy"}}
WORDS = [str(i) for i in range(24)]
PAIRS = {"grpo": (trl.GRPOTrainer, hclm_rl.GRPOTrainer), "rloo": (trl.RLOOTrainer, hclm_rl.RLOOTrainer)}
CONFIGS = {"grpo": hclm_rl.GRPOConfig, "rloo": hclm_rl.RLOOConfig}


def save_tiny_policy(folder: Path) -> str:
    """A random Llama over 26 words, saved, because a reference model is loaded by name."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *WORDS])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=26,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def prompts(count: int = 16) -> Dataset:
    """Prompts of two lengths, so that there is padding."""
    rng = random.Random(1)
    return Dataset.from_dict({"prompt": [" ".join(rng.choices(WORDS, k=rng.choice([3, 4]))) for _ in range(count)]})


def low_words(completions: list[str], **_: Any) -> list[float]:
    """Share of words below 12, cut into five grades: unequal within most groups, equal in some."""
    return [round(4 * sum(int(w) < 12 for w in text.split()) / max(len(text.split()), 1)) / 4 for text in completions]


def fixed_rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """Completions that depend on prompt, number in the group and step alone: the same on one process and on two."""
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(batch)
    prompt_ids = [tokenizer(text)["input_ids"] for text in batch]
    completion_ids = []
    for i, text in enumerate(batch):
        key = f"{text}/{(first + i) % trainer.num_generations}/{trainer.state.global_step}"
        rng = random.Random(zlib.crc32(key.encode()))
        completion_ids.append([rng.randrange(2, 26) for _ in range(rng.randint(2, 6))] + [1])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def turns_rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """The same, but a tool wrote the second or the third token."""
    made = fixed_rollout(batch, trainer)
    masks = [[int(t != 1 + ids[0] % 2) for t in range(len(ids))] for ids in made["completion_ids"]]
    return made | {"env_mask": masks}


def truncated_rollout(batch: list[str], trainer: Any) -> dict[str, Any]:
    """The same, but the second four of the eight run into the limit of six tokens: TRL can leave them out."""
    made = fixed_rollout(batch, trainer)
    first = trainer.accelerator.process_index * len(batch)
    ids = [(each[:-1] + 6 * [5])[:6] if first + i >= 4 else each for i, each in enumerate(made["completion_ids"])]
    return made | {"completion_ids": ids}


ROLLOUTS = {True: fixed_rollout, "turns": turns_rollout, "truncated": truncated_rollout}


def beta_of(term: str) -> float:
    """The strength of the KL, which some terms act against; 0 is TRL's default."""
    made = find_term(term)()  # some forms of a term need it
    return 0.04 if made.needs_reference or made.needs_reference_model else 0.0


def settings(**changes: Any) -> dict[str, Any]:
    """Two optimiser steps of SGD on eight completions each; SGD keeps rounding as small as it is in the gradient."""
    defaults = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "model_init_kwargs": {"attn_implementation": "eager"},  # the only one that every term can work on
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 7,
    }
    return defaults | changes


def make(
    policy: str,
    out: Path,
    *,
    ours: bool = True,
    algorithm: str = "grpo",
    terms: list | None = None,
    fixed: bool | str = False,
    trainer: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer, TRL's or ours."""
    config = CONFIGS[algorithm](output_dir=str(out), entropy_terms=terms, **settings(**changes))
    more = dict(trainer or {})
    if fixed:
        more["rollout_func"] = ROLLOUTS[fixed]
    return PAIRS[algorithm][ours](model=policy, reward_funcs=low_words, args=config, train_dataset=prompts(), **more)


def weights_after(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The weights after training."""
    trainer = make(*args, **kwargs)
    trainer.train()
    return weights_of(trainer)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The weights as they are, copied, without the wrapper's prefix."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """max |a - b| over all weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
