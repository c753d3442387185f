"""AEPO: the card's temperatures, loss and selection; the weights of rows; a run remembers H; what is refused."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hclm_rl.recipe.rollout import build_rollout
from hclm_rl.rollouts.arbitrary_entropy import ArbitraryEntropy, AuxiliaryRows
from hclm_rl.rollouts.branch import Branch
from hclm_rl.types import Rollout
from tests.tiny import largest_difference, make, weights_of


def rollout_of(
    rewards: list[list[float]],
    auxiliary: list[bool],  # of each group
    lengths: list[int] | None = None,
    nats: list[float] | None = None,
    **given,
) -> Rollout:
    """Groups with GRPO's advantages; `lengths` and `nats` of each response."""
    groups, size = len(rewards), len(rewards[0])
    table = torch.tensor(rewards, dtype=torch.float32)
    flat = table.flatten()
    lengths, nats = lengths or [1] * len(flat), nats or [0.0] * len(flat)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    deviation, centred = table.std(dim=1, keepdim=True), table - table.mean(dim=1, keepdim=True)
    return Rollout(
        ids=torch.zeros(mask.shape, dtype=torch.long),
        mask=mask,
        advantages=(centred / (deviation + 1e-4)).flatten(),
        rewards=flat,
        reward_parts=flat[:, None],
        group_rewards=table.repeat_interleave(size, dim=0),
        group=torch.arange(groups).repeat_interleave(size),
        reward_scale=torch.ones(len(flat)),
        rows=[{"is_auxiliary": auxiliary[i // size], "nats": nats[i]} for i in range(len(flat))],
        **given,
    )


def term_of(**given) -> AuxiliaryRows:
    term = ArbitraryEntropy(**given).term()
    assert isinstance(term, AuxiliaryRows)
    return term


def test_the_temperatures_of_the_card():
    weigh = ArbitraryEntropy()
    assert [weigh.temperature(h) for h in (0.38, 0.10, 0.62)] == pytest.approx([1.12, 1.2, 0.88])
    assert (weigh.temperature(None), weigh.temperature(5.0)) == (1.0, 0.8)
    replace = ArbitraryEntropy(form="replace")
    assert [replace.temperature(h) for h in (None, 0.5, 0.51)] == [1.2, 1.2, 0.8]


def test_the_auxiliary_loss_of_the_card():
    """Four ordinary and four auxiliary rows; the mean over sequences of all eight has the card's auxiliary part."""
    rollout = rollout_of([[1, 0, 1, 0], [1, 0, 1, 0]], [False, True], [1] * 4 + [3, 1, 2, 1], loss_mean="sequences")
    advantages = term_of().on_rollout(rollout, {}).advantages
    assert advantages is not None
    # weights 2 and 1/32 of the card, on advantages of 0.866024 and of the indicator
    torch.testing.assert_close(advantages[:4], 2.0 * rollout.advantages[:4])
    assert advantages[4:].tolist() == [0.03125, 0.0, 0.03125, 0.0]
    logp = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0]])
    ratio = (torch.tensor([[0.0, 0.1, 0.3], [-0.1, 0.0, 0.0]]) + logp).exp()
    a = advantages[[4, 6], None]
    surrogate = torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2))
    loss = -((surrogate * mask).sum(dim=1) / mask.sum(dim=1)).sum() / 8
    loss.backward()
    assert loss.item() == pytest.approx(-0.00802399, abs=1e-8)
    expected = torch.tensor([[-0.00130208, -0.00143902, 0.0], [-0.00176726, -0.00195312, 0.0]])
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, expected, atol=1e-8, rtol=1e-5)


def test_a_mean_over_tokens_has_the_same_parts():
    lengths = [2, 2, 1, 1, 3, 1, 2, 1]  # 6 ordinary tokens of 13
    rollout = rollout_of([[1, 0, 1, 0], [1, 0, 1, 0]], [False, True], lengths, loss_mean="tokens")
    advantages = term_of().on_rollout(rollout, {}).advantages
    assert advantages is not None
    torch.testing.assert_close(advantages[:4], 13 / 6 * rollout.advantages[:4])
    # alpha / (4 len) of the loss for each token, of which the mean over 13 gives 1/13
    assert advantages[4:].tolist() == pytest.approx([13 / 64 / (4 * 3), 0, 13 / 64 / (4 * 2), 0])


def test_all_right_groups_count_and_h_leaves_the_auxiliary_rows_out():
    memory: dict = {}
    rollout = rollout_of([[1, 0], [1, 1]], [False, True], [2, 4, 3, 3], [0.6, 3.0, 9.0, 9.0])
    effect = term_of().on_rollout(rollout, memory)
    assert effect.advantages is not None and (effect.advantages[2:] > 0).all()
    assert memory == {"entropy": pytest.approx(3.6 / 6)}
    assert effect.metrics["right"].item() == 1.0


def test_rows_that_are_left_out_of_the_loss_are_left_out_of_h():
    memory: dict = {}
    # the second row was cut off and masked: its nats are not those of any token that counts
    term_of().on_rollout(rollout_of([[1, 0], [1, 1]], [False, True], [2, 0, 3, 3], [0.6, 30.0, 9.0, 9.0]), memory)
    assert memory == {"entropy": pytest.approx(0.6 / 2)}


def test_the_selection_of_the_released_code():
    """Kept are rows 0 and 2 of the first group alone: in the others no answer is better than its group."""
    rewards = [[1.0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    given = {"auxiliary": [True, True, True, False], "loss_mean": "sequences"}
    rollout = rollout_of(rewards, **given)
    assert rollout.advantages[0].item() == pytest.approx(0.866024, abs=2e-4)
    own = term_of(form="replace").on_rollout(rollout, {}).advantages
    assert own is not None
    # four ordinary rows and two kept ones share the loss of sixteen
    factor = 16 / 6
    assert own[:12].tolist() == pytest.approx([factor, 0, factor, *[0] * 9])
    torch.testing.assert_close(own[12:], factor * rollout.advantages[12:])
    # most 3 halved to 1, as H of the batch before is above the target
    few = term_of(form="replace", most=3).on_rollout(rollout, {"entropy": 0.6}).advantages
    assert few is not None and few[:12].count_nonzero() == 1 and few[0].item() == pytest.approx(16 / 5)


def test_without_a_right_answer_nothing_but_the_ordinary_part_is_left():
    for form in ("weigh", "replace"):
        rollout = rollout_of([[1, 0], [0, 0]], [False, True], loss_mean="sequences")
        own = term_of(form=form).on_rollout(rollout, {}).advantages
        assert own is not None
        torch.testing.assert_close(own, torch.tensor([2.0, 2.0, 0.0, 0.0]) * rollout.advantages)


def test_groups_that_are_auxiliary():
    assert [ArbitraryEntropy().auxiliary(n) for n in (2, 16, 160, 224)] == [1, 1, 2, 4]  # 2.5 rounds to 2
    assert ArbitraryEntropy(form="replace").auxiliary(16) == 4 and ArbitraryEntropy(share=0.9).auxiliary(2) == 1
    with pytest.raises(ValueError, match="on each process there must be at least 2, got 1: raise steps_per_generation"):
        ArbitraryEntropy().auxiliary(1)


@pytest.mark.parametrize("form", ["weigh", "replace"])
def test_a_run_measures_h_and_moves_the_temperature(form: str, policy: str, tmp_path: Path):
    rollout = {"arbitrary_entropy": {"form": form, "target": 0.01, "right_at": 0.25}}
    trainer = make(policy, tmp_path, rollout=rollout, max_steps=2)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    h = first["arbitrary_entropy/entropy"]
    assert 0 < h < math.log(26) * 1.5  # log-probs of single draws may be below the mean
    assert first["arbitrary_entropy/temperature"] == pytest.approx(1.0 if form == "weigh" else 1.2)
    assert second["arbitrary_entropy/temperature"] == pytest.approx(0.8)  # far above the target
    assert 0 <= second["arbitrary_entropy/right"] <= 1 and second["rollout/share_trained"] == 1


def test_terms_shape_the_ordinary_rows_alone(policy: str, tmp_path: Path):
    """Advantages that MaxRL makes anew are those of the ordinary rows; an all-right auxiliary group has 1, not 0."""
    seen = []

    def always_right(completions: list[str], is_auxiliary: list[bool], **_) -> list[float]:
        return [1.0 if aux else len(text) % 2 for aux, text in zip(is_auxiliary, completions, strict=True)]

    trainer = make(policy, tmp_path, rollout="arbitrary_entropy", terms=["max_rl"], max_steps=1)
    trainer.reward_funcs = [always_right]
    assert [link.name for link in trainer._hclm.chain.links] == ["max_rl", "arbitrary_entropy"]
    stage = AuxiliaryRows.on_rollout
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            AuxiliaryRows,
            "on_rollout",
            lambda self, *given: seen.append((given[0], stage(self, *given))) or seen[-1][1],
        )
        trainer.train()
    [(rollout, effect)] = seen
    auxiliary = torch.tensor([row["is_auxiliary"] for row in rollout.rows])
    lengths = rollout.mask.sum(dim=1)
    torch.testing.assert_close(effect.advantages[auxiliary], lengths.sum() / 64 / (4 * lengths[auxiliary]))
    ordinary = ~auxiliary
    success = rollout.rewards[ordinary].mean()
    made = (rollout.rewards[ordinary] - success) / success * lengths.sum() / lengths[ordinary].sum()
    torch.testing.assert_close(effect.advantages[ordinary], made)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_a_resumed_run_is_the_run(algorithm: str, policy: str, tmp_path: Path):
    """H, which sets the next temperature, is in the checkpoint."""
    settings = {
        "algorithm": algorithm,
        "rollout": {"arbitrary_entropy": {"target": 2.0, "right_at": 0.5, "alpha": 1.0}},
    }
    settings |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = make(policy, tmp_path, **settings)
    trainer.train()
    assert len({entry["arbitrary_entropy/temperature"] for entry in trainer.state.log_history if "loss" in entry}) > 1
    resumed = make(policy, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert largest_difference(weights_of(trainer), weights_of(resumed)) == 0


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"form": "swap"}, "form must be"),
        ({"target": 0.0}, "target must be above 0 and finite, got 0.0"),
        ({"alpha": 2.0}, r"alpha must be in \(0, 1\], got 2.0"),
        ({"coldest": 1.1}, r"coldest must be in \(0, 1\] and hottest at least 1 and finite, got 1.1 and 1.2"),
        ({"share": 1.0}, r"share must be in \(0, 1\), got 1.0"),
        ({"most": 0}, "most must be at least 1, got 0"),
    ],
)
def test_bad_values_are_a_sentence(given: dict, sentence: str):
    with pytest.raises(ValueError, match=f"arbitrary_entropy: {sentence}"):
        build_rollout({"arbitrary_entropy": given})


class Told:
    """A sampler that draws nothing and keeps the temperatures that it is told."""

    temperature = 0.5

    def __init__(self) -> None:
        self.told: list[tuple[int, float | None]] = []

    def begin(self, prompts: list[list[int]]) -> list[Branch]:
        return [Branch(prompt=each) for each in prompts]

    def extend(self, branches: list[Branch], *, temperature: float | None = None, with_entropies: bool = True) -> None:
        self.told.append((len(branches), temperature))


def test_the_auxiliary_temperature_is_a_factor_of_the_losses():
    sampler = Told()
    asked = SimpleNamespace(
        prompts=[[2], [3], [4]],
        responses=2,
        sampler=sampler,
        memory={"entropy": 0.62},
        stream=lambda *_: random.Random(0),
        note=lambda *_: None,
    )
    ArbitraryEntropy()(asked)  # type: ignore[arg-type]
    # 1 + 0.5 - 0.62 = 0.88 of 0.5, for the two responses of the last prompt
    assert sampler.told == [(4, None), (2, pytest.approx(0.44))]
