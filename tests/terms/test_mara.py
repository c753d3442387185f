"""MARA against its card (arXiv:2510.20817): numbers, the optimum that it is for, what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hclm_rl import build_chain
from hclm_rl.recipe.refusals import refuse_without_reference
from hclm_rl.terms.mara import Mara, relieved

from ..term_batches import first_stage, groups_view, grpo, make_step, rollout
from ..tiny import CONFIGS, make

NAN = math.nan
L = [-20.0, -35.0, -50.0, -18.0]


def view_of(*groups: list[float], sums: list[float] | None = None, beta: float = 0.01, **changes):
    """Responses of ten tokens each, whose log-probs under the reference sum to `sums`."""
    rows = [[each / 10] * 10 for each in (sums or L * len(groups))]
    view = groups_view(*groups, logps=rows)
    one = torch.ones_like(view.rewards)
    return replace(view, **({"ref_logps": view.logps, "beta": beta, "reward_scale": one} | changes))


def paid(*groups: list[float], sums: list[float] | None = None, beta: float = 0.01, **settings) -> list[float]:
    return Mara(**settings).on_rollout(view_of(*groups, sums=sums, beta=beta), {}).rewards.tolist()


@pytest.mark.parametrize(
    ("beta", "shaped", "advantages"),
    [
        (0.01, [1, 1.15, 1.3, 0], [0.233844, 0.488947, 0.744049, -1.466840]),
        (0.001, [1, 1.015, 1.03, 0], [0.470214, 0.499756, 0.529298, -1.499268]),
    ],
)
def test_the_cards_worked_example(beta, shaped, advantages):
    found = paid([1, 1, 1, 0], beta=beta)
    assert found == pytest.approx(shaped, abs=1e-12)
    assert grpo(torch.tensor([found], dtype=torch.float64)).tolist() == pytest.approx(advantages, abs=6e-7)


def test_without_a_right_one_or_with_one_alone_nothing_changes():
    assert paid([0, 0, 0, 0], [1, 0, 0, 0], [NAN, NAN, 1, 0]) == pytest.approx(
        [0, 0, 0, 0, 1, 0, 0, 0, NAN, NAN, 1, 0], nan_ok=True
    )


def test_the_reward_of_the_anchor_is_everyones():
    # graded above the threshold: the anchor is the likeliest of them, 0.9
    assert paid([0.9, 1.0, 0.5, 0.79]) == pytest.approx([0.9, 0.9 + 0.15, 0.5, 0.79])
    assert paid([0.9, 1.0, 0.5, 0.79], threshold=0.5) == pytest.approx([0.79 + 0.02, 0.79 + 0.17, 0.79 + 0.32, 0.79])
    # the median of 0.5, 0.79, 0.9, 1 lies at 0.845
    assert paid([0.9, 1.0, 0.5, 0.79], quantile=0.5) == paid([0.9, 1.0, 0.5, 0.79])
    assert paid([1, 1, 1, 0], cap=0.2) == pytest.approx([1, 1.15, 1.2, 0])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_optimum_is_uniform_over_the_right_answers(beta):
    """All answers of a toy in one group: pi(y) ~ ref(y) exp(R'(y) / beta) is equal on the right ones."""
    ref = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
    rewards, right = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double(), torch.tensor([[True, False, True, True]])
    shaped = torch.where(right, relieved(rewards, ref.log().unsqueeze(0), right, beta, None), rewards)[0]
    best = (ref.log() + shaped / beta).softmax(0)
    assert best[[0, 2, 3]].tolist() == pytest.approx([best[0].item()] * 3)
    stock = (ref.log() + rewards[0] / beta).softmax(0)  # which keeps the reference's proportions
    assert (stock[0] / stock[2]).item() == pytest.approx(6)


def test_a_response_without_tokens_is_neither_anchor_nor_paid():
    view = view_of([1, 1, 1, 0], sums=[-1.0, -35.0, -50.0, -18.0])
    view = replace(view, mask=view.mask & (torch.arange(4) != 0).unsqueeze(1))
    found = first_stage(Mara(), view, {}, group_size=4)
    assert found.rewards.tolist() == pytest.approx([1, 1, 1.15, 0])
    assert found.metrics["link/best_length"].item() == 10 and found.metrics["link/groups"].item() == 1
    assert found.metrics["link/relief"].item() == pytest.approx(0.075)


def test_rewards_that_are_scaled_are_told_of_once(caplog: pytest.LogCaptureFixture):
    memory: dict = {}
    for _ in range(2):
        first_stage(Mara(), rollout(make_step()), memory)
    [sentence] = [record.message for record in caplog.records]
    assert sentence.startswith("mara: rewards are divided by their deviation") and "scale_rewards: none" in sentence
    first_stage(Mara(), view_of([1, 0, 0, 0]), {})
    assert len(caplog.records) == 1


def test_without_the_reference_there_is_nothing_to_do():
    for changes in ({"beta": 0.0}, {"ref_logps": None}):
        assert Mara().on_rollout(view_of([1, 1, 1, 0], **changes), {}).rewards is None


def test_a_run_without_a_kl_is_refused_before_loading(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))  # there are no weights to load
    with pytest.raises(ValueError) as error:
        make(str(tmp_path), tmp_path / "out", terms=["mara"])
    assert str(error.value) == (
        "mara: acts against the run's KL penalty to a frozen model, and beta is 0, where it would do nothing: set "
        "beta, such as 1e-3"
    )
    chain = build_chain(["mara"])
    refuse_without_reference(chain, CONFIGS["grpo"](output_dir=str(tmp_path), beta=1e-3, use_cpu=True, bf16=False))
    for beta in (0.0, 0.05):
        config = CONFIGS["rloo"](output_dir=str(tmp_path), beta=beta, use_cpu=True, bf16=False)
        with pytest.raises(ValueError, match="mara: acts against the KL in the loss, which RLOO puts into the rewards"):
            refuse_without_reference(chain, config)
        refuse_without_reference(build_chain([{"mara": {"coef": 0}}]), config)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"threshold": NAN}, "threshold must be a finite reward, got nan"),
        ({"quantile": 1.0}, "quantile must be in (0, 1) or None, got 1.0"),
        ({"cap": 0.0}, "cap must be above 0 or None, got 0.0"),
    ],
)
def test_refuses(wrong, sentence):
    with pytest.raises(ValueError) as error:
        Mara(**wrong)
    assert str(error.value) == sentence
