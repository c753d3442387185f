"""What goes to the log and, token by token, into the trace."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..chain.metrics import token_values
from ..types import Metric, Rollout, TokenBatch
from .run import TRACED


def record(trainer: Any, name: str, metric: Metric, mask: Tensor) -> None:
    """A metric of the micro-batch at hand goes to the log, and token by token to the trace; `mask`: (B, T)."""
    trainer._hclm.metrics.add(name, metric, mask)
    values = token_values(metric)
    if values is not None and trainer._hclm.trace.wants(trainer.state.global_step + 1):
        trainer._hclm.trace.add(name, values)


def traced(trainer: Any, rollout: Rollout, metrics: Mapping[str, Metric]) -> dict[str, Tensor]:
    """What the trace takes from the first stage: (N,) or (N, T), to travel with its rows."""
    run, step, n = trainer._hclm, trainer.state.global_step, len(rollout.rewards)
    earlier = run.generated.get(step, 0)  # generation batches of the same step, whose numbers are taken
    run.generated = {step: earlier + 1}
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    told = {name: token_values(metric) for name, metric in metrics.items()}
    return {
        "prompt": rollout.group + earlier * world * n // trainer.num_generations,
        "response": torch.arange(n, device=rollout.rewards.device) + (earlier * world + rank) * n,
        "reward": rollout.rewards,
        "advantage_before": rollout.advantages,
        **{name: values for name, values in told.items() if values is not None},
    }


def open_trace(trainer: Any, inputs: Mapping[str, Any], batch: TokenBatch, advantages: Tensor) -> None:
    """Opens the micro-batch's part of the trace; `advantages`: (B,) or (B, T), as the loss gets them."""
    given = {key.removeprefix(TRACED): value for key, value in inputs.items() if key.startswith(TRACED)}
    rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    prompts = [ids[is_text].tolist() for ids, is_text in rows]
    position = torch.arange(batch.ids.size(1), device=batch.ids.device).expand(batch.ids.shape)
    columns = {"position": position, "id": batch.ids, "logp": batch.logps, "old_logp": batch.old_logps}
    columns |= {"entropy": batch.entropy, "advantage": advantages}
    trainer._hclm.trace.start(batch.mask, given | columns, zip(given["prompt"].tolist(), prompts, strict=True))


def write_trace(trainer: Any, step: int) -> None:
    """The step's trace: each process writes its own part."""
    accelerator = trainer.accelerator
    trainer._hclm.trace.write(step, trainer._tokenizer, accelerator.process_index, accelerator.num_processes)
