"""KL where a prompt is unsolved: numbers by hand, what it leaves alone, what it refuses."""

from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.unsolved_kl import UnsolvedKl

from ..term_batches import first_stage, make_step, rollout


def test_numbers_by_hand():
    step = make_step(dtype=torch.float64)
    # the first group has no right response, the second one
    step = replace(step, rewards=torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    moved = 0.2 * torch.arange(6, dtype=torch.float64) - 0.3  # log pi - log pi_ref of each place
    view = replace(rollout(step), ref_logps=step.old_logps - moved)
    found = first_stage(UnsolvedKl(beta=0.5, free_visits=0, right_at=1.0), view, {})
    assert found.advantages is not None
    for i in range(8):
        for t in range(int(step.mask[i].sum())):
            added = -0.5 * (0.2 * t - 0.3) if i < 4 else 0.0
            assert found.advantages[i, t].item() == pytest.approx(step.advantages[i].item() + added, abs=1e-12), (i, t)
    assert found.metrics["link/unsolved"] == found.metrics["link/held"] == 0.5
    # lengths 6, 4, 6, 3: sums .2 (0 + .. + T-1) - .3 T
    by_hand = sum(0.2 * T * (T - 1) / 2 - 0.3 * T for T in (6, 4, 6, 3)) / 19
    assert found.metrics["link/drift"] == pytest.approx(by_hand, abs=1e-12)


def test_its_gradient_is_that_of_the_kl():
    # one token, all words drawn: the sum of pi (log pi - log pi_ref) d log pi is the gradient of KL(pi || pi_ref)
    z = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.4, -0.2], dtype=torch.float64).log_softmax(0)
    logps = z.log_softmax(0)
    (direct,) = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), z, retain_graph=True)
    by_advantages = (logps.exp().detach() * (logps - reference).detach() * logps).sum()
    torch.testing.assert_close(torch.autograd.grad(by_advantages, z)[0], direct)


def test_what_is_left_alone():
    step = make_step()
    step = replace(step, rewards=torch.tensor([1.0, 0, 0, 0] + [torch.nan] * 4))
    view = replace(rollout(step), ref_logps=step.old_logps - 1)
    found = first_stage(UnsolvedKl(free_visits=0), view, {})
    # a solved group, and one that nothing scored
    torch.testing.assert_close(found.advantages, step.advantages.unsqueeze(1).expand(8, 6), equal_nan=True)
    assert found.metrics["link/unsolved"] == 0.0 and found.metrics["link/drift"] == 0.0


def test_at_the_start_nothing_is_added():
    step = replace(make_step(), rewards=torch.zeros(8))
    view = replace(rollout(step), ref_logps=step.old_logps)
    found = first_stage(UnsolvedKl(free_visits=0), view, {}).advantages
    assert found is not None and found.abs().max() == 0.0


def asked(term: UnsolvedKl, memory: dict, first: str, second: str, solved: bool = False) -> list[float]:
    """The share of each of two groups, of which `second` is one with a right response if `solved`, that is moved."""
    step = replace(make_step(), rewards=torch.tensor([0.0] * 7 + [float(solved)]))
    view = replace(rollout(step), ref_logps=step.old_logps - 1, prompts=[first] * 4 + [second] * 4)
    found = first_stage(term, view, memory)
    assert found.advantages is not None
    moved = (found.advantages != step.advantages.unsqueeze(1)) & step.mask
    shares = [(moved[rows].sum() / step.mask[rows].sum()).item() for rows in (slice(4), slice(4, 8))]
    assert found.metrics["link/held"] == sum(shares) / 2
    return shares


def test_a_prompt_is_free_the_first_time():
    memory: dict = {}
    assert asked(UnsolvedKl(), memory, "a", "b") == [0, 0]
    assert asked(UnsolvedKl(), memory, "b", "c") == [1, 0]
    assert asked(UnsolvedKl(), memory, "c", "a") == [1, 1]
    assert asked(UnsolvedKl(), memory, "d", "a", solved=True) == [0, 0]
    assert asked(UnsolvedKl(), memory, "0", "d") == [0, 1]
    assert memory["visits"].tolist().count(1) == 1  # "0"; all others were asked twice or three times
    assert sorted(memory["visits"].tolist()) == [1, 2, 2, 2, 3]
    assert memory["prompts"].tolist() == sorted(memory["prompts"].tolist())


class Elsewhere(torch.Tensor):
    """Stands for a tensor on an accelerator, which no function takes beside one that is on the CPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if any(isinstance(each, torch.Tensor) and not isinstance(each, cls) for each in args):
            raise RuntimeError("tensors on two devices")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_resumed_run_whose_memory_is_on_its_device_goes_on():
    memory: dict = {}
    asked(UnsolvedKl(), memory, "a", "b")
    resumed = {key: each.as_subclass(Elsewhere) if torch.is_tensor(each) else each for key, each in memory.items()}
    with pytest.raises(RuntimeError, match="two devices"):
        torch.isin(torch.zeros(1, dtype=torch.long), resumed["prompts"])
    assert asked(UnsolvedKl(), resumed, "b", "c") == [1, 0]
    assert asked(UnsolvedKl(), resumed, "c", "a") == [1, 1]


def test_a_prompt_in_two_groups_was_asked_once():
    memory: dict = {}
    assert asked(UnsolvedKl(free_visits=2), memory, "a", "a") == [0, 0]
    assert asked(UnsolvedKl(free_visits=2), memory, "a", "b") == [0, 0]
    assert asked(UnsolvedKl(free_visits=2), memory, "b", "a") == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"beta": 0.0}, "beta must be finite and above 0, got 0"),
        ({"beta": float("inf")}, "beta must be finite and above 0, got inf"),
        ({"free_visits": -1}, "free_visits must be at least 0, got -1"),
        ({"right_at": float("nan")}, "right_at must be a finite reward or None, got nan"),
    ],
)
def test_what_it_does_not_take(wrong: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        UnsolvedKl(**wrong)


def test_rewards_that_are_not_0_or_1_are_told_once(caplog: pytest.LogCaptureFixture):
    memory: dict = {}
    for _ in range(2):
        first_stage(UnsolvedKl(), rollout(make_step()), memory)
    assert caplog.text.count("unsolved_kl") == 1
