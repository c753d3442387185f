"""The small policy of the task "hidden_number": a tokenizer that speaks of tools, and a supervised warm start.

python -m hclm_rl.testbed.hidden_number_policy --out models/hidden_number

It learns from transcripts that ask at random within what is left and then guess, so there is much to gain from asking
well. Less than a minute on one CPU core.
"""

import argparse
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hclm_rl.testbed.hidden_number import NUMBERS, random_problems, random_transcript
from hclm_rl.testbed.policy import EOS, PAD, save_policy
from hclm_rl.testbed.warm_start_recipe import IGNORED, teach

UNKNOWN = "<unk>"
WORDS = (PAD, EOS, UNKNOWN, ">", ":", "call", "ask", "number", "say", "higher", "lower", "right", *map(str, NUMBERS))
LONGEST_TEXT = 64  # tokens
TRANSCRIPTS = 8000
STEPS = 600
BATCH = 64  # transcripts
LEARNING_RATE = 4e-3

# Messages to text: `3 14 >`, then `call ask number 8 <eos>`, `: higher >`, `say 11 <eos>`.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ message.content }} > {% elif message.role == 'tool' -%}
: {{ message.content }} > {% else -%}{{ message.content }}
{%- for call in message.tool_calls or [] %} call {{ call.function.name }}
{%- for key, value in call.function.arguments.items() %} {{ key }} {{ value }}{% endfor %}{% endfor %}
{{- ' <eos> ' }}{% endif -%}
{%- endfor -%}"""
# Text to messages: TRL reads tool calls with it.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ">",
    "fields": {
        "tool_calls": {
            "open_pattern": r"call (?P<name>\S+)",
            "close_pattern": r"<eos>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"(?P<key>\S+) (?P<value>\S+)", "value_parser": {"name": "text"}},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close_pattern": r"<eos>", "content": "text"},
    },
}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, words separated by spaces both ways; with a chat template and the way back."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=LONGEST_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    fast.response_template = RESPONSE_TEMPLATE
    return fast


def new_policy(seed: int, tokenizer: PreTrainedTokenizerFast, width: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """An untrained policy in float32, the same for the same seed; the global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=3 * width,
        max_position_embeddings=LONGEST_TEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType] (declared wider than it is)
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def warm_start(
    out: str, seed: int = 0, steps: int = STEPS, transcripts: int = TRANSCRIPTS, width: int = 64, layers: int = 2
) -> None:
    """Trains on the policy's own words of random transcripts and writes the checkpoint into the folder `out`."""
    source, tokenizer = random.Random(seed), new_tokenizer()
    problems = zip(random_problems("train", seed), range(transcripts), strict=False)
    messages = [random_transcript(problem, source) for problem, _ in problems]
    texts = [str(tokenizer.apply_chat_template(each, tokenize=False)) for each in messages]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    assert isinstance(ids, torch.Tensor)
    labels = torch.where(own_words(ids, tokenizer), ids, IGNORED)
    model = new_policy(seed, tokenizer, width, layers)
    progress = trange(steps, desc="warm start", unit="step", disable=None)
    teach(model, ids, labels, progress, batch=BATCH, learning_rate=LEARNING_RATE, seed=seed)
    save_policy(model.eval(), tokenizer, out)


def own_words(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """True on what the policy says: after each `>` up to the end of its turn."""
    opens, ends = (ids.eq(int(of)) for of in (tokenizer.convert_tokens_to_ids(">"), tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
    before = (opens.cumsum(dim=1) - opens.long()) > (ends.cumsum(dim=1) - ends.long())
    return before & (ids != tokenizer.pad_token_id)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Supervised warm start of the policy for the task hidden_number.")
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warm_start(arguments.out, arguments.seed)
