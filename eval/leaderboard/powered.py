"""The control without training: the start's whole texts from p^alpha, alpha = 1 / temperature."""

import math
from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from hclm_rl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from hclm_rl.decoding.power_sampling import Powered, PowerSampling
from hclm_rl.decoding.rows import streams_of
from hclm_rl.recipe.arguments import RunArguments
from hclm_rl.testbed import Evaluation, Task
from hclm_rl.testbed.sampling import ends_of, measured, plain_generation


def by_power(
    given: Mapping,
    trainer: GRPOTrainer | RLOOTrainer,
    task: Task,
    arguments: RunArguments,
    config: GRPOConfig | RLOOConfig,
) -> Evaluation:
    """As `on_held_out`, by power sampling with alpha 1 / temperature; `given` are its moves and blocks.

    The entropy is the model's own along the texts, at temperature 1.
    """
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    power = PowerSampling(alpha=1 / config.temperature, **given)
    rows = [dict(row) for row in task.eval_dataset]
    prompts = tokenizer([row["prompt"] for row in rows for _ in range(arguments.eval_samples)])["input_ids"]
    streams = streams_of(config.seed, range(len(prompts)))
    ends = ends_of(model, tokenizer)
    found: list[Powered] = []
    with plain_generation(model):
        for start in range(0, len(prompts), arguments.eval_batch):
            batch = slice(start, start + arguments.eval_batch)
            found += power(
                model,
                prompts[batch],
                streams[batch],
                max_new_tokens=task.max_completion_length,
                ends=ends,
                pad=ends[0],
            )
    said = [each.response for each in found]
    texts = tokenizer.batch_decode([each.ids for each in said], skip_special_tokens=True)
    sums, lengths = [math.fsum(each.entropies) for each in said], [len(each.ids) for each in said]
    return measured(rows, task, arguments.eval_samples, texts, sums, lengths)
