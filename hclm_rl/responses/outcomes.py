"""What the sampled answers to one prompt say: pass@k, maj@k, answer entropy, distinct right answers.

An answer is a canonical string; two answers are the same iff their strings are. None stands for a response from which
no answer could be read ("NA"). Whether an answer is right must be a function of the answer, not of the response.
Definitions: docs of pass@k (Chen et al., 2021, arXiv:2107.03374) and of answer entropy (arXiv:2507.14843).
"""

import math
from collections import Counter
from collections.abc import Sequence, Set

import numpy as np

Answers = Sequence[str | None]
FLOAT64_HOLDS = 1e300  # its largest number is 1.8e308


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that k of n samples, drawn without replacement, hold one of c right ones.

    Unbiased for the chance that k fresh samples hold a right one; k must not exceed n.

    >>> pass_at_k(4, 1, 2)  # of the 6 pairs of 4 samples, 3 hold the one that is right
    0.5
    """
    if not 0 <= c <= n:
        raise ValueError(f"c (right samples) must be in [0, n], got c={c} with n={n}")
    _check_k(k, n)
    # where fewer than k are wrong, the factor i = k is 0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def maj_at_k(answers: Answers, correct: Set[str], k: int) -> float:
    """Expected correctness of the commonest answer among k of the n samples, drawn without replacement.

    `correct` holds the right answers (of a problem with many, those that occur in the sample are enough). NA never
    wins a vote; a draw of nothing but NA scores 0. A tie of m answers, r of them right, scores r / m.
    By counting the draws: for each top count t, ways[s, m] is the number of draws of s samples in which no
    answer occurs more than t times and m answers exactly t times, and right_ways[s, m] the same summed over r.
    Answers that occur fewer than t times among the n cannot tie: they are drawn as one heap.
    Cost at most about n k^2; for the k <= 64 and n <= 256 of an evaluation, milliseconds.

    >>> f'{maj_at_k(["4", "4", "5"], {"4"}, 1):.3f}'  # two of the three draws are right
    '0.667'
    >>> f'{maj_at_k(["4", "4", "5"], {"4"}, 3):.3f}'
    '1.000'
    """
    _check_correct(correct)
    n = len(answers)
    _check_k(k, n)
    counts = Counter(answers)
    unread = counts.pop(None, 0)
    score = 0.0
    # sums of positive numbers, so float64 is as good as exact; Python's integers where it would overflow
    number = np.float64 if k * math.comb(n, min(k, n // 2)) < FLOAT64_HOLDS else object
    for t in range(1, min(k, max(counts.values(), default=0)) + 1):
        heap = unread + sum(count for count in counts.values() if count < t)
        often = {answer: count for answer, count in counts.items() if count >= t}
        ways, right_ways = both = np.zeros((2, k + 1, min(k // t, len(often)) + 1), dtype=number)
        ways[: heap + 1, 0] = [math.comb(heap, j) for j in range(min(heap, k) + 1)]
        for answer, count in often.items():
            before = both.copy()
            for j in range(1, t):
                both[:, j:] += math.comb(count, j) * before[:, :-j]
            top = math.comb(count, t) * before[:, :-t, :-1]
            both[:, t:, 1:] += top
            if answer in correct:
                right_ways[t:, 1:] += top[0]
        score += sum(right_ways[k, m] / (m * math.comb(n, k)) for m in range(1, ways.shape[1]))
    return score


def answer_entropy(answers: Answers) -> float:
    """-sum_j p_j log p_j in nats, p_j = share of distinct answer j among the samples; all NA are one answer.

    Biased low by about (number of distinct answers - 1) / (2n): compare at equal n only. Refuses no sample.
    """
    if not answers:
        raise ValueError("answers must hold at least one sample, got none")
    n = len(answers)
    return sum(count / n * math.log(n / count) for count in Counter(answers).values())


def distinct_correct(answers: Answers, correct: Set[str]) -> int:
    """Number of different right answers among the samples; grows with n, so compare at equal n only."""
    _check_correct(correct)
    return len({answer for answer in answers if answer in correct})


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, n] = [1, {n}] (samples at hand), got {k}")


def _check_correct(correct: Set[str]) -> None:
    if not isinstance(correct, Set):
        raise TypeError(f"correct must be a set of answers, such as {{'42'}}, got {type(correct).__name__}")
