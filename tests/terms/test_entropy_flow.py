"""The gauge of entropy flow: its numbers from one batch, and what it learns over several."""

from dataclasses import replace

import pytest
import torch

from hclm_rl import Quantiles
from hclm_rl.equations.flow import halves, head_influence
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


def kernel_by_autograd(step, advantages: torch.Tensor) -> torch.Tensor:
    """e = A <d mean H(others) / dW, d log p / dW> in float64; the prompts' responses are 0 to 3 and 4 to 7."""
    weight = step.head.double().requires_grad_()
    logps = (step.old_hidden.double() @ weight.T).log_softmax(-1)
    entropy, own = -(logps.exp() * logps).sum(-1), logps.gather(-1, step.ids.unsqueeze(-1)).squeeze(-1)
    e, odd = torch.zeros(step.mask.shape, dtype=torch.float64), torch.arange(8).unsqueeze(1) >= 4
    for of, others in ((odd, ~odd), (~odd, odd)):
        [pull] = torch.autograd.grad(entropy[step.mask & others].mean(), weight, retain_graph=True)
        for i, t in (step.mask & of).nonzero().tolist():
            [slope] = torch.autograd.grad(own[i, t], weight, retain_graph=True)
            e[i, t] = advantages[i].double() * (pull * slope).sum()
    return e


def test_the_head_kernel_is_autograds_on_the_other_prompts():
    step = make_step()
    view = rollout(step)
    expected = kernel_by_autograd(step, view.advantages)
    assert expected.abs().max() > 1e-2
    entropy, found = head_influence(view, view.advantages.unsqueeze(1).expand(view.mask.shape))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert entropy == pytest.approx(view.entropy[view.mask].double().mean().item())
    metrics = first_stage(EntropyFlow(through="head", share=1.0), view, {}).metrics
    assert metrics["link/net"].item() == pytest.approx(expected.sum().item() / view.mask.sum().item(), rel=1e-4)


def test_the_head_kernel_of_drawn_tokens_is_unbiased():
    # one token of each half counts: with share 1/2 one of two, and every draw is as likely as the others
    step = make_step()
    mask = torch.zeros_like(step.mask)
    mask[0, 0] = mask[1, 0] = mask[4, 0] = mask[5, 0] = True
    view = rollout(replace(step, mask=mask))
    advantages = view.advantages.unsqueeze(1).expand(view.mask.shape)
    whole, found = head_influence(view, advantages)[1], []
    for seed in range(200):
        one = replace(view, generator=torch.Generator().manual_seed(seed))
        found.append(head_influence(one, advantages, share=0.5)[1])
    for of in ([0, 1], [4, 5]):  # of what the one or the other token of the other half says
        drawn, counts = torch.stack(found)[:, of, 0].unique(dim=0, return_counts=True)
        assert len(drawn) == 2
        # a binomial of 200 draws at 1/2 deviates by 7.1
        assert counts.min() > 100 - 4 * 7.1
        torch.testing.assert_close(drawn.mean(dim=0), whole[of, 0])
    assert whole[[0, 1, 4, 5], 0].abs().min() > 0


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_of_something(share: float):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        EntropyFlow(through="head", share=share)


def test_a_step_of_one_prompt_is_halved_by_its_responses():
    view = rollout(make_step())
    assert halves(view).tolist() == [False] * 4 + [True] * 4
    one = replace(view, group=torch.zeros_like(view.group))
    assert halves(one).tolist() == [False, True] * 4
    assert first_stage(EntropyFlow(through="head"), one, {}).metrics["link/influence"].values.abs().max() > 0


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
