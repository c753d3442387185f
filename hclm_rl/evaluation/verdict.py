"""Has training cost diversity? Four signals on paired samples, and what they come to.

The signals' quantities are those of arXiv:2507.14843; thresholds and verdict are this library's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from hclm_rl.responses.outcomes import answer_entropy, pass_at_k

from .compare import Samples, check_pairs, samples_of, support_of, wrong_entropies
from .statistics import RESAMPLES, Support, interval

Kind = Literal["healthy", "warning", "collapsed"]
NARROWED = {"sharpened", "support loss"}  # with an answer collapse they are a collapse of the answers


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """When a signal is given."""

    confidence: float = 0.95  # of the bootstrap intervals over problems
    resamples: int = RESAMPLES
    significance: float = 0.05  # of McNemar's test
    wrong_entropy_fall: float = 0.3  # share of H_wrong that must be lost, in (0, 1)
    easy: float = 0.8  # accuracy above which a problem has too few wrong answers to speak of their diversity

    def __post_init__(self) -> None:
        for name in ("confidence", "significance", "wrong_entropy_fall", "easy"):
            if not 0 < (value := vars(self)[name]) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A sign of lost diversity, with its reason in numbers."""

    name: str
    is_given: bool | None  # None: could not be judged
    because: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of the answers. collapsed: (sharpened or support loss) and answer collapse. warning: any signal, but not those.

    Else healthy. What the words say, here and of the entropy: docs/words.md.
    """

    kind: Kind
    signals: tuple[Signal, ...]

    @classmethod
    def of(cls, signals: tuple[Signal, ...]) -> "Verdict":
        """The verdict that these signals come to."""
        given = {signal.name for signal in signals if signal.is_given}
        is_collapsed = "answer collapse" in given and given & NARROWED
        return cls(kind="collapsed" if is_collapsed else "warning" if given else "healthy", signals=signals)

    @property
    def given(self) -> list[str]:
        """Names of the signals that are given."""
        return [signal.name for signal in self.signals if signal.is_given]

    @property
    def said(self) -> str:
        """What it is said of, the word, and whether what could not be judged would have changed it."""
        unknown = [signal.name for signal in self.signals if signal.is_given is None]
        if "answer collapse" in unknown and NARROWED & set(self.given):
            return f"the answers: {self.kind}, and whether they collapsed is not known"
        if self.kind == "healthy" and unknown:
            return f"the answers: {self.kind}, as far as they were judged (not judged: {', '.join(unknown)})"
        return f"the answers: {self.kind}"


def judge(
    base: Sequence[Samples],
    trained: Sequence[Samples],
    *,
    criteria: Criteria | None = None,
    seed: int = 0,
    same_tokenizer: bool = True,
) -> Verdict:
    """The verdict on samples of both models for the same problems; `same_tokenizer`: else token entropies differ."""
    check_pairs(base, trained)
    criteria = criteria or Criteria()
    n = samples_of(base)
    rows = {
        "pass@1": [t.accuracy - b.accuracy for b, t in zip(base, trained, strict=True)],
        f"pass@{n}": [
            pass_at_k(n, sum(t.is_right), n) - pass_at_k(n, sum(b.is_right), n)
            for b, t in zip(base, trained, strict=True)
        ],
        "answer entropy": [
            answer_entropy(t.answers) - answer_entropy(b.answers) for b, t in zip(base, trained, strict=True)
        ],
    }
    values = np.array(list(rows.values()))
    bounds = interval(values, confidence=criteria.confidence, resamples=criteria.resamples, seed=seed)
    change = {
        name: (float(row.mean()), float(low), float(high))
        for name, row, low, high in zip(rows, values, *bounds, strict=True)
    }
    signals = (
        _sharpened(change, n),
        _support_loss(support_of(base, trained), criteria),
        _answer_collapse(base, trained, criteria),
        _masked_collapse(change["answer entropy"], base, trained, same_tokenizer),
    )
    return Verdict.of(signals)


def judge_curves(
    base: Float[np.ndarray, "K P"],
    trained: Float[np.ndarray, "K P"],
    *,
    most: int,
    support: Support | str,
    criteria: Criteria | None = None,
    seed: int = 0,
) -> Verdict:
    """The verdict on each problem's pass@1 to pass@`most`, where what was answered is not known.

    `support`: or why there is none.
    """
    criteria = criteria or Criteria()
    values = (trained - base)[[0, -1]]
    bounds = interval(values, confidence=criteria.confidence, resamples=criteria.resamples, seed=seed)
    changes = [(float(row.mean()), float(low), float(high)) for row, low, high in zip(values, *bounds, strict=True)]
    lost = Signal(name="support loss", is_given=None, because=str(support))
    unknown = "which answers were given is not known, only how many were right"
    return Verdict.of(
        (
            _sharpened({"pass@1": changes[0], f"pass@{most}": changes[1]}, most),
            _support_loss(support, criteria) if isinstance(support, Support) else lost,
            Signal(name="answer collapse", is_given=None, because=unknown),
            Signal(name="masked collapse", is_given=None, because=unknown),
        )
    )


def _written(change: tuple[float, float, float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*change)


def _sharpened(change: dict[str, tuple[float, float, float]], n: int) -> Signal:
    first, last = change["pass@1"], change[f"pass@{n}"]
    because = f"pass@1 {_written(first)}, pass@{n} {_written(last)}"
    if n == 1 or np.isnan(first[1]):
        return Signal(name="sharpened", is_given=None, because="needs two responses and two problems")
    return Signal(name="sharpened", is_given=first[1] > 0 and last[2] < 0, because=because)


def _support_loss(found: Support, criteria: Criteria) -> Signal:
    return Signal(
        name="support loss",
        is_given=found.lost > found.gained and found.mcnemar < criteria.significance,
        because=f"of the problems {found.lost} lost, {found.gained} gained, McNemar p = {found.mcnemar:.2g}",
    )


def _answer_collapse(base: Sequence[Samples], trained: Sequence[Samples], criteria: Criteria) -> Signal:
    name = "answer collapse"
    pairs = wrong_entropies(base, trained, easy=criteria.easy)
    if not pairs.size or pairs[0].mean() == 0:
        return Signal(name=name, is_given=None, because="no problem has different wrong answers under the base")
    before, after = pairs.mean(axis=1)
    fall = 1 - after / before
    problems = pairs.shape[1]
    because = (
        f"entropy among wrong answers {before:.3f} -> {after:.3f} nats ({-100 * fall:+.0f} %) on {problems} problems"
    )
    return Signal(name=name, is_given=bool(fall > criteria.wrong_entropy_fall), because=because)


def _masked_collapse(
    answers: tuple[float, float, float], base: Sequence[Samples], trained: Sequence[Samples], same_tokenizer: bool
) -> Signal:
    name = "masked collapse"
    before, after = ([each.token_entropy for each in of] for of in (base, trained))
    if None in before or None in after:
        return Signal(name=name, is_given=None, because="the token entropy was not measured")
    if not same_tokenizer:
        return Signal(name=name, is_given=None, because="token entropies of different tokenizers are not comparable")
    tokens = float(np.mean(np.array(after, dtype=float) - np.array(before, dtype=float)))
    because = f"token entropy {tokens:+.3f}, answer entropy {_written(answers)} nats"
    return Signal(name=name, is_given=tokens >= 0 and answers[2] < 0, because=because)
