"""ARES against its card (arXiv:2510.08457): numbers, loops written from the definition, and the traps."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from hclm_rl.terms.ares import Ares, entropy_ahead, entropy_score

from ..term_batches import card_step, first_stage, make_step, rollout, second_stage, token_batch

NAN = math.nan
H = [0.2, 0.9, 1.6, 0.8, 0.5, 0.3, 0.9]
KINDS = {"easy": 0, "medium": 1, "hard": 2}


def group_of(rows, rewards, words=None, ref_gap=None):
    """Stage 1's view of one group; `words` are the tokens, `ref_gap` is log p_ref - log p of every token."""
    width = max(map(len, rows)) + 1
    slots = [row + [NAN] * (width - len(row)) for row in rows]
    view, _ = card_step([[1] * len(row) + [0] * (width - len(row)) for row in rows], slots, slots, slots, slots)
    values = torch.tensor(rewards, dtype=torch.float64)
    groups = values.expand(len(rows), -1)
    view = replace(view, rewards=values, group_rewards=groups, advantages=torch.zeros_like(values), ref_logps=None)
    if words is not None:
        names = sorted({word for row in words for word in row})
        ids = [[names.index(word) for word in row] + [0] * (width - len(row)) for row in words]
        view = replace(view, ids=torch.tensor(ids), tokenizer=Named(names))
    if ref_gap is not None:
        view = replace(view, ref_logps=view.logps + ref_gap)
    return view


class Named:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.names[i] for i in ids]


def score(n, t, kind, is_right, strength=0.5) -> float:
    values = (torch.tensor([float(x)], dtype=torch.float64) for x in (n, t, strength))
    return entropy_score(*values, torch.tensor([KINDS[kind]]), torch.tensor([is_right])).item()


def test_the_cards_windows():
    ahead = entropy_ahead(torch.tensor([H]), torch.ones(1, 7, dtype=torch.bool), 2)[0]
    assert (
        ahead[[1, 4]].tolist() == pytest.approx([1.2, 0.6]) and ahead[5:].isnan().all() and ahead[:5].isfinite().all()
    )


def test_the_cards_count():
    words = [["a", "ĠHowever", "b", "c", "▁wait", "d", "However,"]] * 2
    view = group_of([H, H], [1.0, 0.0], words)
    memory = {"theta": 1.0}
    assert first_stage(Ares(window=2), view, memory, group_size=2).metrics["link/count"] == 1
    # W = 1.25, 1.2, 0.65, 0.4, 0.6; 95th percentile: position 3.8, 1.2 + 0.8 * 0.05 = 1.24
    assert memory["theta"] == pytest.approx(0.99 * 1.0 + 0.01 * 1.24)
    assert first_stage(Ares(window=2, triggers=()), view, {"theta": 0.6}, group_size=2).metrics["link/count"] == 4
    assert (
        first_stage(Ares(window=2, triggers=("none",)), view, {"theta": 0.6}, group_size=2).metrics["link/count"] == 0
    )


def test_the_first_batch_sets_the_threshold_and_counts_by_it():
    memory: dict = {}
    # percentiles 1.24 and half of it: median 0.93; W >= 0.93: two in the first response, none in the second
    rows = [H, [h / 2 for h in H]]
    first = first_stage(Ares(window=2, triggers=()), group_of(rows, [1.0, 0.0]), memory, group_size=2)
    assert memory["theta"] == pytest.approx(0.93) and first.metrics["link/count"] == 1


@pytest.mark.parametrize(
    "n, t, kind, is_right, expected",
    [
        (7, 4, "easy", True, 0.833333),
        (7, 4, "easy", False, 0.219318),
        (4, 4, "easy", False, 0.150000),
        (7, 4, "medium", True, 0.916667),
        (1, 4, "medium", True, 0.916667),
        (7, 4, "hard", True, 1.487530),
        (1, 4, "hard", True, 0.982222),
        (7, 4, "hard", False, 0.378156),
    ],
)
def test_the_cards_rewards(n, t, kind, is_right, expected):
    # printed to six digits: half of the last one
    assert is_right + score(n, t, kind, is_right) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("seed", range(4))
def test_the_score_agrees_with_a_transcript_of_the_card(seed):
    source = random.Random(seed)
    for _ in range(50):
        kind, is_right = source.choice(list(KINDS)), source.random() < 0.5
        n, t, alpha = source.randint(0, 40), source.randint(0, 20), 2 * source.random()
        f, kappa, spread, c = {
            "easy": (0.15, 2, 2, 1), "medium": (0.25, 3, 2.5, 1), "hard": (0.35, 4, 3, 1.2)
        }[kind]  # fmt: skip
        d, m, cap = n - t, max(1, f * max(t, 1)), alpha * c

        def hub(x, kappa=kappa):
            return x * x / (2 * kappa) if x <= kappa else x - kappa / 2

        def sat(x, spread=spread):
            return 1 / (1 + math.exp(-x / spread))

        if not is_right:
            expected = sat(max(d - m, 0)) * cap * {"easy": 0.6, "medium": 0.8, "hard": 1.0}[kind]
        elif kind == "hard":
            expected = sat(d + m) * cap if d >= -m else -min(cap, 0.5 * hub(-d - m) / (m + kappa) * cap)
        else:
            excess = max((d if kind == "easy" else abs(d)) - m, 0)
            expected = -min(cap, hub(excess) / (m + kappa) * cap)
        assert score(n, t, kind, is_right, alpha) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("right, kind", [(3, "easy"), (2, "easy"), (1, "medium"), (0, "hard")])
def test_difficulty_target_and_strength(right, kind):
    # counts with theta 0.93: the response H twice 2, once 0: mean 4 / 3, target 1
    rows, rewards = [H, H, [0.0] * 7], [1.0] * right + [0.0] * (3 - right)
    memory = {"theta": 0.93}
    first = first_stage(Ares(window=2, triggers=()), group_of(rows, rewards), memory, group_size=3)
    assert memory[f"target_{kind}"] == 1 and first.metrics[f"link/{kind}"] == 1
    # m - T = 1/3: easy and medium rise, hard falls
    moved = 0.05 / 3 * (-1 if kind == "hard" else 1)
    assert memory[f"strength_{kind}"] == pytest.approx(0.5 + moved)
    expected = [r + score(n, 1, kind, r == 1.0, 0.5 + moved) for n, r in zip((2, 2, 0), rewards, strict=True)]
    assert first.rewards.tolist() == pytest.approx(expected)
    assert not {f"target_{other}" for other in KINDS if other != kind} & memory.keys()
    json.dumps(memory)


def test_an_absent_kind_keeps_its_target():
    memory = {"theta": 0.93, "target_hard": 7, "strength_hard": 1.25}
    first_stage(Ares(window=2, triggers=()), group_of([H] * 3, [1.0] * 3), memory, group_size=3)
    assert memory["target_hard"] == 7 and memory["strength_hard"] == 1.25 and memory["target_easy"] == 2


def test_an_unscored_response_stays_unscored_and_does_not_count_in_the_accuracy():
    memory = {"theta": 0.93}
    first = first_stage(Ares(window=2, triggers=()), group_of([H] * 3, [1.0, NAN, 1.0]), memory, group_size=3)
    assert first.rewards.isnan().tolist() == [False, True, False] and first.metrics["link/easy"] == 1


def kl(log_ratio: float) -> float:
    return math.exp(log_ratio) - 1 - log_ratio


def test_the_cards_kl_weight():
    gap = 0.24  # k3 = 0.0312
    while kl(gap) > 0.03:  # the card's K, by bisection from above
        gap -= 1e-6
    view = group_of([H] * 2, [1.0, 1.0], ref_gap=gap)
    memory = {"batches": 99}
    first = first_stage(Ares(triggers=()), view, memory, group_size=2)
    # printed to six digits; K is 0.03 within 1e-6 * 0.27
    assert first.columns["link/kl_weight"].tolist() == pytest.approx([1.003005] * 2, abs=1e-6)
    assert memory["error_easy"] == pytest.approx(0.06, abs=1e-5)


def test_the_kl_weight_waits_and_has_a_dead_zone():
    view = group_of([H] * 2, [1.0, 1.0], ref_gap=0.3)
    memory: dict = {}
    for _ in range(4):
        first_stage(Ares(triggers=(), kl_every=5), view, memory, group_size=2)
    assert "weight_easy" not in memory and memory["kl_easy"] == pytest.approx(kl(0.3))
    first_stage(Ares(triggers=(), kl_every=5), view, memory, group_size=2)
    assert memory["weight_easy"] > 1
    still: dict = {}
    first_stage(Ares(triggers=(), kl_every=1, kl_target=kl(0.3) * 0.99), view, still, group_size=2)
    assert "weight_easy" not in still
    # E = 0.03 e is cut at 0.2, so the weight rises by a factor of at most exp(0.01), and by exp(-0.0015) it falls
    first_stage(Ares(triggers=(), kl_every=1, kl_target=1e-4), view, still, group_size=2)
    assert still["weight_easy"] == pytest.approx(math.exp(0.01))
    # the mean of the KL runs: 0.97 and 0.03
    first_stage(Ares(triggers=()), replace(view, ref_logps=view.logps), still, group_size=2)
    assert still["kl_easy"] == pytest.approx(0.97 * kl(0.3))


def test_the_loss_is_the_weighted_kl_of_the_policy():
    step = make_step(dtype=torch.float64)
    term, memory = (
        Ares(triggers=(), window=2, kl_coef=0.5),
        {"weight_easy": 2.0, "weight_medium": 3.0, "weight_hard": 5.0},
    )
    first = first_stage(term, rollout(step), memory)
    # one of four right, two of four: hard and medium
    assert first.columns["link/kl_weight"].tolist() == [5.0] * 4 + [3.0] * 4
    batch = token_batch(step)
    loss = second_stage(term, batch, first, memory).losses["link"]
    for b, t in batch.mask.nonzero().tolist():
        expected = 0.5 * (5.0, 3.0)[b // 4] * kl(batch.ref_logps[b, t].item() - batch.logps[b, t].item())
        assert loss[b, t].item() == pytest.approx(expected, rel=1e-6)
    loss[batch.mask].sum().backward()
    assert (batch.logps.grad[batch.mask] != 0).all()


def test_a_doubtful_wrong_answer_to_an_easy_prompt_is_held_less():
    # windows of two of H: 1.25, 1.2, 0.65, 0.4, 0.6; theta 0.9: doubt 0.35 + 0.3 = 0.65 of the first, third and fourth
    # response, 0.1 less in every entropy 0.25 + 0.2 = 0.45 of the second; three of four right: easy
    low = [h - 0.1 for h in H]
    term = Ares(triggers=(), window=2, second_chance=0.67)

    def weights(rewards, theta=0.9, **memory):
        view = group_of([H, low, H, H], rewards, ref_gap=0.0)
        memory = {"theta": theta, "weight_easy": 2.0, "weight_medium": 3.0, **memory}
        return first_stage(term, view, memory, group_size=4).columns["link/kl_weight"].tolist()

    assert weights([0.0, 1.0, 1.0, 1.0]) == pytest.approx([1.34, 2.0, 2.0, 2.0])
    assert weights([1.0, 0.0, 1.0, 1.0]) == [2.0] * 4  # in too little doubt
    assert weights([1.0, 0.0, 1.0, 1.0], theta=0.8) == pytest.approx([2.0, 1.34, 2.0, 2.0])  # 0.35 + 0.3
    assert weights([0.0, 0.0, 1.0, 1.0]) == [3.0] * 4  # a medium prompt
    assert weights([NAN, 1.0, 1.0, 1.0]) == [2.0] * 4  # not scored, so not wrong
    term = Ares(triggers=(), window=2)
    assert weights([0.0, 1.0, 1.0, 1.0]) == [2.0] * 4


def test_without_a_reference_model_the_reward_alone_is_shaped():
    step = make_step()
    first = first_stage(Ares(triggers=(), window=2), rollout(step, ref_logps=None), {})
    assert "link/kl_weight" not in first.columns
    assert second_stage(Ares(), token_batch(step, ref_logps=None), first, {}).losses == {}


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"window": 0}, "window and kl_every must be at least 1, got 0 and 100"),
        ({"level": 1.0}, "level must be in (0, 1), got 1.0"),
        ({"second_chance": 0.0}, "second_chance must be in (0, 1], got 0.0"),
        ({"strength": 2.5}, "strength must be in [0, 2], got 2.5"),
        ({"kl_target": 0.0}, "kl_coef must be >= 0 and kl_target > 0, got 0.01 and 0.0"),
        ({"correct_from": NAN}, "correct_from must be finite, got nan"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Ares(**wrong)
    assert str(error.value) == sentence


def test_an_id_without_a_token_is_no_trigger():
    class Padded:
        def convert_ids_to_tokens(self, ids):
            return [None for _ in ids]

    view = replace(rollout(make_step(dtype=torch.float64)), tokenizer=Padded())
    assert first_stage(Ares(), view, {}).metrics["link/count"] == 0
