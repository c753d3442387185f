"""The verdict, on distributions where the truth is known."""

import numpy as np
import pytest

from hclm_rl.evaluation.compare import Samples, budgets, compare, majority_curve, measure, wrong_entropies
from hclm_rl.evaluation.verdict import Criteria, judge
from hclm_rl.responses.outcomes import maj_at_k

from .simulated import collapsed, draw, improved, spread


def sampled(problem: str, answers: str, right: str = "C", **more: float) -> Samples:
    return Samples(problem=problem, answers=tuple(answers), is_right=tuple(a in right for a in answers), **more)


def kinds(evaluations: int, *, truth: str, n: int = 64, problems: int = 100) -> list[str]:
    """Verdicts of many evaluations, each with problems and samples of its own."""
    found = []
    for seed in range(evaluations):
        rng = np.random.default_rng(seed)
        base = spread(problems, rng)
        trained = {"same": base, "collapsed": collapsed(base, power=3), "improved": improved(base, share=0.4)}[truth]
        criteria = Criteria(resamples=2000)  # a fifth of the default: bounds move by about 2 % of their width
        found.append(judge(draw(base, n, rng), draw(trained, n, rng), criteria=criteria, seed=seed).kind)
    return found


def test_budgets():
    assert [budgets(n) for n in (1, 2, 8, 12)] == [[1], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_measures_of_the_worked_example():
    found = measure([sampled("one", "CCCaaaab")])
    # 3 of 8: 1 - C(5,2)/C(8,2) = 18/28, 1 - C(5,4)/C(8,4) = 65/70
    assert [found[f"pass@{k}"][0] for k in (1, 2, 4, 8)] == pytest.approx([3 / 8, 18 / 28, 65 / 70, 1.0])
    assert found["avg@8"][0] == 3 / 8 and found["maj@8"][0] == 0.0
    assert found["answer_entropy"][0] == pytest.approx(0.974315, abs=5e-7)
    assert found["wrong_entropy"][0] == pytest.approx(0.500402, abs=5e-7)


def test_votes_of_many_answers_are_those_of_the_exact_count():
    answers = list("C" * 30 + "a" * 34 + "b" * 6) + [None] * 10
    found = majority_curve(answers, {"C"})
    for k in (1, 2, 8, 32, 64):
        # a share of 1,000 draws has a standard error of at most 0.016
        assert found[k] == pytest.approx(maj_at_k(answers, {"C"}, k), abs=0.05)
    assert found[80] == 0.0
    assert set(majority_curve([None] * 65, {"C"}).values()) == {0.0}


def test_a_comparison_pairs_problems():
    base = [sampled("one", "CCaa"), sampled("two", "aabb"), sampled("three", "CCCC")]
    trained = [sampled("one", "CCCC"), sampled("two", "Caaa"), sampled("three", "CCCa")]
    found = compare(base, trained)
    assert found.change["pass@1"].mean == pytest.approx((0.5 + 0.25 - 0.25) / 3)
    assert (found.support.kept, found.support.gained) == (2, 1)
    total = found.change["answer_entropy"].mean
    assert found.sharpening.mean + found.diversity.mean == pytest.approx(total)


@pytest.mark.parametrize(
    ("trained", "sentence"),
    [
        ([sampled("two", "CCaa")], "the same problems, in the same order"),
        ([sampled("one", "CCa")], "equally many responses per problem, got 4 and 3"),
    ],
)
def test_what_cannot_be_paired_is_refused(trained: list[Samples], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        judge([sampled("one", "CCaa")], trained)


def signals(base: list[Samples], trained: list[Samples]) -> dict[str, bool | None]:
    return {signal.name: signal.is_given for signal in judge(base, trained).signals}


def test_each_signal_alone_is_a_warning():
    # 10 solid problems, 10 that the base solves once in 8 and the trained one never: 10 lost of 10, p = 2 / 1024
    base = [sampled(str(i), "CCCCCaab" if i < 10 else "Caaabbcc") for i in range(20)]
    lost = [sampled(str(i), "CCCCCaab" if i < 10 else "aaaabbcc") for i in range(20)]
    assert signals(base, lost) == {
        "sharpened": False,  # pass@1 falls too
        "support loss": True,
        "answer collapse": False,
        "masked collapse": None,
    }
    assert judge(base, lost).kind == "warning"
    poorer = [sampled(str(i), "CCCCCaaa" if i < 10 else "Caaaaaaa") for i in range(20)]
    verdict = judge(base, poorer)
    assert (verdict.given, verdict.kind) == (["answer collapse"], "warning")


def test_better_at_one_try_and_no_worse_at_many_is_not_sharpened():
    # pass@1 rises by a quarter on every problem, pass@8 is 1 before and after
    base, better = ([sampled(str(i), answers) for i in range(20)] for answers in ("CCaabbcc", "CCCCabcd"))
    assert signals(base, better)["sharpened"] is False
    # three of four problems go from 6/8 to 1, the fourth from 1/8 to none: pass@1 + 5/32, pass@8 - 1/4
    base = [sampled(str(i), "CCCCCCaa" if i % 4 else "Caaaaaaa") for i in range(40)]
    sharp = [sampled(str(i), "CCCCCCCC" if i % 4 else "aaaaaaaa") for i in range(40)]
    assert signals(base, sharp)["sharpened"] is True


def test_a_few_problems_lost_are_no_support_loss():
    # 2 gained and 5 lost: p = 0.45, as noise alone would have it
    base = [sampled(str(i), "Cab" if 2 <= i < 7 else "aab") for i in range(9)]
    trained = [sampled(str(i), "Cab" if i < 2 else "aab") for i in range(9)]
    assert signals(base, trained)["support loss"] is False


def test_sharpened_and_answer_collapse_is_collapsed():
    base = [sampled(str(i), "CCCCCaab" if i < 10 else "Caaabbcc") for i in range(20)]
    sharp = [sampled(str(i), "CCCCCCCC" if i < 10 else "aaaaaaaa") for i in range(20)]
    verdict = judge(base, sharp)
    assert (verdict.given, verdict.kind) == (["sharpened", "support loss", "answer collapse"], "collapsed")


def test_masked_collapse_needs_comparable_token_entropies():
    base = [sampled(str(i), "CCab", token_entropy=0.2) for i in range(8)]
    trained = [sampled(str(i), "CCCC", token_entropy=0.3) for i in range(8)]
    assert signals(base, trained)["masked collapse"] is True
    [*_, masked] = judge(base, trained, same_tokenizer=False).signals
    assert masked.is_given is None and "different tokenizers" in masked.because
    lower = [sampled(str(i), "CCCC", token_entropy=0.1) for i in range(8)]
    assert signals(base, lower)["masked collapse"] is False


def test_higher_accuracy_alone_is_not_answer_collapse():
    """Few wrong answers have a low entropy by being few: at equal number they are as diverse as before."""
    rng = np.random.default_rng(0)
    base = np.column_stack([np.full(60, 0.05), np.full((60, 95), 0.01)])
    trained = improved(base, share=0.7)
    one, other = draw(base, 64, rng), draw(trained, 64, rng)
    plain = np.mean([each.split.wrong for each in other]) / np.mean([each.split.wrong for each in one])
    before, after = wrong_entropies(one, other, easy=0.8).mean(axis=1)
    assert plain < 0.75  # what counting without rarefying would have taken for a loss of diversity
    assert after / before == pytest.approx(1, abs=0.02)


def test_identical_models_are_hardly_ever_called_collapsed():
    assert kinds(40, truth="same").count("collapsed") == 0
    assert kinds(40, truth="same", n=8, problems=20).count("collapsed") == 0


def test_a_better_model_is_not_called_collapsed():
    assert kinds(20, truth="improved").count("collapsed") == 0


def test_a_collapsed_model_is_found():
    assert kinds(20, truth="collapsed").count("collapsed") >= 19


@pytest.mark.slow
def test_error_rates_over_a_thousand_evaluations():
    same, small = kinds(1000, truth="same"), kinds(1000, truth="same", n=8, problems=20)
    better, poorer = kinds(1000, truth="improved"), kinds(1000, truth="collapsed")
    for name, found in {"same": same, "same, small": small, "improved": better, "collapsed": poorer}.items():
        print(name, {kind: found.count(kind) for kind in ("healthy", "warning", "collapsed")})
    assert max(same.count("collapsed"), small.count("collapsed"), better.count("collapsed")) <= 10
    assert poorer.count("collapsed") >= 950
