import math

import numpy as np
import pytest

from hclm_rl.evaluation.semantic import clusters, means_the_same, semantic_entropy, snne
from hclm_rl.responses.outcomes import answer_entropy

LOGPS = np.array([-0.2, -0.5, -0.3, -1.0])
SIMILARITY = np.array([[1, 0.9, 0.2], [0.9, 1, 0.1], [0.2, 0.1, 1]])


def test_the_worked_example_of_semantic_entropy():
    # p = [0.562464, 0.292356, 0.145180]
    assert semantic_entropy(LOGPS, [0, 0, 1, 2]) == pytest.approx(0.963357, abs=5e-7)
    assert answer_entropy(["0", "0", "1", "2"]) == pytest.approx(1.039721, abs=5e-7)
    assert semantic_entropy(np.full(4, -0.7), [0, 0, 1, 2]) == pytest.approx(answer_entropy(["0", "0", "1", "2"]))


def test_the_worked_example_of_snne():
    assert snne(SIMILARITY) == pytest.approx(-1.770804, abs=5e-7)
    assert snne(SIMILARITY, tau=0.1) == pytest.approx(-10.209106, abs=5e-7)
    assert snne(SIMILARITY, logps=LOGPS[:3]) == pytest.approx(-1.769718, abs=5e-7)


def test_the_ends_of_snne():
    for tau in (0.1, 1.0, 10.0):
        assert snne(np.ones((5, 5)), tau=tau) == pytest.approx(-math.log(5) - 1 / tau)
        assert snne(np.eye(5), tau=tau) == pytest.approx(-math.log(math.exp(1 / tau) + 4))


def test_texts_are_compared_with_the_first_of_a_cluster():
    near = {("a", "b"), ("b", "c")}  # c is like b, but b's cluster is a's, and c is not like a
    assert clusters("abcd", lambda one, other: (one, other) in near) == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("forward", "backward", "is_strict", "same"),
    [
        ("entailment", "entailment", True, True),
        ("entailment", "neutral", True, False),
        ("entailment", "neutral", False, True),
        ("neutral", "neutral", False, False),
        ("entailment", "contradiction", False, False),
    ],
)
def test_when_two_texts_mean_the_same(forward, backward, is_strict: bool, same: bool):
    assert means_the_same(forward, backward, is_strict=is_strict) is same


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        snne(SIMILARITY, tau=0)
    with pytest.raises(ValueError, match="a square matrix"):
        snne(SIMILARITY[:2])
    with pytest.raises(ValueError, match="equally long"):
        semantic_entropy(LOGPS, [0])
