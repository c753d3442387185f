"""Completions judged by math-verify against a reference answer, within limits."""

import importlib.util
import re
from dataclasses import dataclass
from decimal import Decimal

from hclm_rl.responses.limits import LENGTH, OverLimits, Unjudged
from hclm_rl.responses.mathematics import judged, reference
from hclm_rl.responses.readers import after_thought, boxed, has_box

LARGEST_EXPONENT = 400  # of a number that is written with one


@dataclass(frozen=True, kw_only=True)
class MathJudge:
    """Reads a completion's final answer with math-verify and compares it with the reference answer.

    The last box is read whole; without one, math-verify looks for an answer in the last LENGTH characters. Right
    answers all carry the reference's name, so 0.5 and 1/2 are one answer; wrong ones are told apart by their value,
    floats as fractions, or by their text.
    """

    reference: str
    name: str

    @classmethod
    def of(cls, answer: str) -> "MathJudge | str":
        """The judge, or what is wrong with the reference answer. Of GSM8K's answers the part after #### counts.

        Refuses to judge where math-verify is missing.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("math-verify is missing: pip install 'hclm-rl[eval]'")
        text = without_exponent(answer.rpartition("####")[2].strip())
        try:
            name, why = reference(text)
        except OverLimits as error:
            return f"the answer {answer[:60]!r} goes over the limits of judging ({error})"
        return f"the answer {answer[:60]!r} {why}" if name is None else cls(reference=text, name=name)

    @classmethod
    def reading(cls, answer: str) -> "MathJudge | None":
        """The judge of this reference, None where it cannot be read."""
        found = cls.of(answer)
        return None if isinstance(found, str) else found

    def __call__(self, completion: str) -> tuple[str | None, bool]:
        said = after_thought(completion)
        is_boxed = has_box(said)
        answer = boxed(said) if is_boxed else said[-LENGTH:]
        if not answer:
            return None, False
        try:
            return judged(self.reference, answer, is_boxed)
        except OverLimits:
            return Unjudged(answer), False


def without_exponent(answer: str) -> str:
    """5e-05, as Python writes small and large floats, as 0.00005: math-verify takes the e for a number of its own."""
    if not re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,4}", answer):
        return answer
    number = Decimal(answer)
    return format(number, "f") if abs(number.adjusted()) <= LARGEST_EXPONENT else answer
