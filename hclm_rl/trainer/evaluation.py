"""Evaluation: pass@k beside TRL's own metrics, and responses sampled for whoever judges the policy."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput, has_length

from .run import mask_of, transcript_of
from .scoring import aside, score

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Responses:
    """What the policy answered, a value a response."""

    completions: list  # text; of a conversation its messages, those of tools included
    entropy_sums: list[float]  # nats, over the response's own tokens, at the sampling temperature
    lengths: list[int]  # tokens, without those that tools wrote


def with_pass_at_k(
    trainer: Any, evaluate: Callable[[], EvalLoopOutput], dataloader: Any, prefix: str
) -> EvalLoopOutput:
    """TRL's evaluation with pass@k among its metrics."""
    trainer._hclm.evaluated = []
    try:
        output = evaluate()
        rewards = torch.cat([parts for parts, _ in trainer._hclm.evaluated])[:, 0]
    finally:
        trainer._hclm.evaluated = None
    group_size = trainer.num_generations_eval
    if has_length(dataloader.dataset):  # several processes fill up the last batch with prompts of the first
        rewards = rewards[: len(dataloader.dataset) * group_size]
    from ..evaluation.training import pass_metrics  # scipy comes with an extra

    grouped = rewards.view(-1, group_size).cpu().numpy()
    left_out = int(rewards.view(-1, group_size).isnan().any(dim=1).sum())
    if left_out and trainer.accelerator.is_main_process:
        logger.warning(
            "%s: the first reward function, %s, left a response without a reward in %d of %d prompts, which have no "
            "part in pass@k%s",
            prefix,
            trainer.reward_func_names[0],
            left_out,
            len(grouped),
            ": none is logged" if left_out == len(grouped) else "",
        )
    assert output.metrics is not None
    output.metrics.update(pass_metrics(grouped, trainer.args.eval_pass_threshold, prefix))
    return output


def sample_responses(trainer: Any, rows: Sequence[dict], batch: int, seed: int) -> Responses:
    """See the trainer's method of this name."""
    entropy_sums: list[float] = []
    lengths: list[int] = []
    was_training, group_size = trainer.model.training, trainer.num_generations_eval
    trainer.model.eval()
    trainer.num_generations_eval, trainer._hclm.evaluated = 1, []
    try:
        with aside(trainer):
            torch.manual_seed(seed)
            for start in range(0, len(rows), batch):
                output = trainer._generate_and_score_completions([dict(row) for row in rows[start : start + batch]])
                mask = mask_of(output)
                entropy = score(trainer, trainer.model, transcript_of(output))[1]
                entropy_sums += torch.where(mask, entropy, 0).sum(dim=1).tolist()
                lengths += mask.sum(dim=1).tolist()
        completions = [each for _, of_batch in trainer._hclm.evaluated for each in of_batch]
    finally:
        trainer.model.train(was_training)
        trainer.num_generations_eval, trainer._hclm.evaluated = group_size, None
        trainer._metrics["eval"].clear()
    return Responses(completions=completions, entropy_sums=entropy_sums, lengths=lengths)
