"""Where problems come from, and what is said of those that cannot be used."""

import json
import time
from pathlib import Path

import datasets
import pytest

from hclm_rl.evaluation.math_judge import MathJudge, without_exponent
from hclm_rl.evaluation.tasks import Problems, Source, load
from hclm_rl.responses import limits
from hclm_rl.responses.limits import Unjudged
from hclm_rl.responses.mathematics import canonical

pytest.importorskip("math_verify")


def skipped(problems: Problems) -> list[str]:
    return [str(each) for each in problems.skipped]


def write(path: Path, *lines: object) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return path


def test_the_testbeds_problems_are_its_held_out_ones():
    found = load(Source(task="coins", kwargs={"prompts": 1, "eval_prompts": 6}, limit=4))
    assert ([each.id for each in found.problems], found.max_new_tokens) == (["row 0", "row 1", "row 2", "row 3"], 17)
    assert found.problems[0].judge("no payment") == (None, False)


def test_a_file_is_read_line_by_line_and_bad_lines_are_named(tmp_path: Path):
    path = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "1 + 1", "answer": 2},
        b'{"prompt": "cut o',
        b"",
        {"prompt": "no answer"},
        {"prompt": "prose", "answer": "see the appendix"},
        b'{"prompt": "\xff", "answer": "1"}',
        ["a", "list"],
        {"prompt": [], "answer": "1"},
        {"prompt": "yes?", "answer": True},
        {"prompt": [{"role": "user", "content": "half?"}], "answer": "\\frac{1}{2}"},
        "hello",
        b'{"prompt": "long", "answer": ' + b"1" * 5000 + b"}",
    )
    found = load(Source(task=str(path)))
    assert [each.id for each in found.problems] == ["line 1", "line 10"]
    *_, text, long = said = skipped(found)
    assert text == "line 11: is not a JSON object" and long.startswith("line 12: holds what Python does not read")
    assert said[:-2] == [
        "line 2: is not valid JSON (Unterminated string starting at at character 11)",
        "line 4: has no 'answer'",
        "line 5: the answer 'see the appendix' does not parse as mathematics",
        "line 6: is not UTF-8",
        "line 7: is not a JSON object",
        "line 8: 'prompt' must be text, or messages with role and content",
        "line 9: 'answer' must be text or a number, got bool",
    ]


def reading(answer: str) -> MathJudge:
    found = MathJudge.reading(answer)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("reference", "completion", "answer", "is_right"),
    [
        ("1/2", "so it is $0.5$", "1/2", True),
        ("0.5", "\\boxed{\\frac{2}{4}}", "1/2", True),
        ("42", "The answer is 42.", "42", True),
        ("42", "The answer is 0.25", "1/4", False),
        ("42", "The answer is $\\frac{3}{12}$", "1/4", False),  # the same wrong answer as the one before
        ("42", "no idea", None, False),
        ("We add. #### 1234", "\\boxed{1234}", "1234", True),
        ("x^2+1", "$1+x^2$", "x**2 + 1", True),
    ],
)
def test_answers_have_one_spelling(reference: str, completion: str, answer: str | None, is_right: bool):
    assert reading(reference)(completion) == (answer, is_right)


@pytest.mark.parametrize(
    "spellings",
    [
        ("1.5e^2", r"\frac{3}{2}e^2"),
        (r"\sin(0.5)", r"\sin(\frac{1}{2})"),
        (r"|{-3}|", "3"),
        (r"1.5\times 10^{12}", "1500000000000"),
        (r"0.5\sqrt{2}", r"\frac{\sqrt{2}}{2}"),
        (r"(0.5+x)^2", r"(x+\frac{1}{2})^2"),
    ],
)
def test_wrong_answers_of_one_value_are_one(spellings: tuple[str, str]):
    one, other = (reading("42")(rf"\boxed{{{each}}}")[0] for each in spellings)
    assert one == other


def test_a_tower_of_powers_is_left_as_it_stands():
    from math_verify import parse

    assert canonical(parse("$9^{9^{9^9}}$")) == "9**(9**(9**9))"


@pytest.mark.parametrize(
    "said",
    [
        r"5000(1+\frac{0.06}{365})^{365 \cdot 10}",
        "1000(1.0005)^{3650}",
        r"1.5 \cdot 2^{100000}",
        "20000!",
        "50!!",
        "99999999999!",
        "9^{9^{9}}",
        r"\sum_{i=1}^{1000000000} \frac{1}{i}",
        "0." + "1" * 5000,
        "1" * 5000,
    ],
)
def test_no_response_ends_the_evaluation(said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    start = time.perf_counter()
    answer, is_right = reading("42")(rf"\boxed{{{said}}}")
    assert not is_right and (answer is None or isinstance(answer, str))
    assert time.perf_counter() - start < 30


def test_what_goes_over_the_limits_is_its_text_and_is_known_as_such(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    judge = reading("42")
    bombs = [f"9^{{9^{{{n}^9}}}}" for n in (8, 9)] + ["7" * 1001, "1+" * 3000 + "1"]
    found = [judge(rf"<think>x</think>\boxed{{{bomb}}}") for bomb in bombs]
    assert found == [(bomb, False) for bomb in bombs]
    assert all(isinstance(answer, Unjudged) for answer, _ in found)
    assert judge(r"\boxed{42}") == ("42", True) and not isinstance(judge(r"\boxed{7}")[0], Unjudged)


@pytest.mark.parametrize("text", ["$ " * 50_000, "1 " * 50_000, "answer" * 20_000, "<answer>" * 20_000])
def test_a_long_response_costs_no_more_than_its_end(text: str):
    start = time.perf_counter()
    reading("42")(text)
    assert time.perf_counter() - start < 30  # the limit is 3 s of processor time


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (5e-05, "0.00005"),
        (2.5e-05, r"\frac{1}{40000}"),
        (1e16, "10000000000000000"),
        ("1e5", "100000"),
        ("2.5e-5", "0.000025"),
        (-1.5e-7, "-0.00000015"),
        (0.1, "0.1"),
    ],
)
def test_numbers_with_an_exponent(tmp_path: Path, reference: object, said: str):
    found = load(Source(task=str(write(tmp_path / "p.jsonl", {"prompt": "?", "answer": reference}))))
    assert found.problems[0].judge(rf"\boxed{{{said}}}")[1] and not found.problems[0].judge(r"\boxed{7}")[1]


def test_an_absurd_exponent_stays_as_it_is():
    assert without_exponent("1e9999") == "1e9999" and without_exponent("1e-400") == "0." + "0" * 399 + "1"


@pytest.mark.parametrize("answer", ["", "?", "no", "see the appendix"])
def test_prose_is_no_reference(answer: str):
    assert MathJudge.reading(answer) is None


def test_references_of_several_answers_are_read_whole_or_left_out(tmp_path: Path):
    answers = [
        "1331 and 1728",
        r"x=1 \text{ or } x=2",
        "7 hours 30 minutes",
        "3:30 p.m.",
        "10 to 12",
        "10-12",
        "8" * 1001,
    ]
    path = write(tmp_path / "several.jsonl", *({"prompt": "?", "answer": answer} for answer in answers))
    found = load(Source(task=str(path)))
    several = "holds several numbers among words, which are not compared as mathematics"
    assert skipped(found) == [
        f"line 3: the answer '7 hours 30 minutes' {several}",
        f"line 5: the answer '10 to 12' {several}",
        "line 6: the answer '10-12' may be a range or a difference",
        f"line 7: the answer '{'8' * 60}' goes over the limits of judging (more than 1000 digits)",
    ]
    tries = [(r"1331 \text{ and } 1728", "1728"), (r"x=1 \text{ or } x=2", "2"), ("3:30", "3")]
    judges = [problem.judge for problem in found.problems]
    for judge, (whole, part) in zip(judges, tries, strict=True):
        assert judge(rf"\boxed{{{whole}}}")[1] and not judge(rf"\boxed{{{part}}}")[1]


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (r"First \boxed{7}. On checking I get \boxed{9", (None, False)),
        (r"<think>\boxed{7}</think>The answer is 9.", ("9", False)),
        (r"<think>\boxed{9}</think>The answer is 7.", ("7", True)),
        (r"\boxed{}", (None, False)),
        (r"\fbox{7}, which I would not print as \}", ("7", True)),
        (r"\boxed{\left\{7\right\}}", ("7", True)),
        (r"\boxed{7 \text{ hours } 30 \text{ minutes}}", ("7 hours 30 minutes", False)),
    ],
)
def test_the_last_box_is_the_answer(completion: str, found: tuple):
    assert reading("7")(completion) == found


def test_a_task_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    found = load(Source(task="gym:chain_sum", kwargs={"seed": 3}, limit=2))
    assert len(found.problems) == 2 and "<answer>" in found.problems[0].prompt
    import reasoning_gym

    right = reasoning_gym.create_dataset("chain_sum", size=2, seed=3)[1]["answer"]
    judge = found.problems[1].judge
    assert judge(f"first <answer>0.5</answer>, no: <answer> {right} </answer>") == (right, True)
    assert judge("<answer>0.5</answer>") == ("0.5", False)
    assert judge(right) == judge("<answer> </answer>") == (None, False)


def test_a_scorer_has_a_clock(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("reasoning_gym")
    judge = load(Source(task="gym:countdown", limit=1)).problems[0].judge
    assert judge("<answer>1</answer>") == ("1", False)  # the scorer is imported before the clock is short
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    for bomb in ("9**9**9", "1+" * 3000 + "1"):
        answer, is_right = judge(f"<answer>{bomb}</answer>")
        assert (answer, is_right, isinstance(answer, Unjudged)) == (bomb, False, True)


@pytest.mark.parametrize(("task", "said"), [("prime_factorization", "2 x 3"), ("game_of_life", "{}"), ("boxnet", "42")])
def test_a_scorer_that_raises_says_wrong(task: str, said: str):
    pytest.importorskip("reasoning_gym")
    found = load(Source(task=f"gym:{task}", limit=1))
    assert found.problems[0].judge(f"<answer>{said}</answer>") == (said, False)


def test_a_task_with_tools_is_refused():
    with pytest.raises(ValueError, match="the task 'hidden_number' has tools, which this command does not run"):
        load(Source(task="hidden_number"))


def test_a_data_set_of_ones_own_columns(tmp_path: Path):
    rows = datasets.Dataset.from_dict({"question": ["1 + 1", "", "3 - 1"], "solution": ["2", "2", "two"]})
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "data")
    source = {"task": f"dataset:{tmp_path / 'data'}", "prompt_column": "question", "answer_column": "solution"}
    found = load(Source(**source, split="validation"))
    assert [each.id for each in found.problems] == ["row 0"]
    assert skipped(found) == [
        "row 1: 'question' must be text, or messages with role and content",
        "row 2: the answer 'two' does not parse as mathematics",
    ]
    with pytest.raises(ValueError, match="no split 'test', only validation"):
        load(Source(**source))
    with pytest.raises(ValueError, match="no column 'prompt', only question, solution"):
        load(Source(task=source["task"], split="validation"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (Source(task="coinz"), "no task 'coinz'.*gym:NAME is a task of reasoning-gym"),
        (Source(task="coins", kwargs={"colour": 1}), "task_kwargs of 'coins': .*colour"),
        (Source(task="gym:chainsum"), "no task 'chainsum'; the nearest are chain_sum"),
        (Source(task="gym:chain_sum", kwargs={"colour": 1}), "task_kwargs of 'gym:chain_sum': .*colour"),
        (Source(task="nowhere.jsonl"), "no file at 'nowhere.jsonl'"),
        (Source(task="dataset:./nowhere"), "the data set './nowhere' could not be loaded"),
    ],
)
def test_a_mistake_is_one_sentence(source: Source, sentence: str):
    with pytest.raises(ValueError, match=sentence) as error:
        load(source)
    assert "\n" not in str(error.value)
