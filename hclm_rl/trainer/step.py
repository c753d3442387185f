"""The end of an optimiser step."""

import logging
import math
from typing import Any

import torch

from ..chain.chain import Link
from ..chain.door import moved
from .judging import ENTROPY, EXCESS, LOGP, judge, say_of_policy
from .run import note, once, strengths
from .tracing import write_trace

logger = logging.getLogger(__name__)

IDLE_STEPS_BEFORE_WARNING = 50  # optimiser steps in which a link affected no token


def with_strength(metrics: dict[str, float], link: Link, coef: float) -> float:
    """Puts the link's strength beside its metrics, and gives its affected share. Of a gauge, which has no strength and
    changes no token, neither is logged."""
    if link.term.is_diagnostic:
        return metrics.pop(f"{link.name}/affected")
    metrics[f"{link.name}/coef"] = coef
    return metrics[f"{link.name}/affected"]


def end_step(trainer: Any) -> None:
    """Logs the step, moves the controllers, counts idle steps, writes the trace."""
    run, now = trainer._hclm, strengths(trainer)
    device = trainer.accelerator.device
    run.metrics.add(EXCESS, run.watch.excess(device), torch.empty(0, device=device))
    metrics = run.metrics.flush(trainer.accelerator)
    entropy, logp = metrics.pop(ENTROPY), metrics.pop(LOGP)
    policy = say_of_policy(trainer, entropies=math.isinf(entropy), logps=math.isinf(logp))
    judge(trainer, run.watch, metrics.pop(EXCESS), policy)
    if once(trainer, "memory after a first step"):
        run.state.require_savable()
    for link in run.chain.links:
        coef, sampled = now.coefs[link.name], now.sampled_entropy
        own = {
            name.removeprefix(f"{link.name}/"): metrics[name] for name in metrics if name.startswith(f"{link.name}/")
        }
        link.term.on_step(own, run.state.memory[link.name])
        affected = with_strength(metrics, link, coef)
        # a controller that gates by the entropy at sampling moves by the same one
        measured = sampled if link.coef.needs_entropy and sampled is not None else entropy
        if math.isfinite(measured):
            before = run.state.controller[link.name]
            run.state.controller[link.name] = moved(link.coef, link.name, measured, before, now.step)
        is_idle = affected == 0 and coef != 0 and not link.term.is_diagnostic
        run.state.idle_steps[link.name] = run.state.idle_steps[link.name] + 1 if is_idle else 0
        if run.state.idle_steps[link.name] == IDLE_STEPS_BEFORE_WARNING and trainer.accelerator.is_main_process:
            logger.warning(
                "the entropy term '%s' has affected no token for %d optimiser steps",
                link.name,
                IDLE_STEPS_BEFORE_WARNING,
            )
    note(trainer, metrics)
    run.micro_batches = 0
    step = trainer.state.global_step + 1
    if run.trace.wants(step):
        write_trace(trainer, step)
