import pytest

from hclm_rl.testbed import find_task
from hclm_rl.testbed.products import BUCKETS, answer, correct_product, is_correct, make_task, questions_of

ROW = {"left": 473, "right": 8}  # 473 * 8 = 3200 + 560 + 24 = 3784


def test_the_right_product_and_a_wrong_one():
    assert is_correct(ROW, "3 7 8 4") and answer(ROW, "3 7 8 4") == "3784"
    assert not is_correct(ROW, "3 7 8 6") and answer(ROW, "3 7 8 6") == "3786"


@pytest.mark.parametrize("completion", ["", "=", "3 7 * 4", "0 3 7 8 4", "0", "37 8 4", "³ 7 8 4", "- 3 7 8 4"])
def test_what_is_no_number_has_no_answer(completion):
    assert answer(ROW, completion) is None
    assert not is_correct(ROW, completion)


def test_the_reward_is_the_verifier_row_by_row():
    columns = {"left": [473, 120, 100], "right": [8, 2, 2], "prompts": ["", "", ""]}
    assert correct_product(["3 7 8 4", "3 7 8 4", "2 0 0"], **columns) == [1, 0, 1]


def test_the_splits_share_no_question_and_hold_them_all():
    questions = {split: set(questions_of(split)) for split in BUCKETS}
    # 900 * 8 questions; disjoint, since the sizes add up to the union's
    assert sum(map(len, questions.values())) == len(set.union(*questions.values())) == 7200


def test_prompts_come_from_their_split_alone():
    task = make_task(prompts=384, eval_prompts=384, eval_split="test")
    for dataset, split in ((task.train_dataset, "train"), (task.eval_dataset, "test")):
        rows = list(dataset)
        asked = {(row["left"], row["right"]) for row in rows}
        assert len(asked) == 384 and asked <= set(questions_of(split))
        spelt = [[*str(row["left"]), "*", str(row["right"]), "="] for row in rows]
        assert [row["prompt"].split() for row in rows] == spelt


def test_same_seed_same_task_and_other_seed_other_prompts():
    first, again, other = (make_task(prompts=20, eval_prompts=20, seed=seed) for seed in (1, 1, 2))
    assert first.train_dataset["prompt"] == again.train_dataset["prompt"] != other.train_dataset["prompt"]
    assert first.eval_dataset["prompt"] == other.eval_dataset["prompt"]


def test_too_many_prompts_and_an_unknown_split_are_refused():
    with pytest.raises(ValueError, match=r"the split test has \d+ questions, 4000 were asked for"):
        find_task("products", eval_prompts=4000, eval_split="test")
    with pytest.raises(ValueError, match="split must be one of test, validation, train, warm_start, got 'valid'"):
        make_task(eval_split="valid")  # pyright: ignore[reportArgumentType]
