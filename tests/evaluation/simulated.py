"""Evaluations drawn from known answer distributions: no model, so the truth about collapse is known."""

import numpy as np

from hclm_rl.evaluation.compare import Samples

RIGHT = 0  # the first answer is the right one
Distributions = np.ndarray  # (problems, answers), rows sum to 1


def spread(problems: int, rng: np.random.Generator, *, accuracy: tuple[float, float] = (0.6, 2.0)) -> Distributions:
    """Accuracies from a Beta (mean 0.23 unless given, many near 0), the rest spread over 12 wrong answers."""
    p = rng.beta(*accuracy, size=problems)
    wrong = rng.dirichlet(np.ones(12), size=problems)
    return np.column_stack([p, (1 - p)[:, None] * wrong])


def collapsed(base: Distributions, *, power: float) -> Distributions:
    """base^power, normalised: each problem's likeliest answer takes over, right or wrong."""
    sharp = base**power
    return sharp / sharp.sum(axis=1, keepdims=True)


def improved(base: Distributions, *, share: float) -> Distributions:
    """`share` of the way to always right; the wrong answers keep their proportions."""
    right = np.zeros_like(base)
    right[:, RIGHT] = 1
    return (1 - share) * base + share * right


def draw(distributions: Distributions, n: int, rng: np.random.Generator, tokens: float = 0.5) -> list[Samples]:
    """n responses to each problem; the token entropy is `tokens` nats with noise."""
    drawn = []
    for i, (p, entropy) in enumerate(zip(distributions, rng.normal(tokens, 0.05, len(distributions)), strict=True)):
        answers = rng.choice(len(p), size=n, p=p)
        is_right = tuple(bool(answer == RIGHT) for answer in answers)
        drawn.append(
            Samples(
                problem=str(i),
                answers=tuple(str(answer) for answer in answers),
                is_right=is_right,
                token_entropy=float(entropy),
            )
        )
    return drawn
