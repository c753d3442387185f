"""The gauge of entropy flow: its numbers from one batch, and what it learns over several."""

from dataclasses import replace

import pytest
import torch

from hclm_rl import Quantiles
from hclm_rl.terms.entropy_flow import EntropyFlow

from ..term_batches import first_stage, make_step, rollout
from .test_force_reweight import influence_by_hand


def test_metrics_of_one_batch():
    view = rollout(make_step())
    e = influence_by_hand(view)
    metrics = first_stage(EntropyFlow(), view, {}).metrics
    count = view.mask.sum().item()
    assert isinstance(metrics["link/influence"], Quantiles)
    torch.testing.assert_close(metrics["link/influence"].values[view.mask].double(), e[view.mask], rtol=1e-4, atol=1e-7)
    assert metrics["link/net"].item() == pytest.approx(e.sum().item() / count, rel=1e-5)
    assert metrics["link/burning"].sum().item() == (e < 0).sum().item()
    cancelled = 1 - abs(e.sum().item()) / e.abs().sum().item()
    assert metrics["link/cancelled"].item() == pytest.approx(cancelled, rel=1e-5)
    assert metrics["link/gain"].item() == 0 and "link/predicted_change" not in metrics


def test_changes_are_those_since_the_batch_before():
    step, memory = make_step(), {}
    first_stage(EntropyFlow(), rollout(step), memory)
    later = replace(step, old_entropy=step.old_entropy + 0.1)
    metrics = first_stage(EntropyFlow(), replace(rollout(later), step=9), memory).metrics
    # make_step's rollout is that of step 3: 0.1 nats in 6 steps
    assert metrics["link/realised_change"].item() == pytest.approx(0.1 / (9 - rollout(step).step), rel=1e-4)
    assert "link/predicted_change" not in metrics  # no gain was known then


def test_distinct_counts_responses_within_their_group():
    step = make_step()
    same = step.ids.clone()
    same[1], same[2] = same[0], same[0]
    same[5] = same[0]  # equal to those, but an answer to another prompt
    mask = step.mask.clone()
    mask[[1, 2, 5]] = mask[0].clone()
    # group one: 0 = 1 = 2 and 3; group two: four different ones; padding does not count
    padded = torch.where(mask, same, torch.arange(same.numel()).view(same.shape))
    metrics = first_stage(EntropyFlow(), rollout(replace(step, ids=padded, mask=mask)), {}).metrics
    assert metrics["link/distinct"].item() == pytest.approx(6 / 8)


def test_distinct_leaves_out_responses_without_tokens():
    step = make_step()
    mask = step.mask.clone()
    mask[[0, 1, 2]] = False  # cut at the limit and masked: not three times the same answer
    metrics = first_stage(EntropyFlow(), rollout(replace(step, mask=mask)), {}).metrics
    assert metrics["link/distinct"].item() == 1.0
    metrics = first_stage(EntropyFlow(), rollout(replace(step, mask=torch.zeros_like(mask))), {}).metrics
    assert "link/distinct" not in metrics
