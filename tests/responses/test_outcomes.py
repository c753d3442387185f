import itertools
import math
import random
from collections import Counter

import pytest

from hclm_rl.responses.outcomes import answer_entropy, distinct_correct, maj_at_k, pass_at_k

# The worked example: 8 samples, C is the right answer
EIGHT = ["C"] * 3 + ["a"] * 4 + ["b"]


def test_pass_at_k_of_two_right_among_eight():
    # 1 - C(6,k)/C(8,k): 1 - 6/8; 1 - 15/28 = 13/28; 1 - 15/70 = 55/70; 6 wrong ones cannot fill 8 places
    assert pass_at_k(8, 2, 1) == pytest.approx(0.25)
    assert pass_at_k(8, 2, 2) == pytest.approx(13 / 28)
    assert pass_at_k(8, 2, 4) == pytest.approx(55 / 70)
    assert pass_at_k(8, 2, 8) == 1.0
    assert pass_at_k(8, 0, 8) == 0.0


def test_pass_at_k_of_five_right_among_eight():
    # 5/8; 1 - C(3,2)/C(8,2) = 1 - 3/28 = 25/28; three wrong ones cannot fill 4 places
    assert [pass_at_k(8, 5, k) for k in (1, 2, 4, 8)] == pytest.approx([5 / 8, 25 / 28, 1, 1])


def test_pass_at_k_stays_finite_for_thousands_of_samples():
    # one right among n: the chance to draw it is k/n
    assert pass_at_k(16384, 1, 8192) == pytest.approx(0.5)


def test_maj_of_the_worked_example():
    # maj@1 = 3/8. maj@3 of 56 draws: >= 2 C: C(3,2)*5 + 1 = 16 win; C,a,b all different: 3*4*1 = 12 draws score 1/3:
    # (16 + 4) / 56. maj@8: a has four votes.
    assert maj_at_k(EIGHT, {"C"}, 1) == pytest.approx(3 / 8)
    assert maj_at_k(EIGHT, {"C"}, 3) == pytest.approx(20 / 56)
    assert maj_at_k(EIGHT, {"C"}, 8) == 0.0


def test_unread_answers_never_win_a_vote():
    # two NA, one right: maj@3 has the one vote of x; of the 3 pairs, two hold x
    assert maj_at_k([None, None, "x"], {"x"}, 3) == 1.0
    assert maj_at_k([None, None, "x"], {"x"}, 2) == pytest.approx(2 / 3)
    assert maj_at_k([None, None], {"x"}, 2) == 0.0


def test_a_tie_with_two_right_answers_scores_their_share():
    # x, y right, z wrong, one vote each
    assert maj_at_k(["x", "y", "z"], {"x", "y"}, 3) == pytest.approx(2 / 3)


def maj_by_drawing_every_subset(answers, correct, k):
    scores = []
    for draw in itertools.combinations(answers, k):
        votes = Counter(answer for answer in draw if answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        scores.append(sum(answer in correct for answer in top) / len(top) if top else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(6))
def test_maj_agrees_with_every_subset(seed):
    source = random.Random(seed)
    answers = source.choices(["r", "s", "u", "v", "w", None], weights=[3, 1, 2, 1, 1, 2], k=9)
    for k in range(1, 10):
        assert maj_at_k(answers, {"r", "s"}, k) == pytest.approx(maj_by_drawing_every_subset(answers, {"r", "s"}, k))


def test_maj_stays_exact_where_the_number_of_draws_leaves_float64():
    # C(20000, 150) is about 1e383; x has at most one vote of 150, so y always wins
    assert maj_at_k(["y"] * 19999 + ["x"], {"y"}, 150) == pytest.approx(1.0)


def test_answer_entropy_of_the_worked_example():
    # split into right and wrong: h_b(3/8) + 5/8 * H(4/5, 1/5) = 0.661563 + 0.625 * 0.500402
    assert answer_entropy(EIGHT) == pytest.approx(0.974315, abs=1e-6)  # six digits in the source


def test_unread_answers_are_one_class_in_the_entropy():
    assert answer_entropy([None, None, "x", "x"]) == pytest.approx(math.log(2))
    assert answer_entropy(["x"] * 5) == 0.0


def test_distinct_correct_counts_right_answers_once():
    assert distinct_correct(["1", "1", "2", "3", None], {"1", "3", "9"}) == 2


def test_bad_input_is_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match=r"k must be in \[1, n\] = \[1, 8\].*got 9"):
        pass_at_k(8, 2, 9)
    with pytest.raises(ValueError, match="got c=9 with n=8"):
        pass_at_k(8, 9, 1)
    with pytest.raises(ValueError, match="got 0"):
        maj_at_k(EIGHT, {"C"}, 0)
    with pytest.raises(ValueError, match="at least one sample"):
        answer_entropy([])


def test_a_bare_string_is_not_taken_for_a_set_of_answers():
    # with the type checks of the suite on, those refuse first, with their own exception
    with pytest.raises(Exception, match=r"set of answers|Type-check error"):
        maj_at_k(EIGHT, "C", 1)
