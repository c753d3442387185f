"""pass@k in TRL's own evaluation; trainer/test_invariance.py has two processes."""

from pathlib import Path

import numpy as np
import pytest

import hclm_rl
from hclm_rl.evaluation.training import pass_metrics
from tests.tiny import CONFIGS, largest_difference, low_words, make, prompts, weights_of


def test_metrics_of_two_prompts():
    found = pass_metrics(np.array([[1.0, 0.0, 0.0, 0.5], [1.0, 1.0, 2.0, 1.0]]), 1.0, "eval")
    # the first prompt has 1 right of 4, the second all: means of 1/4, 2/4, 4/4 and 1
    assert [found[f"eval_pass@{k}"] for k in (1, 2, 4)] == pytest.approx([0.625, 0.75, 1.0])
    # of the resamples of two prompts a quarter holds the first one twice, a quarter the second
    assert (found["eval_pass@1/lower"], found["eval_pass@1/upper"]) == (0.25, 1.0)


def test_a_prompt_without_a_reward_is_left_out_and_one_prompt_has_no_interval():
    found = pass_metrics(np.array([[1.0, 0.0], [np.nan, 1.0]]), 1.0, "eval")
    assert found == {"eval_pass@1": 0.5, "eval_pass@2": 1.0}
    assert pass_metrics(np.array([[np.nan, 1.0]]), 1.0, "eval") == {}


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_evaluation_counts_the_responses_of_each_prompt(algorithm: str, policy: str, tmp_path: Path):
    held_out = {"eval_dataset": prompts(5)}
    stock = make(policy, tmp_path, algorithm=algorithm, trainer=held_out)
    assert not any("pass@" in name for name in stock.evaluate())  # asked for by eval_pass_at_k alone
    changes = {"eval_pass_at_k": True, "eval_pass_threshold": 0.5}
    trainer = make(policy, tmp_path, algorithm=algorithm, trainer=held_out, **changes)
    right: dict[str, list[bool]] = {}

    def recorded(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        rewards = low_words(completions)
        for prompt, reward in zip(prompts, rewards, strict=True):
            right.setdefault(prompt, []).append(reward >= 0.5)
        return rewards

    trainer.reward_funcs[0] = recorded
    found = trainer.evaluate()
    assert [len(of) for of in right.values()] == [4] * 5
    counts = [sum(of) for of in right.values()]
    assert 0 < sum(counts) < 20
    assert found["eval_pass@1"] == pytest.approx(sum(counts) / 20)
    assert found["eval_pass@4"] == pytest.approx(sum(count > 0 for count in counts) / 5)
    assert found["eval_pass@1/lower"] < found["eval_pass@1"] < found["eval_pass@1/upper"]


def test_it_is_logged_by_name_of_the_data_set_and_leaves_training_as_it_is(policy: str, tmp_path: Path):
    changes = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    held_out = {"eval_dataset": {"easy": prompts(2), "hard": prompts(3)}}
    stock = make(policy, tmp_path / "stock", ours=False, trainer=held_out, **changes)
    stock.train()
    ours = make(policy, tmp_path / "ours", trainer=held_out, eval_pass_at_k=True, **changes)
    ours.train()
    assert largest_difference(weights_of(stock), weights_of(ours)) == 0.0
    logged = [entry for entry in ours.state.log_history if "eval_easy_pass@4" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    assert any("eval_hard_pass@2/upper" in entry for entry in ours.state.log_history)


@pytest.mark.parametrize(
    "unscored, sentence",
    [
        (3, "3 of 3 prompts, which have no part in pass@k: none is logged"),
        (1, "1 of 3 prompts, which have no part in pass@k"),
        (0, None),
    ],
)
def test_prompts_without_a_reward_are_said(unscored, sentence, policy: str, tmp_path: Path, caplog):
    trainer = make(policy, tmp_path, trainer={"eval_dataset": prompts(3)}, eval_pass_at_k=True)
    seen: list[str] = []

    def half_blind(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
        seen.extend(prompt for prompt in prompts if prompt not in seen)
        first = [seen.index(prompt) < unscored and prompts.index(prompt) == i for i, prompt in enumerate(prompts)]
        return [None if is_first else 1.0 for is_first in first]

    trainer.reward_funcs[0], trainer.reward_func_names[0] = half_blind, "half_blind"
    with caplog.at_level("WARNING", logger="hclm_rl"):
        found = trainer.evaluate()
    said = [record.getMessage() for record in caplog.records if "pass@k" in record.getMessage()]
    expected = f"eval: the first reward function, half_blind, left a response without a reward in {sentence}"
    assert said == ([expected] if sentence else [])
    assert ("eval_pass@1" in found) == (unscored < 3)


def test_without_scipy_it_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hclm_rl.recipe.config.importlib.util, "find_spec", lambda name: None)
    for config in CONFIGS.values():
        with pytest.raises(ValueError, match="eval_pass_at_k needs scipy"):
            config(output_dir=str(tmp_path), eval_pass_at_k=True, use_cpu=True, bf16=False)
