"""Prompt augmentation: the card's format scores and advantages, one template a group, what is refused."""

from pathlib import Path

import pytest
import torch

from hclm_rl.recipe.rollout import build_rollout
from hclm_rl.rollouts.prompt_augmentation import FormatReward, PromptAugmentation
from hclm_rl.rollouts.templates import BUILT_IN, Template, template_of
from tests.rollouts.test_arbitrary_entropy import rollout_of
from tests.tiny import make, prompts

WHOLE = "<think>\nx\n</think>\n<answer>\n4\n</answer>"


@pytest.mark.parametrize(
    "name, text, score",
    [
        ("open-r1", WHOLE, 1.0),
        ("open-r1", WHOLE.removesuffix("</answer>"), 0.75),
        ("open-r1", "<think>\n" + WHOLE, 0.75),
        ("open-r1", WHOLE.replace("</think>\n<answer>", "</think><answer>"), 0.5),
        ("open-r1", "", 0.0),
        ("open-r1-teacher", "x\n</think>\n<answer>\n4\n</answer>", 1.0),
        ("open-r1-teacher", "x\n</think>\n<answer>\n4\n", 2 / 3),
        ("lm_eval_prompt1", "So it is. The final answer is: 4", 1.0),
        ("lm_eval_prompt1", "The final answer is: 4. The final answer is: 4", 0.0),
        ("qwen-math", "4", 1.0),
    ],
)
def test_the_format_scores_of_the_card(name: str, text: str, score: float):
    assert template_of(name).score(text) == pytest.approx(score)


def test_the_thirteen_kinds_of_the_paper():
    assert len(BUILT_IN) == 13
    assert sum(not each.once for each in BUILT_IN) == 5 and sum(bool(each.opener) for each in BUILT_IN) == 6
    for each in BUILT_IN:
        assert each.name.endswith("-teacher") == (each.opener.startswith("<") and len(each.once) == 3)


def test_the_advantages_of_the_card():
    """Correct with 3 of 4 tags, wrong with 3 of 4, correct with all, correct with none."""
    rollout = rollout_of([[1, 0, 1, 1]], [False])
    for row, score in zip(rollout.rows, (0.75, 0.75, 1.0, 0.0), strict=True):
        row["format_score"] = score
    rewards = FormatReward(format_weight=1.0).on_rollout(rollout, {}).rewards
    assert rewards is not None and rewards.tolist() == [1.75, 0.75, 2.0, 1.0]
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    expected = torch.tensor([0.630020, -1.050034, 1.050034, -0.630020])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)


def test_a_template_goes_around_text_and_messages():
    template = Template(name="t", system="Be brief.", user="Q: {question}?")
    assert template.around("2 + 2") == "Be brief.\n\nQ: 2 + 2?"
    spoken = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "2 + 2"}]
    assert template.around(spoken) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 2 + 2?"},
    ]
    assert Template(name="bare").around(spoken) == spoken


@pytest.mark.parametrize(
    "last, what",
    [
        ({"role": "user", "content": [{"type": "text", "text": "2 + 2"}]}, "is no text"),
        ({"role": "assistant", "content": "It is"}, "is of the role 'assistant'"),
    ],
)
def test_a_template_stands_around_the_users_text_alone(last: dict, what: str):
    with pytest.raises(ValueError, match=f"what the user says last, and here the last message {what}"):
        Template(name="t").around([{"role": "user", "content": "2 + 2"}, last])


OWN = [{"name": "as it is"}, {"name": "doubled", "user": "7 {question}", "opener": "3 5", "once": ["2", "4"]}]


def test_a_run_has_one_template_a_group_whose_opener_is_prompt(policy: str, tmp_path: Path):
    trainer = make(policy, tmp_path, rollout={"prompt_augmentation": {"templates": OWN}}, max_steps=4)
    seen: list[tuple[list[str], list]] = []

    def keep(completions: list[str], template: list[str], **_) -> list[float]:
        seen.append((template, [text.split() for text in completions]))
        return [float(len(text) % 3) for text in completions]

    trainer.reward_funcs = [keep]
    scored = trainer._generate_and_score_completions
    made = []
    trainer._generate_and_score_completions = lambda inputs: made.append(scored(inputs)) or made[-1]
    trainer.train()
    assert {each for templates, _ in seen for each in templates} == {"as it is", "doubled"}
    questions = {text: len(text.split()) for text in prompts()["prompt"]}
    seven, three, five = trainer.processing_class("7 3 5")["input_ids"]
    for (templates, _), output in zip(seen, made, strict=True):
        assert templates[:4] == [templates[0]] * 4 and templates[4:] == [templates[4]] * 4
        for name, ids, mask in zip(templates, output["prompt_ids"], output["prompt_mask"], strict=True):
            own = ids[mask.bool()].tolist()
            if name == "doubled":
                assert own[0] == seven and own[-2:] == [three, five]
            assert len(own) - (3 if name == "doubled" else 0) in questions.values()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            assert 0 <= entry["prompt_augmentation/format"] <= 1


def test_without_marks_or_weight_no_reward_is_shaped():
    assert PromptAugmentation(templates=["qwen-math", "abel"]).term() is None
    assert PromptAugmentation(format_weight=0.0).term() is None
    assert PromptAugmentation().term() == FormatReward(format_weight=1.0)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"templates": ["open-r2"]}, "no template 'open-r2'; the nearest are open-r1"),
        ({"templates": "abel2"}, "no template 'abel2'; the nearest are abel"),
        ({"templates": ["abel", "abel"]}, "templates has 'abel' twice: names must differ"),
        ({"templates": [{"user": "x"}]}, "a template is a name, or a mapping with a name of name, system, user"),
        ({"templates": [{"name": "x", "user": "y"}]}, "template 'x': user must hold {question} once, got 'y'"),
        (
            {"templates": [{"name": "x", "tags": []}]},
            "a template has no 'tags'; it has name, system, user, opener, once",
        ),
        ({"templates": [{"name": "x", "once": "y"}]}, "template: once must be a list of texts, got 'y'"),
        ({"format_weight": -1.0}, "format_weight must be at least 0 and finite, got -1.0"),
    ],
)
def test_bad_values_are_a_sentence(given: dict, sentence: str):
    with pytest.raises(ValueError) as error:
        build_rollout({"prompt_augmentation": given})
    assert f"prompt_augmentation: {sentence}" in str(error.value)
