"""A batch of the model's own responses in place of the data's completions."""

from typing import Any

import torch
from torch import Tensor

from ..decoding.rows import draw, streams_of
from .em_ft import EmFt

IGNORED = -100


def prompts_of(ids: Tensor, labels: Tensor, mask: Tensor) -> list[list[int]]:
    """What stands before the first label of each row. All three are (B, T). Refuses a row without a prompt."""
    is_prompt = ((labels != IGNORED).cumsum(dim=1) == 0) & mask.bool()
    found = [row[chosen].tolist() for row, chosen in zip(ids, is_prompt, strict=True)]
    if not all(found):
        raise ValueError(
            "em_ft answers prompts, and a row of the data has none: give the columns prompt and completion, with "
            "completion_only_loss"
        )
    return found


def with_own_responses(trainer: Any, method: EmFt, inputs: dict[str, Any], number: str) -> dict[str, Any]:
    """The prompts with `method.responses` new responses each, whose tokens are the labels."""
    prompts = [
        prompt
        for prompt in prompts_of(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
        for _ in range(method.responses)
    ]
    tokenizer = trainer.processing_class
    names = [f"{number}/{trainer.accelerator.process_index}/{i}" for i in range(len(prompts))]
    drawn = draw(
        trainer.accelerator.unwrap_model(trainer.model),
        prompts,
        streams_of(trainer.args.seed, names),
        [method.longest] * len(prompts),
        ends=[tokenizer.eos_token_id],
        pad=tokenizer.pad_token_id,
    )
    texts = [[*prompt, *each.ids] for prompt, each in zip(prompts, drawn, strict=True)]
    width, device = max(map(len, texts)), inputs["input_ids"].device
    rows = {
        "input_ids": [text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts],
        "attention_mask": [[1] * len(text) + [0] * (width - len(text)) for text in texts],
        "labels": [
            [IGNORED] * len(prompt) + each.ids + [IGNORED] * (width - len(prompt) - len(each.ids))
            for prompt, each in zip(prompts, drawn, strict=True)
        ],
    }
    return {name: torch.tensor(values, device=device) for name, values in rows.items()}
