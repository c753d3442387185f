"""Which answer a text gives, and which answers are the same; expectations read off the texts by eye."""

import random
import threading
import time

import pytest
import torch

from hclm_rl.responses import answers
from hclm_rl.responses.answers import (
    answer_of,
    as_whole,
    boxed,
    boxed_or_numbers,
    by_group,
    clusters,
    equivalence,
    extractor,
    final_text,
    normalised,
    repeats,
    same_in_mathematics,
)
from hclm_rl.responses.limits import OverLimits
from hclm_rl.testbed import coins

from ..term_batches import Processes, make_step, rollout


def in_a_thread(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def without_first_word(text: str):
    return " ".join(text.split()[1:]) or None


def words(text: str):
    return tuple(text.split())


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{a{b}", None),
        (r"\boxed{}", ""),
        (r"first \boxed{7}, then \boxed{9", None),  # the last one is not closed
        (r"\fbox{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\left\{x : x > 0\right.} and } after", r"\left\{x : x > 0\right."),  # a printed brace groups nothing
        (r"\boxed{a \\{b}}", r"a \\{b}"),  # a new line, then a brace that groups
        (r"<think>\boxed{4}</think> so it is 5", None),
        (r"<think>\boxed{4}</think> so it is \boxed{5}", "5"),
        (r"\boxed{4}</think> ", "4"),  # nothing is said after it
        ("4", None),
    ],
)
def test_the_last_box_with_balanced_braces(text, inside):
    assert boxed(text) == inside


def test_numbers_alone_are_an_answer_and_numbers_in_words_are_none():
    assert boxed_or_numbers(" 7  28 5\n23 ") == "7 28 5 23"
    assert boxed_or_numbers("-12") == "-12"
    assert [boxed_or_numbers(text) for text in ("", "  ", "it is 4", "4.5", "²")] == [None] * 5
    assert boxed_or_numbers(r"4 \boxed{5}") == "5" and boxed_or_numbers(r"4 5 \boxed{6") is None


def test_the_answer_after_a_thought_counts():
    assert boxed_or_numbers(r"<think>\boxed{4}</think> 5 6") == "5 6"
    assert boxed_or_numbers("<think>4 5</think>\N{MINUS SIGN}12") == "-12"


@pytest.mark.parametrize("text", [r"\boxed{" * 20_000, "\\boxed" * 30_000, "{" * 200_000, "</think>" * 30_000])
def test_a_long_text_is_read_in_one_pass(text):
    start = time.perf_counter()
    assert boxed(text) is None and boxed_or_numbers(text) is None
    assert time.perf_counter() - start < 2  # quadratic, it would take minutes


def test_two_payments_agree_iff_they_pay_the_same_coins():
    row = {"coins": [3, 5, 7], "amount": 15, "forbidden": [1, 2, 4]}
    texts = ["5 10 5 5 5 0", "5 10  5 5 5 0 ", "3 12 5 7 7 0", "7 8 5 3 3 0"]
    assert all(coins.is_correct(row, text) or "3 12" in text for text in texts)
    for a in texts:
        for b in texts:
            is_same = coins.answer(row, a) == coins.answer(row, b)
            assert (boxed_or_numbers(a) == boxed_or_numbers(b)) == is_same


def test_rules_are_patterns_or_dotted_paths():
    assert extractor(r"= (\d+)")("1 + 1 = 2, so 2 + 2 = 4.") == "4"  # the last match
    assert extractor(r"= (\d+)")("none") is None
    own = extractor("tests.responses.test_answers.without_first_word")
    assert own("a b c") == "b c" and own("a") is None


def test_what_a_function_finds_is_text_or_none():
    sentence = r"answer function 'tests.responses.test_answers.words' must return text or None, got tuple \('a', 'b'\)"
    with pytest.raises(ValueError, match=sentence):
        extractor("tests.responses.test_answers.words")("a b")


def test_a_pattern_has_a_second(monkeypatch, caplog):
    monkeypatch.setattr(answers, "PATTERN_SECONDS", 0.05)
    find = extractor(r"(?:a+)+(b)")  # tries every way to cut the row of a
    start = time.perf_counter()
    found = in_a_thread(lambda: [find("a" * 5000), find("aab")])
    assert found == [None, "b"] and time.perf_counter() - start < 5
    assert "was stopped after 0.05 s on a response of 5000 characters" in caplog.text


@pytest.mark.parametrize(
    "how, sentence",
    [
        (r"\d+", r"answer must have one group, which holds the answer, got '\\d+' with 0"),
        (r"(\d)(\d)", r"answer must have one group, which holds the answer, got '(\\d)(\\d)' with 2"),
        ("(", "answer is no regular expression (missing ), unterminated subpattern at position 0) and no dotted path"),
        ("no.such.function", "no function that finds answers at 'no.such.function': No module named 'no'"),
        ("hclm_rl.answers.nothing", "no function that finds answers at 'hclm_rl.answers.nothing': module"),
        ("hclm_rl.answers.DEFAULT", "no function that finds answers at 'hclm_rl.answers.DEFAULT': it is"),
    ],
)
def test_refuses_what_is_no_rule(how, sentence):
    with pytest.raises(ValueError) as error:
        extractor(how)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    "said",
    [
        r"\boxed{4}",
        [{"role": "assistant", "content": r"\boxed{4}"}],
        [{"role": "assistant", "content": r"\boxed{9}"}, {"role": "tool", "content": "9"},
         {"role": "assistant", "content": r"\boxed{4}"}],
        [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed"}, {"type": "text", "text": "{4}"}]}],
    ],
)  # fmt: skip
def test_texts_and_chats(said):
    assert answer_of(said, boxed) == "4"


def test_what_a_tool_says_last_is_no_answer():
    calculated = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "42"}]
    assert answer_of(calculated, boxed_or_numbers) is None
    assert answer_of([*calculated, {"role": "assistant", "content": "42"}], boxed_or_numbers) == "42"


def test_an_empty_chat_has_no_answer():
    assert answer_of([], boxed) is None and answer_of([{"role": "assistant", "content": None}], boxed) is None


@pytest.mark.parametrize(
    "written, same_as",
    [
        ("$ 4 $", "4"),
        (r"\text{east}.", "east"),
        (r"\left( 1,\! 2 \right)", "( 1, 2 )"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        ("\\leftarrow", "\\leftarrow"),
        ("\N{MINUS SIGN}5", "-5"),
        ("(C)", "C"),
        (r"\text{(C)}.", "C"),
        ("(CD)", "(CD)"),
        (r"12\,345", "12345"),
        ("12{,}345", "12345"),
        ("  ", None),
        ("$$", None),
    ],
)
def test_typography_is_not_meaning(written, same_as):
    assert answer_of(written, str) == same_as


def test_clusters_ask_the_first_member_and_missing_answers_stay_alone():
    assert clusters(["4", "7", "4", None, "4", "9", "7", None], equivalence("text")) == [0, 1, 0, 2, 0, 3, 1, 4]
    # numbers within 1 of one another: not transitive, so 2 is compared with 0, not with 1, and opens a cluster; 3 joins
    # it, and 1.5 is near no founder but 2
    near = [str(x) for x in (0, 1, 2, 3, 1.5)]
    assert clusters(near, lambda a, b: abs(float(a) - float(b)) <= 1) == [0, 0, 1, 1, 1]


def test_equal_as_mathematics():
    pytest.importorskip("math_verify")
    same = equivalence("math_verify")
    assert same("1/2", "0.5") and same(r"\frac{1}{2}", "0.5") and same("4", "4")
    assert not same("1/2", "2") and not same("x", "y")
    assert in_a_thread(lambda: same("3/4", "0.75"))


def test_what_cannot_be_compared_in_time_costs_it_once(monkeypatch):
    pytest.importorskip("math_verify")
    asked = []

    def equal(first, second):
        asked.append((first, second))
        if "bomb" in (first, second):
            raise OverLimits("SIGPROF")
        return float(first) == float(second)

    monkeypatch.setattr(answers, "equal", equal)
    same_in_mathematics.cache_clear()
    answers.can_be_compared.cache_clear()
    group = ["1", "bomb", "1.0", "2", "2.0", "bomb", "3"]
    assert clusters(group, same_in_mathematics) == [0, 1, 0, 2, 2, 1, 3]
    assert sum("bomb" in pair for pair in asked) == 1
    same_in_mathematics.cache_clear()
    answers.can_be_compared.cache_clear()


def test_mathematics_without_its_package(monkeypatch):
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs a package that is missing: pip install 'hclm-rl\[eval\]'"):
        equivalence("math_verify")


def test_answers_of_a_group_that_two_processes_share():
    step = make_step()
    expected = {0: ["0", "1", "2", "0"], 1: ["1", "2", "0", "1"]}
    assert by_group(rollout(step), extractor(answers.DEFAULT)) == expected
    # four processes with two responses each; one of them has the longest answer, one none at all
    texts = [["π ≈ 3.14", ""], ["a", "b"], ["c", "d"], ["e", "f\0g"]]
    processes = Processes(4)
    views = processes.views(step, [6, 6, 5, 5])
    for view, own in zip(views, texts, strict=True):
        view.texts[:] = own
    found = processes.run(lambda rank: by_group(views[rank], str))
    assert found[0] == found[1] == {0: ["π ≈ 3.14", None, "a", "b"]}
    assert found[2] == found[3] == {1: ["c", "d", "e", "f\0g"]}
    assert torch.equal(views[0].group, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "answer, share, is_repeat",
    [
        ("2 + 2", 0.8, True),  # stands there whole
        ("what 2 2", 0.8, True),  # three of three words, in order
        ("2 is what", 0.3, True),  # in order the question has one word of three
        ("2 is what", 0.5, False),
        ("four", 0.8, False),
    ],
)
def test_answers_that_repeat_the_question(answer, share, is_repeat):
    assert repeats("What is 2 + 2?", answer, share) == is_repeat


def test_the_common_words_are_those_of_the_table():
    """The table of Wagner and Fischer, cell by cell."""
    draw = random.Random(0)
    for _ in range(200):
        asked, said = (draw.choices("abcd", k=draw.randint(1, 12)) for _ in range(2))
        table = [[0] * (len(asked) + 1)]
        for word in said:
            row = [0]
            for at, other in enumerate(asked):
                row.append(table[-1][at] + 1 if word == other else max(row[-1], table[-1][at + 1]))
            table.append(row)
        share, one = table[-1][-1] / len(said), 1 / len(said)
        question, answer = " ".join(asked), " ".join(said)
        if answer not in question:
            assert not repeats(question, answer, share) and repeats(question, answer, share - one / 2)


def test_long_answers_are_compared_with_long_questions_quickly():
    question, answer = (" ".join(str(i * step) for i in range(5000)) for step in (2, 3))
    start = time.perf_counter()
    # multiples of 6 below 10,000: 1,667 of the 5,000 words
    assert repeats(question, answer, 0.333) and not repeats(question, answer, 0.334)
    assert time.perf_counter() - start < 2  # 2 x 25 million cells one by one took 5 s


@pytest.mark.parametrize(
    ("answer", "text", "stands"),
    [
        ("400", "1,400 in all", False), ("4", "4,500 in all", False), ("5", "it is .5", False), ("4", "of 3,4", True),
        ("4", "(4,5)", True), ("400", "400, 500", True), ("1,400", "1,400 in all", True), ("4", "so 4.", True),
        ("4", "4.50", False), ("4", "24", False), ("500", "4,500", False), ("4500", "it is 4500", True),
        ("4", "the answer is...4", True),
    ],
)  # fmt: skip
def test_an_answer_as_a_whole(answer: str, text: str, stands: bool):
    assert bool(as_whole(answer).search(text)) == stands


def test_dollars_and_full_stops_in_any_order():
    assert normalised("$5$.") == normalised("$5$") == normalised("$5.$") == "5"


def test_parts_of_a_message_without_text():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "4"}, {"type": "image"}]
    assert final_text([{"role": "user", "content": parts}]) == "4"
