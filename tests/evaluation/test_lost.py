"""Which problems were lost, in which order, and what the page says to do."""

from pathlib import Path

import pytest

from hclm_rl.evaluation.compare import Samples
from hclm_rl.evaluation.lost import lost_problems, next_steps
from hclm_rl.evaluation.show import render
from hclm_rl.evaluation.statistics import Estimate
from hclm_rl.evaluation.verdict import Signal, Verdict


def samples(problem: str, answers: str, right: str) -> Samples:
    """A letter an answer; a dot is none."""
    said = tuple(None if each == "." else each for each in answers)
    return Samples(problem=problem, answers=said, is_right=tuple(each == right for each in said))


BASE = [samples("p1", "abac", "a"), samples("p2", "aaab", "a"), samples("p3", "bbbb", "a"), samples("p4", "abbb", "a")]
TRAINED = [
    samples("p1", "bb.c", "a"),
    samples("p2", "bbbb", "a"),
    samples("p3", "aaaa", "a"),
    samples("p4", "abbb", "a"),
]


def test_a_problem_is_lost_that_only_the_base_answers_right():
    first, second = lost_problems(BASE, TRAINED, {"p1": "What?", "p2": "x" * 500})
    # p3 was gained, p4 kept; of p2 the base had three right, of p1 two
    assert (first.problem, first.right, first.responses, len(first.prompt)) == ("p2", 3, 4, 400)
    assert (second.problem, second.prompt) == ("p1", "What?")
    assert second.was == [("a", 2)] and second.is_now == [("b", 2), ("no answer", 1), ("c", 1)]


def signals(**given: bool | None) -> Verdict:
    found = [Signal(name=name.replace("_", " "), is_given=is_given, because="") for name, is_given in given.items()]
    return Verdict.of(tuple(found))


def test_what_to_do_depends_on_the_signals():
    told = next_steps(signals(sharpened=True, answer_collapse=True), {}, 64)
    assert len(told) == 3 and "hold_coverage" in told[2] and "hotter" in told[0]
    assert "watch the next run" in next_steps(signals(masked_collapse=True), {}, 64)[0]
    assert next_steps(signals(sharpened=False), {}, 64) == ["Nothing to mend that these numbers show."]
    assert next_steps(signals(sharpened=None), {}, 8)[-1].startswith("Draw more responses (--samples 64)")
    cut = {"truncated": Estimate(mean=0.25, lower=0.2, upper=0.3)}
    assert next_steps(None, cut, 64)[0].startswith("25 % of the responses were cut off")


def test_a_lost_problem_is_text_on_the_page(tmp_path: Path):
    pytest.importorskip("jinja2")
    hostile = "</pre><script>alert(1)</script>\u202e"
    base = [Samples(problem=hostile, answers=("<b>", "c"), is_right=(True, False))]
    trained = [Samples(problem=hostile, answers=("<i>", "c"), is_right=(False, False))]
    curve = [Estimate(mean=0.5, lower=0.4, upper=0.6), Estimate(mean=0.7, lower=0.6, upper=0.8)]
    page = render(
        tmp_path / "page.html",
        curves={"base": curve, "trained": curve},
        ks=[1, 2],
        band="95 %",
        title="t",
        model="m",
        base="b",
        verdict=None,
        notes=[],
        skipped=[],
        columns=[],
        rows=[],
        settings="s",
        support="Problems.",
        lost=lost_problems(base, trained, {hostile: hostile}),
        more_lost=3,
        next_steps=["Do."],
        data="",
    ).read_text()
    assert "<script" not in page and "<b></code>" not in page and "\u202e" not in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page and "\\u202e" in page and "<code>&lt;b&gt;</code> (1)" in page
    assert "and 3 more, in report.json" in page and "<li>Do.</li>" in page
    # two k, each with a strip that says both curves
    assert page.count('class="at"') == 2 and page.count(">k = 2</tspan>") == 1 and page.count(">base 0.7</tspan>") == 1
