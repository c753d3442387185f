"""Metrics of one optimiser step: sums over micro-batches and processes, divided once at the end."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..equations.functional import quantile
from ..types import Metric, Quantiles, Total
from .door import TermFailed


def mean_of(total: float, count: float) -> float:
    """The mean, or NaN (which TRL's log leaves out) where nothing was counted."""
    return total / count if count else math.nan


def token_values(metric: Metric) -> Tensor | None:
    """The (rows, T) values of a metric that has one for each token; else None."""
    if isinstance(metric, Quantiles):
        return metric.values
    return metric if isinstance(metric, Tensor) and metric.dim() == 2 else None


@dataclass
class StepMetrics:
    """What the links said during one optimiser step. Every process must add the same names."""

    _sums: dict[str, tuple[list[Tensor], Callable[..., float]]] = field(default_factory=dict)
    _values: dict[str, tuple[list[Tensor], tuple[float, ...]]] = field(default_factory=dict)

    def add(self, name: str, metric: Metric, mask: Tensor) -> None:
        """Adds one micro-batch's share. `mask` (rows, T) says which tokens a (rows, T) metric is averaged over."""
        if isinstance(metric, Quantiles):
            kept, _ = self._values.setdefault(name, ([], metric.levels))
            kept.append(metric.values.detach()[mask])
            return
        if isinstance(metric, Total):
            sums, form = metric.sums, metric.form
        elif metric.dim() == 0:
            sums, form = (metric, torch.ones_like(metric)), mean_of
        else:
            sums, form = (torch.where(mask, metric, 0).sum(), mask.sum()), mean_of
        sums = [value.detach().float().to(mask.device) for value in sums]  # a term may have made them on the CPU
        if name in self._sums:
            sums = [old + new for old, new in zip(self._sums[name][0], sums, strict=True)]
        self._sums[name] = (sums, form)

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """The step's metrics over all processes, and forgets them. One all-reduce, plus one gather per Quantiles."""
        metrics: dict[str, float] = {}
        names = sorted(self._sums)  # the same order on every process
        if names:
            flat = torch.stack([value for name in names for value in self._sums[name][0]])
            totals = iter(cast(Tensor, accelerator.reduce(flat, reduction="sum")).tolist())
            for name in names:
                sums, form = self._sums[name]
                values = [next(totals) for _ in sums]
                try:
                    metrics[name] = form(*values)
                except Exception as error:
                    raise TermFailed(f"the metric '{name}' failed: {type(error).__name__}: {error}") from error
        for name in sorted(self._values):
            kept, levels = self._values[name]
            values = torch.cat(kept).float()
            padded = accelerator.pad_across_processes(values, dim=0, pad_index=torch.nan)  # pyright: ignore[reportArgumentType] (declared int)
            values = cast(Tensor, accelerator.gather(padded))
            values = values[~torch.isnan(values)]
            for level in levels:
                metrics[f"{name}/q{round(100 * level):02d}"] = (
                    quantile(values, level).item() if values.numel() else math.nan
                )
        self._sums.clear()
        self._values.clear()
        return metrics
