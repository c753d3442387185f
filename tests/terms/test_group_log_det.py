"""The group's log-det by hand, as a plain loop with an inverse, and against autograd of the entropy itself."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hclm_rl import Link, Rollout
from hclm_rl.chain.coefficients import Constant
from hclm_rl.recipe.config import build_chain
from hclm_rl.terms.group_log_det import GroupLogDet

from ..term_batches import Processes, Step, first_stage, make_step, rollout, second_stage, token_batch

ALL = slice(None)


def with_states(tokens: list[list[list[float]]]) -> Step:
    """One group whose responses have tokens with these states, NaN in the padding; the other responses have none."""
    step = make_step(dtype=torch.float64)
    states = torch.full((*step.mask.shape, 2), math.nan, dtype=torch.float64)
    mask = torch.zeros_like(step.mask)
    for i, response in enumerate(tokens):
        states[i, : len(response)] = torch.tensor(response, dtype=torch.float64)
        mask[i, : len(response)] = True
    return replace(step, mask=mask, hidden=states, old_hidden=states, group_size=len(tokens))


# mean states (2, 0) and (0, 0), so hc = (1, 0) and (-1, 0), K = [[a, -a], [-a, a]] with a = 1/2: one eigenvalue 2a = 1
TWO = with_states([[[1, 0], [3, 0]], [[1, 1], [-1, 0], [0, -1]]])
# mean states 0, 0, 0 and 4: hc = -1, -1, -1, 3; the eigenvalue of K is (1 + 1 + 1 + 9) / 4 = 3, its vector hc / root 12
COPIES = with_states([[[0, 0]], [[1, 0], [-1, 0]], [[0, 0]], [[4, 0]]])


def stage_one(term: GroupLogDet, step: Step, advantages: list[float] | None = None, memory: dict | None = None):
    changes = {}
    if advantages is not None:
        changes["advantages"] = torch.tensor([*advantages, *[0.0] * (8 - len(advantages))], dtype=torch.float64)
    return first_stage(term, rollout(step, **changes), {"eps": 1.0} if memory is None else memory)


def leverages(first, step: Step) -> Tensor:
    """One a response, from the metric."""
    values = first.metrics["link/leverage"].values
    assert (values == values[:, :1]).all() and values.shape == step.mask.shape
    return values[:, 0]


def injected_gradient(
    term: GroupLogDet, step: Step, memory: dict, sizes: tuple[int, ...] = (8,), changes: dict | None = None
) -> Tensor:
    """d loss / dZ (N, T, D), the loss averaged over all tokens of the step, in one or more micro-batches."""
    first = first_stage(term, rollout(step, **(changes or {})), memory)
    gradients = []
    for rows in torch.arange(8).split(list(sizes)):
        batch = token_batch(step, rows)
        loss = second_stage(term, batch, first, memory, rows).losses["link"]
        (torch.where(batch.mask, loss, 0).sum() / step.mask.sum()).backward()
        gradients.append(batch.hidden().grad)
    return torch.cat(gradients)


def by_loop(step: Step, z: Tensor, eps: float, keep: Tensor, only: Tensor | None = None) -> list[dict]:
    """Group by group: rows, H, leverages and tr K of the responses of `keep` (and `only`), with an inverse."""
    found = []
    for rows in torch.arange(8).split(step.group_size):
        rows = [int(i) for i in rows if keep[i] and step.mask[i].any() and (only is None or only[i])]
        if len(rows) < 2:
            continue
        h = torch.stack([z[i, step.mask[i]].mean(dim=0) for i in rows])
        hc, n = h - h.mean(dim=0), len(rows)
        k = hc @ hc.T / n
        m = k + eps * torch.eye(n, dtype=z.dtype)
        absent = 0.5 * (step.group_size - n) * math.log(eps)
        leverage = n * (torch.linalg.inv(m) @ k).diagonal()
        found.append({"rows": rows, "h": 0.5 * torch.logdet(m) + absent, "leverage": leverage, "trace": k.trace()})
    return found


def mean_of(groups: list[dict], name: str) -> Tensor:
    return torch.stack([group[name].mean() for group in groups]).mean()


def gaps(seed: int, group_size: int = 4) -> tuple[Step, dict, Tensor]:
    """A step with a response without tokens, one that no reward scored, and a token in between that a tool wrote."""
    step = make_step(seed, torch.float64)
    step = replace(step, hidden=step.old_hidden, group_size=group_size)
    step = replace(step, mask=step.mask & (torch.arange(8) != 3).unsqueeze(1))
    step.mask[0, 1] = False
    rewards = step.rewards.index_fill(0, torch.tensor([7]), math.nan)
    return step, {"rewards": rewards}, torch.arange(8) != 7


def test_two_responses_by_hand():
    first = stage_one(GroupLogDet(), TWO, memory={"eps": 0.25})
    # eigenvalues 2a = 1 and 0: H = 0.5 log((2a + eps) eps); leverage G u_i^2 2a / (2a + eps) with u_i^2 = 1/2
    assert first.metrics["link/value"].item() == pytest.approx(0.5 * math.log(1.25 * 0.25), rel=1e-14)
    assert leverages(first, TWO).tolist() == pytest.approx([0.8, 0.8, 0, 0, 0, 0, 0, 0], rel=1e-14)
    assert first.metrics["link/dof"].item() == pytest.approx(0.8, rel=1e-14)
    assert first.metrics["link/spread"].item() == pytest.approx(1.0, rel=1e-14)
    # F_1 = (1/G) hc_1 / (2a + eps) = (1, 0) / 2 / 1.25 = (0.4, 0), and F_2 = -F_1; over the two and three tokens
    gradient = injected_gradient(GroupLogDet(acts="force"), TWO, {"eps": 0.25})
    expected = torch.tensor([[-0.2, 0]] * 2 + [[0.4 / 3, 0]] * 3, dtype=torch.float64)
    torch.testing.assert_close(gradient[TWO.mask], expected, atol=1e-14, rtol=0)


def test_a_lone_answer_among_copies_has_the_highest_leverage():
    first = stage_one(GroupLogDet(), COPIES, [1, 1, 1, 1])
    # eps = 1: l_i = 4 u_i^2 3 / (3 + 1) with u^2 = 1/12, 1/12, 1/12, 9/12
    assert leverages(first, COPIES)[:4].tolist() == pytest.approx([0.25, 0.25, 0.25, 2.25], rel=1e-14)
    assert first.metrics["link/dof"].item() == pytest.approx(0.75, rel=1e-14)
    assert first.metrics["link/right_dof"].item() == pytest.approx(0.75, rel=1e-14)
    # l / mean = 1/3 and 3, their roots 1/sqrt 3 and sqrt 3 add up to 2 sqrt 3; 4 / (2 sqrt 3) brings the sum back to 4
    assert first.advantages[:4].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2], rel=1e-14)


def test_copies_share_a_leverage():
    # two copies and two lone answers far apart, eps to 0: the leverages are G / m - 1 = 1 and 3
    step = with_states([[[0, 0]], [[9, 0], [-9, 0]], [[5, 1]], [[2, 7]]])
    first = stage_one(GroupLogDet(), step, memory={"eps": 1e-6})
    assert leverages(first, step)[:4].tolist() == pytest.approx([1, 1, 3, 3], rel=1e-6)  # eps over the least eigenvalue


def test_answers_in_place_of_states_count_copies():
    def unread(layer=-1):
        raise AssertionError("hidden states are read")

    step = replace(make_step(dtype=torch.float64), group_size=4)
    given = torch.tensor([1.0, 1, 1, -3, 1, 1, 1, -3], dtype=torch.float64)
    texts = [rf"so \boxed{{{said}}}" for said in "aabcdddd"]
    view = replace(rollout(step, advantages=given), texts=texts, hidden=unread, logps=None, entropy=None)
    term = GroupLogDet(features="answers", w_lo=0.1, w_hi=10.0)
    assert not term.needs_hidden and not term.needs_scores and GroupLogDet().needs_hidden
    first = first_stage(term, view, {"eps": 1e-9})
    # G / m - 1 of two copies, one and one; none where all say the same
    assert leverages(first, step).tolist() == pytest.approx([1, 1, 3, 3, 0, 0, 0, 0], abs=1e-6)
    # of the right ones 1, 1, 3, mean 5/3: w = sqrt .6, sqrt .6, sqrt 1.8, brought to the sum 3
    w = [0.6**0.5, 0.6**0.5, 1.8**0.5]
    assert first.advantages[:3].tolist() == pytest.approx([3 * x / sum(w) for x in w], rel=1e-6)
    assert first.advantages[3:].tolist() == given[3:].tolist()
    # K has (1, 1, -1, -1) / 2 with 3/8 and (0, 0, 1, -1) / sqrt 2 with 1/4: the covariance of unit vectors of shares
    # 1/2, 1/4, 1/4. eps = 1/8: 4 (1/4) (3/8) / (4/8) = 3/4, and for the last two 4 (1/2) (1/4) / (3/8) = 4/3 more
    graded = leverages(first_stage(term, view, {"eps": 0.125}), step)
    assert graded[:4].tolist() == pytest.approx([3 / 4, 3 / 4, 25 / 12, 25 / 12], rel=1e-12)
    # what has no answer counts by its tokens, which differ
    without = leverages(first_stage(term, replace(view, texts=["?"] * 8), {"eps": 1e-9}), step)
    assert without.tolist() == pytest.approx([3.0] * 8, abs=1e-6)


def test_weights_are_clipped_before_the_sum_is_restored():
    # beta 2: 1/9 and 9, clipped to 0.5 and 2, whose sum 3.5 is brought back to 4
    first = stage_one(GroupLogDet(beta=2.0), COPIES, [1, 1, 1, 1])
    assert first.advantages[:4].tolist() == pytest.approx([4 / 7, 4 / 7, 4 / 7, 16 / 7], rel=1e-14)
    wide = stage_one(GroupLogDet(beta=1.0, w_lo=0.1, w_hi=10.0), COPIES, [1, 1, 1, 1])
    assert wide.advantages[:4].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 3], rel=1e-14)


def test_only_the_right_answers_are_weighed_among_one_another():
    first = stage_one(GroupLogDet(w_lo=0.1), COPIES, [3, -2, -2, 1])
    # leverages 0.25 and 2.25 of the two right ones, mean 1.25: w = sqrt 0.2 and sqrt 1.8
    low, high = math.sqrt(0.2), math.sqrt(1.8)
    scale = 4 / (3 * low + high)
    assert first.advantages[:4].tolist() == pytest.approx([3 * low * scale, -2, -2, high * scale], rel=1e-14)
    assert first.advantages[1:3].tolist() == [-2, -2]
    # of the right ones alone: mean states 0 and 4, a = 2, so one eigenvalue 4: dof = 4 / (4 + 1)
    assert first.metrics["link/right_dof"].item() == pytest.approx(4 / 5, rel=1e-14)


def test_wrong_answers_by_the_inverse():
    first = stage_one(GroupLogDet(w_lo=0.1, w_hi=10.0, right_only=False), COPIES, [2, 2, -2, -2])
    # the right ones are copies of one another; the wrong ones get 1 / sqrt 0.2 and 1 / sqrt 1.8
    copy, lone = 0.2**-0.5, 1.8**-0.5
    scale = 4 / (2 * copy + 2 * lone)
    assert first.advantages[:4].tolist() == pytest.approx([2, 2, -2 * copy * scale, -2 * lone * scale], rel=1e-14)


def test_per_token_advantages_keep_their_sum_over_responses():
    step = COPIES
    given = torch.zeros(step.mask.shape, dtype=torch.float64)
    given[:4, :2] = torch.tensor([[3.0, math.nan], [4.0, -2.0], [-1.0, 0.0], [1.0, math.nan]], dtype=torch.float64)
    first = first_stage(GroupLogDet(w_lo=0.1), rollout(step, advantages=given), {"eps": 1.0})
    # means over the tokens 3, 1, -1, 1; right are the first, second and last: leverages 1/4, 1/4, 9/4, mean 11/12
    w = [math.sqrt(3 / 11), math.sqrt(3 / 11), 0, math.sqrt(27 / 11)]
    scale = 5 / (3 * w[0] + w[1] + w[3])
    expected = [3 * w[0] * scale, 4 * w[1] * scale, -2 * w[1] * scale, -1, w[3] * scale]
    assert first.advantages[step.mask].tolist() == pytest.approx(expected, rel=1e-14)


def opposite_groups() -> tuple[Step, Tensor]:
    """Groups of 4, answers far apart: one right and three equal mistakes, then the other way round; GRPO's A."""
    step = make_step(dtype=torch.float64)
    states = torch.zeros_like(step.old_hidden)
    states[[0, 7], :, 0] = 5.0
    root = math.sqrt(3)
    given = torch.tensor([root, *[-1 / root] * 3, *[1 / root] * 3, -root], dtype=torch.float64)
    return replace(step, hidden=states, old_hidden=states, group_size=4), given


def test_over_the_batch_what_most_of_a_group_answers_gives_to_what_few_do():
    (step, given), root = opposite_groups(), math.sqrt(3)
    term = GroupLogDet(over="batch", beta=1.0, w_lo=0.1, w_hi=10.0)
    first = first_stage(term, rollout(step, advantages=given), {"eps": 1e-6})
    # leverages of the right ones G / m - 1 = 3 and three times 1/3, mean 1; w A adds up to 3 root + 3 (1/3) / root
    scale = 2 * root / (3 * root + 1 / root)
    expected = [3 * root * scale, *[-1 / root] * 3, *[scale / 3 / root] * 3, -root]
    assert first.advantages.tolist() == pytest.approx(expected, rel=1e-6)
    assert first.advantages[given > 0].sum().item() == pytest.approx(2 * root, rel=1e-14)
    within = first_stage(replace(term, over="group"), rollout(step, advantages=given), {"eps": 1e-6})
    assert within.advantages.tolist() == pytest.approx(given.tolist(), rel=1e-6)  # copies of one right answer


def test_zero_sum_over_the_batch_with_one_right_answer_is_max_rl():
    step, given = opposite_groups()
    term = GroupLogDet(over="batch", beta=0.5, w_lo=0.1, w_hi=10.0, zero_sum=True)
    first = first_stage(term, rollout(step, advantages=given), {"eps": 1e-6})
    # (R - m) / m with m = 1/4 and 3/4, scaled so that A > 0 add up to 2 root 3 as before
    max_rl = torch.tensor([3, -1, -1, -1, *[1 / 3] * 3, -1], dtype=torch.float64)
    torch.testing.assert_close(first.advantages, max_rl * math.sqrt(3) / 2, atol=1e-6, rtol=0)
    # a scale for each group, a smaller one for the second: neither's mistakes are left as they were
    assert first.advantages.view(2, 4).sum(dim=1).tolist() == pytest.approx([0, 0], abs=1e-12)


def test_zero_sum_within_a_group_changes_nothing_more():
    step, given = opposite_groups()
    first, without = (
        first_stage(GroupLogDet(zero_sum=zero_sum), rollout(step, advantages=given), {"eps": 1.0})
        for zero_sum in (True, False)
    )
    torch.testing.assert_close(first.advantages, without.advantages, atol=1e-14, rtol=0)


def test_zero_sum_keeps_what_a_group_without_right_answers_has():
    step, given = opposite_groups()
    given[4:] = torch.tensor([-1.0, -2.0, -3.0, 0.0])
    term = GroupLogDet(over="batch", beta=0.5, w_lo=0.1, w_hi=10.0, zero_sum=True)
    assert first_stage(term, rollout(step, advantages=given), {"eps": 1e-6}).advantages[4:].tolist() == [-1, -2, -3, 0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("right_only", [True, False])
@pytest.mark.parametrize("over", ["group", "batch"])
def test_a_plain_loop(seed: int, right_only: bool, over: str):
    step, changes, scored = gaps(seed)
    term, eps = GroupLogDet(right_only=right_only, over=over, eps_relative=0.1), 0.3
    first = first_stage(term, rollout(step, **changes), {"eps": eps})
    expected, leverage = step.advantages.clone(), torch.zeros(8, dtype=torch.float64)
    groups = by_loop(step, step.old_hidden, eps, scored)
    for group in groups:
        rows = group["rows"]
        leverage[rows] = group["leverage"]
    every = [i for group in groups for i in group["rows"]]
    for rows in [group["rows"] for group in groups] if over == "group" else [every]:
        for sign in (1, -1) if right_only is False else (1,):
            side = [i for i in rows if sign * step.advantages[i] > 0]
            mean = sum(leverage[i] for i in side) / max(len(side), 1)
            w = {i: min(max((leverage[i] / mean) ** (sign * 0.5), 0.5), 2.0) for i in side}
            before, after = sum(step.advantages[i] for i in side), sum(w[i] * step.advantages[i] for i in side)
            for i in side:
                expected[i] = w[i] * step.advantages[i] * before / after
    torch.testing.assert_close(first.advantages, expected, atol=1e-12, rtol=0)
    assert not torch.equal(expected, step.advantages)
    torch.testing.assert_close(leverages(first, step), leverage, atol=1e-12, rtol=0)
    assert leverage[3] == 0 and leverage[7] == 0  # without a token, without a score
    for name, value in {"value": mean_of(groups, "h"), "dof": mean_of(groups, "leverage")}.items():
        torch.testing.assert_close(first.metrics[f"link/{name}"], value, atol=1e-12, rtol=0)
    torch.testing.assert_close(first.metrics["link/spread"], mean_of(groups, "trace"), atol=1e-12, rtol=0)
    right = by_loop(step, step.old_hidden, eps, scored, step.advantages > 0)
    expected_dof = mean_of(right, "leverage") if right else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(first.metrics["link/right_dof"], expected_dof, atol=1e-12, rtol=0)


def gradient_of_the_entropy(step: Step, eps: float, scored: Tensor) -> Tensor:
    """d(-mean over groups of H) / dZ by autograd."""
    z = step.hidden.clone().requires_grad_()
    (-mean_of(by_loop(step, z, eps, scored), "h")).backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 5, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_the_injected_gradient_is_that_of_the_entropy(sizes: tuple[int, ...], seed: int):
    step, changes, scored = gaps(seed)
    memory: dict = {}
    gradient = injected_gradient(GroupLogDet(acts="force", eps_relative=0.05), step, memory, sizes, changes)
    expected = gradient_of_the_entropy(step, memory["eps"], scored)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)
    assert expected.abs().max() > 0.01
    both = injected_gradient(GroupLogDet(acts="both", balance=0.5), step, dict(memory), sizes, changes)
    torch.testing.assert_close(both, expected / 2, atol=1e-10, rtol=0)


@pytest.mark.parametrize("group_size", [4, 8])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("over", ["group", "batch"])
def test_groups_over_several_processes(group_size: int, count: int, over: str):
    step, changes, scored = gaps(0, group_size)
    step = replace(step, rewards=changes["rewards"])
    processes, term = Processes(count), GroupLogDet(acts="both", balance=1.0, over=over)
    views, memories = processes.views(step, [6] * (count // 2) + [5] * (count // 2)), [{} for _ in range(count)]
    firsts = processes.run(lambda rank: first_stage(term, views[rank], memories[rank]))
    gradients = []
    for rank, rows in enumerate(torch.arange(8).split(8 // count)):
        batch, own = token_batch(step, rows), torch.arange(8 // count)
        mine = replace(firsts[rank], advantages=None)
        loss = second_stage(term, batch, replace(mine, affected={"link": step.mask[rows]}), memories[rank], own)
        (torch.where(batch.mask, loss.losses["link"], 0).sum() / step.mask.sum()).backward()
        gradients.append(batch.hidden().grad)
    expected = gradient_of_the_entropy(step, memories[0]["eps"], scored)
    torch.testing.assert_close(torch.cat(gradients), expected, atol=1e-10, rtol=0)
    alone = first_stage(term, rollout(step), {})
    assert torch.equal(torch.cat([each.advantages for each in firsts]), alone.advantages)
    assert all(memory == memories[0] for memory in memories)


def test_groups_need_not_be_in_order():
    step = make_step(0, torch.float64)
    mixed = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    in_order, view = first_stage(GroupLogDet(), rollout(step), {}), rollout(step)
    names = ("ids", "mask", "advantages", "rewards", "group_rewards", "group")
    moved: Rollout = replace(view, **{name: getattr(view, name)[mixed] for name in names})
    moved = replace(moved, hidden=lambda: step.old_hidden[mixed])
    torch.testing.assert_close(GroupLogDet().on_rollout(moved, {}).advantages, in_order.advantages[mixed])


def test_a_group_of_copies_is_left_alone():
    # rounding alone tells them apart, and it is not to decide who learns
    step = make_step(0, torch.float64)
    states = step.old_hidden.clone()
    states[:4] = states[0, :1] * (1 + 1e-7 * torch.arange(4).view(4, 1, 1))
    step = replace(step, old_hidden=states)
    first = first_stage(GroupLogDet(), rollout(step), {})
    assert torch.equal(first.advantages[:4], step.advantages[:4])
    assert not torch.equal(first.advantages[4:], step.advantages[4:])


def test_eps_is_measured_at_the_first_step_with_spread_and_kept():
    memory: dict = {}
    alike = with_states([[[0.1, 0.3]]] * 4)
    assert stage_one(GroupLogDet(), alike, memory=memory).advantages is None and memory == {}
    stage_one(GroupLogDet(eps_relative=1e-3), COPIES, memory=memory)
    assert memory == {"eps": pytest.approx(1e-3 * 3 / 4, rel=1e-12)}  # tr K = 3, G = 4
    far = replace(COPIES, old_hidden=10 * COPIES.old_hidden)
    second = stage_one(GroupLogDet(eps_relative=1e-3), far, memory=memory)
    assert memory == {"eps": pytest.approx(1e-3 * 3 / 4, rel=1e-12)}
    # tr K grew a hundredfold, eps did not: H = 0.5 (log(300 + eps) + 3 log eps)
    expected = 0.5 * (math.log(300.00075) + 3 * math.log(0.00075))
    assert second.metrics["link/value"].item() == pytest.approx(expected, rel=1e-12)


def test_later_updates_reuse_the_force_of_the_sampling_policy():
    moved = replace(COPIES, hidden=COPIES.hidden * 3 + 1)
    term = GroupLogDet(acts="force")
    before, after = (injected_gradient(term, step, {"eps": 1.0}) for step in (COPIES, moved))
    assert torch.equal(after[COPIES.mask], before[COPIES.mask]) and after[COPIES.mask].any()


def test_half_precision_states_are_pooled_in_full():
    # exact in bfloat16 each, their mean over 4 tokens is not: 1.0078125 and three 1s
    tokens = [[1.0078125, 0.0]] + [[1.0, 0.0]] * 3
    step = with_states([tokens, [[0.0, 0.0]]])
    states = {name: getattr(step, name).bfloat16() for name in ("hidden", "old_hidden")}
    half = replace(step, old_logps=step.old_logps.float(), **states)  # as a policy in bfloat16 has them
    first = stage_one(GroupLogDet(acts="force"), half)
    # tr K = 2 |hc|^2 / 2 = (1.001953125 / 2)^2
    assert first.metrics["link/spread"].item() == pytest.approx((1.001953125 / 2) ** 2, rel=1e-12)
    assert first.columns["link/force"].dtype == torch.float32
    batch = token_batch(half)
    assert second_stage(GroupLogDet(acts="force"), batch, first, {"eps": 1.0}).losses["link"].dtype == torch.float32


def test_each_way_to_act_has_its_strength():
    links = build_chain(["group_log_det", {"group_log_det": {"acts": "force", "name": "force"}}]).links
    assert [link.coef for link in links] == [Constant(coefficient=1.0), Constant(coefficient=1e-3)]
    assert isinstance(links[0], Link)
    shaped, forced = (stage_one(GroupLogDet(acts=acts), COPIES, [1, 1, 1, 1]) for acts in ("advantage", "force"))
    assert forced.advantages is None and not shaped.columns
    assert forced.columns["link/force"].shape == (8, 2)


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"beta": -0.5}, "beta must not be negative, got -0.5"),
        (
            {"features": "answers", "acts": "both"},
            "features: answers have no gradient, so acts must be advantage, got both",
        ),
        ({"answer": "x"}, "answer must have one group, which holds the answer, got 'x' with 0"),
        ({"w_lo": 0.0}, "w_lo must be in (0, 1] and w_hi at least 1, got 0.0 and 2.0"),
        ({"w_hi": 0.9}, "w_lo must be in (0, 1] and w_hi at least 1, got 0.5 and 0.9"),
        (
            {"zero_sum": True, "right_only": False},
            "zero_sum scales the responses with A < 0 together, right_only: false each for itself",
        ),
        ({"balance": 0.0}, "balance must be positive, got 0.0"),
        ({"eps_relative": math.nan}, "eps_relative must be positive, got nan"),
    ],
)
def test_refuses(fields: dict, sentence: str):
    with pytest.raises(ValueError) as error:
        GroupLogDet(**fields)
    assert str(error.value) == sentence
