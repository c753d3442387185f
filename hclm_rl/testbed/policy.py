"""The small policy of the task "coins": a tokenizer of 46 words and a Llama of 110,000 parameters."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
WORDS = (PAD, EOS, ":", "!", ">", *map(str, range(41)))
LONGEST_TEXT = 32  # tokens; a prompt has 10, a completion at most 17


def policy_path() -> str:
    """Folder of the shipped warm start: a model path for `from_pretrained` and for TRL's trainers."""
    return str(Path(__file__).parent / "warm_start")


def load_policy() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The shipped warm start in float32, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_path())
    return LlamaForCausalLM.from_pretrained(policy_path(), dtype=torch.float32), tokenizer


def new_policy(seed: int) -> LlamaForCausalLM:
    """An untrained policy in float32, the same for the same seed; the global generator is left as it was."""
    ids = {word: i for i, word in enumerate(WORDS)}
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=LONGEST_TEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words separated by spaces both ways; a word outside the 46 is an error."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
    )


def save_policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Writes weights in float16 under a configuration that says float32, so that they are loaded as float32."""
    model.save_pretrained(path, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    LlamaConfig.from_dict(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
