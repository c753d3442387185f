"""The small policies of the tasks: a tokenizer of a few words, a Llama of 110,000 ("coins") or 360,000 parameters."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the policy of a task reads and how large it is."""

    words: tuple[str, ...]
    longest_text: int  # tokens, at least a prompt and a completion
    width: int
    layers: int
    mlp: int  # width of its hidden layer
    folder: str  # of the shipped warm start


OF_COINS = Shape(
    words=(PAD, EOS, ":", "!", ">", *map(str, range(41))),
    longest_text=32,  # a prompt has 10, a completion at most 17
    width=64,
    layers=2,
    mlp=192,
    folder="warm_start",
)
SHAPES = {
    "coins": OF_COINS,
    "coins_noisy": replace(OF_COINS, folder="warm_start_noisy"),
    "products": Shape(
        words=(PAD, EOS, "*", "=", *map(str, range(10))),
        longest_text=16,  # a prompt has 6, a completion at most 5
        width=96,
        layers=3,
        mlp=288,
        folder="warm_start_products",
    ),
}


def policy_path(task: str = "coins") -> str:
    """Folder of a task's shipped warm start: a model path for `from_pretrained` and for TRL's trainers."""
    return str(Path(__file__).parent / SHAPES[task].folder)


def load_policy(task: str = "coins") -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The shipped warm start in float32, and its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_path(task))
    return LlamaForCausalLM.from_pretrained(policy_path(task), dtype=torch.float32), tokenizer


def new_policy(seed: int, task: str = "coins") -> LlamaForCausalLM:
    """An untrained policy in float32, the same for the same seed; the global generator is left as it was."""
    shape = SHAPES[task]
    config = LlamaConfig(
        vocab_size=len(shape.words),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        intermediate_size=shape.mlp,
        max_position_embeddings=shape.longest_text,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=shape.words.index(EOS),
        pad_token_id=shape.words.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def new_tokenizer(task: str = "coins") -> PreTrainedTokenizerFast:
    """One token a word, words separated by spaces both ways; a word that the task does not have is an error."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SHAPES[task].words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=SHAPES[task].longest_text,
        clean_up_tokenization_spaces=False,
    )


def save_policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    """Writes weights in float16 under a configuration that says float32, so that they are loaded as float32."""
    model.save_pretrained(path, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    LlamaConfig.from_dict(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
