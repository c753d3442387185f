"""Which answers are read whole, which are the same, and what they are called; expectations read off by eye."""

import time

import pytest

pytest.importorskip("math_verify")

from hclm_rl.responses import mathematics
from hclm_rl.responses.limits import OverLimits
from hclm_rl.responses.mathematics import canonical, equal, is_same, judged, name_of, read, reference


def name(answer: str) -> str:
    return name_of(read(answer))


@pytest.mark.parametrize(
    ("gold", "whole", "part"),
    [
        ("1331 and 1728", r"1331 \text{ and } 1728", "1728"),
        ("1331 and 1728", "1728, 1331", "1331"),
        ("12 and 345", "345 and 12", "12345"),  # no thousands
        ("1, 2, and 3", "3,2,1", "3"),
        (r"x=1 \text{ or } x=2", "1, 2", "x=2"),
        ("3:30 p.m.", r"3:30 \text{ p.m.}", "30"),
        ("3:30 p.m.", "15:30", "3"),
        ("3:30", "3:30 am", "30"),
        (r"\sqrt{2} \text{ cm}", r"\sqrt{2}", "2"),
        ("3 1/2", r"3\frac{1}{2}", "2"),  # (3 + 1) / 2 to math-verify
        ("-2 1/3", r"-\frac{7}{3}", "-1"),
        ("2½", "5/2", "2"),
        (r"\log_2 8", r"\log_{2}{8}", "2"),
        ("3log_2 5", r"3\log_{2} 5", "25"),
        (r"\sin^2 3", r"(\sin 3)^{2}", r"\sin 3"),
        ("x^2 3", "x^2 3", "x^{23}"),
        ("3^2 100", "3^2 100", "3^{2100}"),
        ("log_10 100", "2", "0"),
        (r"\sin^2 100", r"(\sin 100)^2", r"\sin 100"),
        (r"2\sqrt 15", r"\sqrt{60}", "10"),
        ("1½x", "3x/2", "x/2"),
        ("2 3/4 x", "11x/4", "3x/2"),
        (r"12\frac{1}{2}\pi", r"\frac{25\pi}{2}", r"6\pi"),
        ("5 cm²", "5", "25"),
        ("30 km^{2}", "30", "900"),
        (r"\frac{1}{2} inches^3", "0.5", "3"),
        (r"\log_2 1 2", r"\log_2 1 2", r"\log_2 12"),
        ("10²", "100", "10"),
        ("2\N{MULTIPLICATION SIGN}10⁻³", "0.002", "2"),
        ("2√12", r"4\sqrt{3}", "2"),
        ("1 2", "1 2", "3"),
        ("3 4 5", "3 4 5", "12"),
        ("4~5", r"4 \, 5", "9"),
        ("1, 2, ..., 5", r"1,2,...,5", "5"),
        (r"1,2,\ldots,5", r"1, 2, \ldots, 5", "1,2,5"),
        ("5'6\"", "5'6\"", "56"),
        ("0x1F", "1F_{16}", "0"),
        ("1_000", "1000", "1"),
        ("2 R 3", "2 R 3", "6R"),
        ("1010_{two}", "1010_{two}", "1010"),
        ("5+", "5+", "5"),
        ("2xy+3z", "3z + 2yx", "3"),
        ("sqrt(2) + 1", r"1+\sqrt{2}", "1"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "2"),
        (r"0.\overline{3}", r"0.\overline{3}", "0"),
        (r"\lambda=2\sqrt{2}, A(\pm 1, 0)", r"\lambda = 2\sqrt{2}, A(\pm 1,0)", "0"),
        (r"f(x)=\left\{\begin{array}{cl} x & x>0 \\ 0 & x\le 0 \end{array}\right.",
         r"f(x)=\left\{\begin{array}{cl} x & x>0 \\ 0 & x\le 0 \end{array}\right.", "0"),
    ],
)  # fmt: skip
def test_a_reference_is_read_whole(gold: str, whole: str, part: str):
    assert reference(gold)[0] is not None
    assert is_same(read(gold), read(whole)) and not is_same(read(gold), read(part))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("7 hours 30 minutes", "holds several numbers among words, which are not compared as mathematics"),
        (r"7 \text{ hours } 30 \text{ minutes}", "holds several numbers among words"),
        ("10 to 12", "holds several numbers among words"),
        ("3点30分", "holds several numbers among words"),
        ("2 and a half", "holds several numbers among words"),
        ("10-12", "may be a range or a difference"),
        ("10\N{EN DASH}12", "may be a range or a difference"),
        ("2,000-3,000", "may be a range or a difference"),
        ("10-12 km", "holds several numbers among words"),
        ("3:30 and 4:15", "holds several numbers among words"),
        (r"\text{Evelyn}", "does not parse as mathematics"),
    ],
)
def test_a_reference_of_which_a_part_would_count_is_left_out(answer: str, why: str):
    found, said = reference(answer)
    assert found is None and said.startswith(why)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "\N{MINUS SIGN}5"), (r"12\,345", "12345"), ("12 345", "12,345"), ("12{,}345", "12345"), ("(C)", "C"),
        (r"\text{(C)}", r"\textbf{C}"), ("1010_2", "1010_{2}"), ("1010_2", "1010"),
        ("1f_{16}", "1F_{16}"),
        ("5 apples", "5"), ("$18 per day", r"\$18"), ("50 percent", "0.5"), (r"5 \text{ cm}^2", "5"),
        (r"\frac{1}{2} \text{ hours}", "0.5"), (r"x \in [-2,7]", "[-2, 7]"), ("3:30", "3:30"), ("1{:}2", "1/2"),
        ("5:12", r"\frac{5}{12}"), ("1,234 dollars", "1234"), (r"\text{Tuesday}", "Tuesday"), ("5 €", "5"),
        ("½", "0.5"), ("2·x", "2x"), ("12 345/2", "12345/2"), (r"\frac 1 2", "0.5"), ("(-∞, 3)", r"(-\infty,3)"),
        ("90°", r"90^\circ"), ("0b101", "101_2"), ("0o17", "17_8"), ("√x", r"\sqrt{x}"), ("√(2x)", r"\sqrt{2x}"),
        ("3\N{FRACTION SLASH}4", "3/4"), ("2000", "2e3"), ("0.00015", "1.5E-4"), ("-1e3 m", "-1000"),
    ],
)  # fmt: skip
def test_other_spellings_of_one_answer(one: str, other: str):
    assert is_same(read(one), read(other)), (read(one), read(other))


@pytest.mark.parametrize(
    "answers",
    [
        ("2+2=5", "1+1=3", "1<0", "x=x", "1<2<3"),  # all truth values
        (r"\frac{1}{0}", r"\frac{2}{0}", r"\frac{0}{0}", r"\log 0"),  # all zoo or nan
        (r"x \in [-2,7]", r"x \in \mathbb{Z}", r"x \in \mathbb{R}", "x = 1, 2"),  # all False
        ("3:30", "4:30", "3:30 p.m.", "30"),
        ("101_2", "101_3", "101"),
        ("1 2", "3", "2 1", "1.2.3", "3.2.1"),
        ("5:3:2", "10:12", "6:5:3"),
        ("10-12 km", "8-10 km"),
        ("3:30 and 4:15", "7:2 and 4:15"),
        ("7 hours 30 minutes", "8 hours 30 minutes", "7"),
        (r"\mathbb{R}", r"\mathbb{Q}", r"\emptyset"),
        ("(1,2]", "[1,2]", "(2,1]", "(3,1]"),  # the last two are empty
    ],
)
def test_different_answers_have_different_names(answers: tuple[str, ...]):
    assert len(set(map(name, answers))) == len(answers), [name(each) for each in answers]


def test_intervals_keep_one_name():
    assert name(r"(-\infty, 3) \cup (3, 4.5]") == name(r"(-\infty,3)\cup(3,\frac{9}{2}]")


def test_a_name_that_cannot_be_made_is_the_text():
    assert canonical([object, r"1 \, + 2"]) == "<class 'object'>"
    assert canonical(["", "text"]) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is (C).", ("c", True)),
        ("It is \N{MINUS SIGN}5", ("-5", False)),
        ("none", (None, False)),
    ],
)
def test_a_response_without_a_box(text: str, found: tuple):
    assert judged("(C)", text, False) == found


def test_equal_in_its_process():
    assert equal("1/2", "0.5") and not equal("1/2", "2")


@pytest.mark.parametrize("answer", ["1" * 1001, "1+" * 2000 + "1"])
def test_digits_and_length_have_a_limit(answer: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mathematics, "within_limits", None)  # nothing is computed
    with pytest.raises(OverLimits, match=r"more than (1000 digits|4000 characters)"):
        equal("1", answer)


def test_a_long_row_of_digits_is_read(monkeypatch: pytest.MonkeyPatch):
    start = time.perf_counter()
    assert equal("1" * 1000, "1" * 1000)
    assert time.perf_counter() - start < 20
