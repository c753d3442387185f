"""The KL-reward frontier: the card's numbers, brute force over small distributions, and a policy on and off it."""

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import optimize

from hclm_rl.evaluation.frontier import (
    BETAS,
    best_of,
    best_of_kl_bound,
    best_of_levels,
    distance,
    efficiency,
    exact,
    frontier,
    least_kl,
    reliable_kl,
    reward_at,
    tilted,
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "eval" / "frontier.py"
    spec = importlib.util.spec_from_file_location("eval_frontier", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_worked_example_of_the_card():
    bounds = [best_of_kl_bound(n) for n in (1, 2, 4, 16, 64)]
    assert bounds == pytest.approx([0, 0.193147, 0.636294, 1.835089, 3.174508], abs=1e-6)
    for beta, reward, kl in ((1.0, 1.445107, 0.337589), (0.5, 1.822010, 0.871632)):
        point = tilted([0, 0, 1, 2], beta)
        assert (point.reward, point.kl) == pytest.approx((reward, kl), abs=1e-6)
    point, chosen = best_of_levels([0, 1, 2], [0.5, 0.25, 0.25], 2)
    assert chosen == pytest.approx([0.25, 0.3125, 0.4375])
    assert (point.reward, point.kl) == pytest.approx((1.1875, 0.141277), abs=1e-6)
    for n, accuracy, kl in ((2, 0.36, 0.068791), (4, 0.5904, 0.364899), (8, 0.832228, 0.924520)):
        point, _ = best_of_levels([0, 1], [0.8, 0.2], n)
        assert (point.reward, point.kl) == pytest.approx((accuracy, kl), abs=1e-6)
        assert least_kl(point.reward, 0.2) == pytest.approx(point.kl)  # best-of-n of a 0/1 reward lies on the frontier
    assert least_kl(0.6, 0.2) == pytest.approx(0.381909, abs=1e-6)
    assert efficiency(0.6, 0.2, 1.5) == pytest.approx(0.254606, abs=1e-6)


def test_kl_by_the_cards_other_formula():
    rewards = np.random.default_rng(0).normal(size=9)
    for beta in (0.3, 1.0, 7.0):
        point = tilted(rewards, beta)
        # KL = reward / beta - log(mean exp(r / beta))
        assert point.kl == pytest.approx(point.reward / beta - math.log(np.exp(rewards / beta).mean()))


def test_no_distribution_beats_the_tilt_at_its_kl():
    rewards, reference = np.array([0.0, 0.3, 1.0, 2.0]), np.array([0.4, 0.3, 0.2, 0.1])
    best = tilted(rewards, 0.8, reference)
    found = optimize.minimize(
        lambda logits: -exact(rewards, reference, softmax(logits)).reward,
        np.log(reference),
        constraints={"type": "ineq", "fun": lambda logits: best.kl - exact(rewards, reference, softmax(logits)).kl},
    )
    assert -found.fun == pytest.approx(best.reward, abs=1e-5)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - np.logaddexp.reduce(logits))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_draws(n: int):
    rewards = [0.3, 2.0, -1.0, 0.3, 0.7]
    draws = list(itertools.combinations(rewards, n))
    assert best_of(rewards, n) == pytest.approx(sum(map(max, draws)) / len(draws))
    with pytest.raises(ValueError, match=r"n must be in \[1, 5\]"):
        best_of(rewards, 6)


def test_levels_in_any_order_and_with_nothing_on_one():
    sorted_, chosen = best_of_levels([0, 1, 2], [0.5, 0.25, 0.25], 3)
    shuffled, other = best_of_levels([2, 5, 0, 1], [0.25, 0.0, 0.5, 0.25], 3)
    assert (shuffled.kl, shuffled.reward) == pytest.approx((sorted_.kl, sorted_.reward))
    assert other == pytest.approx([chosen[2], 0, chosen[0], chosen[1]])


def test_two_prompts_meet_at_a_common_beta():
    easy, hard = [0.0, 0.0, 1.0, 1.0], [0.0] * 7 + [1.0]
    curve = frontier([easy, hard], [0.5])
    one, other = tilted(easy, 0.5), tilted(hard, 0.5)
    assert (curve[0].kl, curve[0].reward) == (0, (0.5 + 0.125) / 2)
    assert (curve[1].kl, curve[1].reward) == pytest.approx(((one.kl + other.kl) / 2, (one.reward + other.reward) / 2))
    # at the same mean KL, giving both prompts the same KL earns less
    same = [least_reward(p, curve[1].kl) for p in (0.5, 0.125)]
    assert sum(same) / 2 < curve[1].reward - 1e-3
    kls = [point.kl for point in frontier([easy, hard])]
    assert len(kls) == 1 + len(BETAS) == 61 and kls == sorted(kls)


def least_reward(p: float, kl: float) -> float:
    """The accuracy that a KL buys from the base accuracy p."""
    return optimize.brentq(lambda a: least_kl(a, p) - kl, p, 1 - 1e-12)


def test_edges_of_the_least_kl():
    assert least_kl(0.0, 0.5) == pytest.approx(math.log(2)) == least_kl(1.0, 0.5)
    assert least_kl(0.0, 0.0) == 0 == least_kl(1.0, 1.0)
    assert least_kl(0.1, 0.0) == math.inf == least_kl(0.9, 1.0)
    assert math.isnan(efficiency(0.5, 0.5, 0.0))
    with pytest.raises(ValueError, match=r"accuracy must be in \[0, 1\], got 1.2"):
        least_kl(1.2, 0.5)


def test_distance_of_a_policy_on_the_frontier_and_of_one_that_wastes_its_kl():
    base = [[1.0] * 16 + [0.0] * 48, [1.0] * 32 + [0.0] * 32]
    wanted = [tilted(rewards, 1.0) for rewards in base]
    policy = [[1.0] * round(1000 * point.reward) + [0.0] * round(1000 * (1 - point.reward)) for point in wanted]
    on = distance(base, policy, [point.kl for point in wanted])
    assert on.gap == pytest.approx(0, abs=1e-3) and on.efficiency == pytest.approx(1, abs=0.01)
    off = distance(base, policy, [point.kl + 0.5 for point in wanted])
    assert off.gap > 0.1 and off.efficiency == pytest.approx(on.kl / off.kl, abs=0.01)
    assert on.is_reliable and reliable_kl(64) == pytest.approx(3.158883, abs=1e-6)
    assert not distance(base, policy, [4.0, 4.0]).is_reliable


def test_prompts_that_the_base_never_or_always_solves_are_counted_and_left_out():
    base, policy = [[1, 0, 0, 0, 0], [0] * 5, [0] * 5, [1] * 5], [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [1] * 5]
    found = distance(base, policy, [1.5, 9.0, 9.0, 9.0])
    assert (found.never, found.expanded, found.always) == (2, 1, 1)
    assert found.efficiency == pytest.approx(0.254606, abs=1e-6)  # the card's: 0.6 from 0.2 at KL 1.5
    assert math.isnan(distance([[0.5, 1.0]], [[0.7, 0.9]], [0.1]).efficiency)  # not a 0/1 reward
    with pytest.raises(ValueError, match="of the same prompts, at least one, got 1, 1 and 2"):
        distance([[1, 0]], [[1, 0]], [0.1, 0.2])


def test_interpolation():
    _, *curve = frontier([[0, 0, 1, 2]], [1.0, 0.5])
    assert reward_at(curve, (0.337589 + 0.871632) / 2) == pytest.approx((1.445107 + 1.822010) / 2, abs=1e-5)
    assert reward_at(curve, 9.0) == curve[-1].reward


@pytest.mark.parametrize(
    ("rewards", "beta", "probabilities", "sentence"),
    [
        ([], 1.0, None, "at least one finite number"),
        ([math.nan], 1.0, None, "at least one finite number"),
        ([0, 1], 0.0, None, "beta must be > 0, got 0.0"),
        ([0, 1], 1.0, [0.5, 0.4], "with sum 1; got 2 with sum 0.9"),
    ],
)
def test_refusals(rewards: list[float], beta: float, probabilities: list[float] | None, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        tilted(rewards, beta, probabilities)


def test_a_table_of_known_distributions(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture):
    table, out = tmp_path / "table.jsonl", tmp_path / "out.json"
    row = {"rewards": [0, 1], "reference": [0.8, 0.2], "policy": [0.4, 0.6]}
    table.write_text(json.dumps(row) + "\n")
    assert script.main(["--table", str(table), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found[str(table)]["kl"] == pytest.approx(0.381909, abs=1e-6)  # least_kl(0.6, 0.2): two outcomes only
    assert "0.600" in capsys.readouterr().out and len(found["frontier"]) == 61


def test_the_log_of_a_run_gives_kl_a_response(script: ModuleType, tmp_path: Path):
    entry = {"step": 5, "max_steps": 10, "kl": 0.02, "reward": 0.4, "completions/mean_length": 12.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(entry) + "\n")
    [(step, point)] = script.points_of(tmp_path)
    assert step == 5 and (point.kl, point.reward) == pytest.approx((0.24, 0.4))


def test_log_probs_of_responses_are_those_of_the_model_without_padding(script: ModuleType):
    model, _ = script.load("testbed")
    prompts = torch.tensor([[0, 0, 7, 8], [5, 6, 7, 8]])
    responses = torch.tensor([[9, 1, 0], [9, 10, 1]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = script.sums_of_logps(model, prompts, (prompts != 0).long(), responses, mask)
    alone = model(input_ids=torch.tensor([[7, 8, 9, 1]])).logits[0].log_softmax(dim=-1)
    torch.testing.assert_close(found[0], (alone[1, 9] + alone[2, 1]).detach(), rtol=1e-5, atol=1e-5)


def test_the_base_against_itself_is_at_kl_0(script: ModuleType, tmp_path: Path):
    out = tmp_path / "out.json"
    line = ["--task", "coins", "--task_kwargs", '{"prompts": 1, "eval_prompts": 2}', "--policy", "testbed"]
    state = torch.get_rng_state()
    assert script.main([*line, "--samples", "64", "--out", str(out)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    found = json.loads(out.read_text())["testbed"]
    assert abs(found["kl"]) < 1e-5 and found["prompts"] == 2


def test_what_has_no_answer_is_refused_and_an_unknown_kl_stays_unknown():
    with pytest.raises(ValueError, match="prompts must hold the rewards of at least one prompt, got none"):
        frontier([])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        reliable_kl(0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best_of_kl_bound(0)
    assert math.isnan(efficiency(0.6, 0.2, math.nan))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_frontier_is_above_every_policy_whatever_the_rewards_scale(scale: float):
    rewards, reference = [0.0, scale], [0.8, 0.2]
    curve = frontier([rewards], probabilities=[reference])
    for share in (0.3, 0.6, 0.9, 0.99):
        policy = exact(rewards, reference, [1 - share, share])
        assert reward_at(curve, policy.kl) == pytest.approx(
            policy.reward, rel=5e-3
        )  # on it, and its chords a little below
