"""From the judged samples of one model to its estimates, and from those of two to their change."""

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from hclm_rl.responses.outcomes import Answers, answer_entropy, distinct_correct, maj_at_k, pass_at_k

from .statistics import (
    EntropySplit,
    Estimate,
    Support,
    entropy_change,
    estimate,
    rarefied_entropy,
    support,
)

EXACT_VOTES, VOTE_DRAWS = 64, 1000


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A model's responses to one problem, judged. Whether one is right is a function of its answer."""

    problem: str
    answers: tuple[str | None, ...]  # canonical; None where none could be read
    is_right: tuple[bool, ...]
    token_entropy: float | None = None  # nats, mean over responses of the mean over their tokens
    length: float = float("nan")  # tokens, mean over responses
    truncated: float = float("nan")  # share of responses cut off at the limit

    def __post_init__(self) -> None:
        if not self.answers or len(self.answers) != len(self.is_right):
            raise ValueError(
                f"{self.problem}: answers and is_right must be equally long and not empty, "
                f"got {len(self.answers)} and {len(self.is_right)}"
            )

    @property
    def accuracy(self) -> float:
        """Share of right responses."""
        return sum(self.is_right) / len(self.is_right)

    @property
    def right(self) -> tuple[str | None, ...]:
        """The answers of the right responses."""
        return tuple(answer for answer, right in zip(self.answers, self.is_right, strict=True) if right)

    @property
    def wrong(self) -> tuple[str | None, ...]:
        """The answers of the wrong responses, None for one that could not be read."""
        return tuple(answer for answer, right in zip(self.answers, self.is_right, strict=True) if not right)

    @property
    def split(self) -> EntropySplit:
        """Accuracy and the entropies, in nats, among right and among wrong answers."""
        return EntropySplit(
            accuracy=self.accuracy,
            right=answer_entropy(self.right) if self.right else None,
            wrong=answer_entropy(self.wrong) if self.wrong else None,
        )


def budgets(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def samples_of(samples: Sequence[Samples]) -> int:
    """How many responses each problem has. Refuses problems with unequal numbers."""
    counts = {len(each.answers) for each in samples}
    if len(counts) != 1:
        raise ValueError(f"every problem needs the same number of responses, got {sorted(counts)}")
    return counts.pop()


def pass_curve(samples: Sequence[Samples]) -> Float[np.ndarray, "K P"]:
    """pass@k of each problem for k in `budgets`."""
    n = samples_of(samples)
    return np.array([[pass_at_k(n, sum(each.is_right), k) for each in samples] for k in budgets(n)])


def majority_curve(answers: Answers, right: Set[str]) -> dict[int, float]:
    """maj@k for k in `budgets`: exact up to 64 answers, above that the mean over 1,000 seeded draws."""
    n = len(answers)
    if n <= EXACT_VOTES:
        return {k: maj_at_k(answers, right, k) for k in budgets(n)}
    distinct = sorted({answer for answer in answers if answer is not None})
    place = {answer: i for i, answer in enumerate(distinct)}
    # a row a draw: the answers in a random order, unread ones in a last column that is then left out
    codes = np.array([len(distinct) if answer is None else place[answer] for answer in answers])
    orders = np.random.default_rng(0).permuted(np.tile(codes, (VOTE_DRAWS, 1)), axis=1)
    is_right = np.array([answer in right for answer in distinct], dtype=bool)
    found = {}
    for k in budgets(n):
        cells = np.arange(VOTE_DRAWS)[:, None] * (len(distinct) + 1) + orders[:, :k]
        counts = np.bincount(cells.ravel(), minlength=VOTE_DRAWS * (len(distinct) + 1)).reshape(VOTE_DRAWS, -1)[:, :-1]
        most = counts.max(axis=1, initial=1, keepdims=True)
        top = counts == most
        found[k] = float((top[:, is_right].sum(axis=1) / np.maximum(top.sum(axis=1), 1)).mean())
    return found


def measure(samples: Sequence[Samples]) -> dict[str, Float[np.ndarray, "P"]]:
    """Quantity -> its value on each problem; NaN where it is not defined."""
    n = samples_of(samples)
    rights = [{answer for answer in each.right if answer is not None} for each in samples]
    splits = [each.split for each in samples]
    found = {f"avg@{n}": [each.accuracy for each in samples]}
    found |= {f"pass@{k}": list(values) for k, values in zip(budgets(n), pass_curve(samples), strict=True)}
    votes = [majority_curve(each.answers, right) for each, right in zip(samples, rights, strict=True)]
    found |= {f"maj@{k}": [curve[k] for curve in votes] for k in budgets(n)[1:]}
    found["token_entropy"] = [np.nan if each.token_entropy is None else each.token_entropy for each in samples]
    found["answer_entropy"] = [answer_entropy(each.answers) for each in samples]
    found["wrong_entropy"] = [np.nan if split.wrong is None else split.wrong for split in splits]
    found["right_entropy"] = [np.nan if split.right is None else split.right for split in splits]
    found["distinct_right"] = [distinct_correct(e.answers, right) for e, right in zip(samples, rights, strict=True)]
    found["unanswered"] = [sum(answer is None for answer in each.answers) / n for each in samples]
    found["truncated"] = [each.truncated for each in samples]
    found["length"] = [each.length for each in samples]
    return {name: np.array(values, dtype=float) for name, values in found.items()}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A trained model beside its base, paired on problems."""

    base: dict[str, Estimate]
    trained: dict[str, Estimate]
    change: dict[str, Estimate]  # trained - base, on the problems where both are defined
    sharpening: Estimate  # the part of answer_entropy's change that accuracy makes
    diversity: Estimate  # the part that the entropies among right and among wrong answers make
    support: Support


def check_pairs(base: Sequence[Samples], trained: Sequence[Samples]) -> None:
    """A ValueError unless both answered the same problems in the same order, equally often."""
    if [each.problem for each in base] != [each.problem for each in trained]:
        raise ValueError("the two models must have answered the same problems, in the same order")
    if samples_of(base) != samples_of(trained):
        raise ValueError(
            f"the two models need equally many responses per problem, got {samples_of(base)} and {samples_of(trained)}"
        )


def estimates(samples: Sequence[Samples], *, seed: int = 0) -> dict[str, Estimate]:
    """Mean over problems and 95 % interval of every quantity of `measure`."""
    return {name: estimate(values, seed=seed) for name, values in measure(samples).items()}


def support_of(base: Sequence[Samples], trained: Sequence[Samples]) -> Support:
    """Problems that both, one or none of the two ever answers right."""
    hits = [np.array([any(each.is_right) for each in of]) for of in (base, trained)]
    return support(hits[0], hits[1], samples=samples_of(base))


def compare(base: Sequence[Samples], trained: Sequence[Samples], *, seed: int = 0) -> Comparison:
    """Means, their changes paired by problem, and support; intervals are 95 %, bootstrap over problems."""
    check_pairs(base, trained)
    before, after = measure(base), measure(trained)
    parts = np.array([entropy_change(one.split, other.split) for one, other in zip(base, trained, strict=True)])
    return Comparison(
        base={name: estimate(values, seed=seed) for name, values in before.items()},
        trained={name: estimate(values, seed=seed) for name, values in after.items()},
        change={name: estimate(after[name] - before[name], seed=seed) for name in before},
        sharpening=estimate(parts[:, 0], seed=seed),
        diversity=estimate(parts[:, 1], seed=seed),
        support=support_of(base, trained),
    )


def wrong_entropies(base: Sequence[Samples], trained: Sequence[Samples], *, easy: float) -> Float[np.ndarray, "2 M"]:
    """H_wrong of base and trained on the problems that neither solves more often than `easy`.

    Both at the size of the smaller set of wrong answers: a model with fewer of them would seem less diverse by that
    alone. Problems with fewer than two wrong answers say nothing.
    """
    pairs = []
    for one, other in zip(base, trained, strict=True):
        draws = min(len(one.wrong), len(other.wrong))
        if max(one.accuracy, other.accuracy) <= easy and draws >= 2:
            pairs.append([rarefied_entropy(each.wrong, draws) for each in (one, other)])
    return np.array(pairs, dtype=float).reshape(-1, 2).T
