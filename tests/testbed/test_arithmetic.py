import math
import random
import re
import sys

import pytest

from hclm_rl.testbed.arithmetic import constant_score, exact_answer, is_correct, make_task, read_answer

PROBLEMS = ("sums", "products", "gcd")


def solve(expression):
    """The test's own reading of an expression: (what is asked, regardless of order where it is free; the answer)."""
    if numbers := re.fullmatch(r"gcd\((\d+), (\d+)\)", expression):
        left, right = map(int, numbers.groups())
        return ("gcd", frozenset({left, right})), math.gcd(left, right)
    left, operator, right = re.fullmatch(r"(\d+) ([-+*]) (\d+)", expression).groups()
    left, right = int(left), int(right)
    if operator == "-":
        return ("-", left, right), left - right
    return (operator, frozenset({left, right})), left + right if operator == "+" else left * right


def read_prompt(row):
    """(what the open line asks, what the solved lines ask)"""
    *solved, last = row["prompt"].split("\n")
    asked = []
    for line in solved:
        expression, written = line.split(" = ")
        question, answer = solve(expression)
        assert str(answer) == written
        asked.append(question)
    assert last == row["question"] + " ="
    question, answer = solve(row["question"])
    assert str(answer) == row["answer"]
    return question, asked


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_evaluation_question_occurs_in_training_or_in_the_shots(problem, seed):
    task = make_task(problem, seed=seed)
    held_out = [read_prompt(row) for row in task.eval_dataset]
    training = [read_prompt(row) for row in task.train_dataset]
    assert (len(training), len(held_out)) == (400, 50)
    assert len({question for question, _ in held_out}) == 50
    seen = {asked for question, shots in training for asked in (question, *shots)}
    seen |= {asked for _, shots in held_out for asked in shots}
    assert seen.isdisjoint({question for question, _ in held_out})


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("shots", [1, 4])
def test_a_prompt_has_the_shots_asked_for_and_not_its_own_question_among_them(problem, shots):
    for row in make_task(problem, shots=shots, prompts=300).train_dataset:
        question, asked = read_prompt(row)
        assert len(set(asked)) == shots
        assert question not in asked


def test_digits_and_ranges_are_those_asked_for():
    def operands(task):
        questions = [*task.train_dataset["question"], *task.eval_dataset["question"]]
        return {int(number) for question in questions for number in re.findall(r"\d+", question)}

    assert operands(make_task("sums")) == set(range(10))
    assert max(operands(make_task("sums", max_digits=2))) > 9
    assert 9 < max(operands(make_task("products"))) < 100
    assert operands(make_task("products", max_digits=1, eval_prompts=10)) == set(range(10))
    assert operands(make_task("gcd")) == set(range(1, 31))


def test_the_longest_right_answer_fits_the_completion_length():
    for problem in PROBLEMS:
        task = make_task(problem, max_digits=None if problem == "gcd" else 2)
        # a space, one token for each character, the newline
        assert max(len(answer) for answer in task.train_dataset["answer"]) + 2 <= task.max_completion_length


def test_equal_arguments_give_equal_tasks_whatever_the_global_generator():
    tasks = []
    for global_seed in (0, 1):
        random.seed(global_seed)
        tasks.append(make_task("products", seed=3))
    assert tasks[0].train_dataset.to_list() == tasks[1].train_dataset.to_list()
    assert tasks[0].eval_dataset.to_list() == tasks[1].eval_dataset.to_list()


def test_neighbouring_seeds_hold_out_different_questions():
    # Of 4095 unordered two-digit and 55 one-digit products, drawn half and half: two sets of 50 different ones share
    # about 55 * (20/55)^2 = 7. Were the seed passed on to reasoning-gym as it is, they would share 48 or 49.
    drawn = [set(make_task("products", seed=seed).eval_dataset["question"]) for seed in (0, 1)]
    assert len(drawn[0] & drawn[1]) < 20


def test_validation_questions_are_neither_of_the_test_nor_of_training_which_stay_the_same():
    test, validation = (make_task("products", eval_split=split) for split in ("test", "validation"))
    asked = [{read_prompt(row)[0] for row in task.eval_dataset} for task in (test, validation)]
    assert [len(questions) for questions in asked] == [50, 50] and not asked[0] & asked[1]
    assert not asked[1] & {read_prompt(row)[0] for row in validation.train_dataset}
    assert test.train_dataset["question"] == validation.train_dataset["question"]
    with pytest.raises(ValueError, match="sums has too few different questions"):
        make_task("sums", eval_prompts=70, eval_split="validation")
    with pytest.raises(ValueError, match="eval_split must be validation or test, got 'train'"):
        make_task("sums", eval_split="train")  # pyright: ignore[reportArgumentType]


def test_the_number_of_training_prompts_does_not_change_what_is_held_out():
    few, many = make_task("sums", prompts=100), make_task("sums", prompts=300)
    assert few.eval_dataset["question"] == many.eval_dataset["question"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 12", "12"),
        (" 12\n", "12"),
        ("12 \n13", "12"),
        (" 0", "0"),
        (" -3\n", "-3"),
        (" 10", "10"),
        (" -0", None),
        (" 012", None),
        (" 00", None),
        (" +12", None),
        (" --3", None),
        (" - 3", None),
        (" 12.0", None),
        (" 1,200", None),
        (" 1 2", None),
        (" 12 apples", None),
        (" 12\t", None),
        (" 12\r\n", None),
        (" 6 * 2", None),
        (" 1e3", None),
        (" 1_000", None),
        (" ١٢", None),
        (" 1٢", None),
        (" ²", None),
        ("\n12", None),
        (" ", None),
        ("", None),
    ],
)
def test_only_a_canonical_integer_on_the_first_line_is_an_answer(completion, answer):
    assert read_answer({}, completion) == answer


def test_right_iff_the_answer_is_the_row_s():
    row = {"answer": "12"}
    assert is_correct(row, " 12\n")
    assert not is_correct(row, " 13\n12")
    assert not is_correct(row, " 012\n")


def test_reward_reads_each_completion_against_its_own_answer():
    rewards = exact_answer(
        prompts=["6 * 2 =", "1 - 4 =", "gcd(9, 6) ="],
        completions=[" 12\n", " 3\n", " 3, because"],
        answer=["12", "-3", "3"],
        question=["6 * 2", "1 - 4", "gcd(9, 6)"],
    )
    assert rewards == [1.0, 0.0, 0.0]


def test_constant_score_by_hand():
    # 4 is right in two rows of five; of the tie between 2 and 7, were 4 not there, 2 comes first
    rows = [{"answer": answer} for answer in ("2", "4", "7", "4", "9")]
    assert constant_score(rows) == ("4", 0.4)
    assert constant_score([rows[0], rows[2]]) == ("2", 0.5)


def test_constant_score_of_a_task_is_what_the_verifier_gives_the_constant():
    rows = make_task("gcd").eval_dataset
    answer, score = constant_score(rows)
    assert score == sum(is_correct(row, f" {answer}\n") for row in rows) / 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"problem": "lcm"}, "problem must be one of sums, products, gcd, got 'lcm'"),
        ({"prompts": 0}, "prompts and eval_prompts must be at least 1, got 0 and 50"),
        ({"shots": 0}, "shots must be at least 1"),
        ({"max_digits": 3}, "max_digits must be 1 or 2, for sums and products only, got 3 for products"),
        ({"problem": "gcd", "max_digits": 1}, "got 1 for gcd"),
        ({"max_digits": 1, "eval_prompts": 55, "prompts": 10}, "products has too few different questions"),
        ({"max_digits": 1, "eval_prompts": 53, "prompts": 10}, "products has too few different questions"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(**arguments)


def test_missing_generator_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'hclm-rl[eval]'")):
        make_task("products")
