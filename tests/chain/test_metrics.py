"""Metrics of a step: sums over micro-batches first, one division at the end."""

import math

import pytest
import torch
from accelerate import Accelerator

from hclm_rl import Quantiles, Total
from hclm_rl.chain.metrics import StepMetrics


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_token_metrics_are_averaged_over_the_tokens_of_the_whole_step(accelerator):
    metrics = StepMetrics()
    metrics.add("x", torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[True, True, False]]))
    metrics.add("x", torch.tensor([[6.0], [math.inf]]), torch.tensor([[True], [False]]))
    # (1 + 2 + 6) / 3, not the mean of the micro-batches' means, (1.5 + 6) / 2
    assert metrics.flush(accelerator) == {"x": 3.0}


def test_scalars_are_averaged_over_micro_batches(accelerator):
    metrics, mask = StepMetrics(), torch.ones(1, 1, dtype=torch.bool)
    for value in (1.0, 2.0, 6.0):
        metrics.add("x", torch.tensor(value), mask)
    assert metrics.flush(accelerator) == {"x": 3.0}


def test_a_total_is_formed_once_from_the_sums(accelerator):
    metrics, mask = StepMetrics(), torch.ones(1, 1, dtype=torch.bool)

    def cosine(dot: float, left: float, right: float) -> float:
        return dot / math.sqrt(left * right)

    for x, y in ((3.0, 1.0), (4.0, 0.0)):
        sums = (torch.tensor(x * y), torch.tensor(x * x), torch.tensor(y * y))
        metrics.add("cosine", Total(sums=sums, form=cosine), mask)
    # of (3, 4) and (1, 0): 3 / 5; the mean of the two cosines would be NaN
    assert metrics.flush(accelerator) == {"cosine": pytest.approx(0.6)}


def test_quantiles_are_over_all_tokens_that_count(accelerator):
    metrics = StepMetrics()
    mask = torch.tensor([[True, True, True, False]])
    metrics.add("x", Quantiles(values=torch.tensor([[3.0, 1.0, 2.0, 99.0]])), mask)
    metrics.add(
        "x", Quantiles(values=torch.tensor([[5.0, 4.0, -99.0, -99.0]])), torch.tensor([[True, True, False, False]])
    )
    # 1 ... 5: position 0.05 * 4 = 0.2 between 1 and 2; the median 3; 0.95 * 4 = 3.8 between 4 and 5
    expected = {"x/q05": 1.2, "x/q50": 3.0, "x/q95": 4.8}
    assert metrics.flush(accelerator) == pytest.approx(expected)


def test_quantiles_at_levels_of_ones_own(accelerator):
    metrics, mask = StepMetrics(), torch.ones(1, 2, dtype=torch.bool)
    metrics.add("x", Quantiles(values=torch.tensor([[1.0, 3.0]]), levels=(0.0, 0.25, 1.0)), mask)
    assert metrics.flush(accelerator) == {"x/q00": 1.0, "x/q25": 1.5, "x/q100": 3.0}


def test_nothing_counted_is_nan(accelerator):
    metrics, mask = StepMetrics(), torch.zeros(2, 3, dtype=torch.bool)
    metrics.add("mean", torch.ones(2, 3), mask)
    metrics.add("spread", Quantiles(values=torch.ones(2, 3)), mask)
    flushed = metrics.flush(accelerator)
    assert sorted(flushed) == ["mean", "spread/q05", "spread/q50", "spread/q95"]
    assert all(math.isnan(value) for value in flushed.values())


def test_a_flush_forgets(accelerator):
    metrics, mask = StepMetrics(), torch.ones(1, 1, dtype=torch.bool)
    metrics.add("b", torch.tensor(1.0), mask)
    metrics.add("a", Quantiles(values=torch.tensor([[1.0]])), mask)
    assert sorted(metrics.flush(accelerator)) == ["a/q05", "a/q50", "a/q95", "b"]
    assert metrics.flush(accelerator) == {}
    metrics.add("b", torch.tensor(5.0), mask)
    assert metrics.flush(accelerator) == {"b": 5.0}


def test_no_graph_is_kept(accelerator):
    metrics, mask = StepMetrics(), torch.ones(1, 1, dtype=torch.bool)
    value = torch.ones(1, 1, requires_grad=True)
    for metric in (value, value.sum(), Total(sums=(value.sum(),), form=float), Quantiles(values=value)):
        metrics.add(type(metric).__name__ + str(getattr(metric, "ndim", "")), metric, mask)
    held = [t for sums, _ in metrics._sums.values() for t in sums] + [
        t for kept, _ in metrics._values.values() for t in kept
    ]
    assert len(held) == 6 and not any(tensor.requires_grad for tensor in held)
