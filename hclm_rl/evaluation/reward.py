"""The reward that `hclm-rl eval` judges by: 1 where a completion's answer is that of the data, else 0."""

import functools
import logging
from collections.abc import Sequence

from hclm_rl.responses.answers import final_text

from .math_judge import MathJudge

logger = logging.getLogger(__name__)

MOST_KEPT = 10_000  # judges, one an answer


@functools.lru_cache(maxsize=MOST_KEPT)
def judge_of(answer: str) -> MathJudge | None:
    """None, said once, where the data's answer cannot be read: its responses are not scored."""
    found = MathJudge.of(answer)
    if isinstance(found, str):
        logger.warning("right_answer scores no response to a prompt with this answer: %s", found)
        return None
    return found


def right_answer(
    completions: Sequence[str | list[dict]], answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    """One reward a completion, text or messages; `answer` is the column of the data, as `hclm-rl eval` reads it.

    A completion's answer is its last box, or what math-verify finds at its end; 0.5 and 1/2 are one answer.
    """
    judges = [judge_of(str(each)) for each in answer]
    return [
        None if judge is None else float(judge(final_text(completion))[1])
        for judge, completion in zip(judges, completions, strict=True)
    ]
