"""Few-shot arithmetic for real pretrained models, from reasoning-gym: Stojanovski et al., 2025, arXiv:2505.24760

A prompt is `shots` solved lines and an open one; the completion is the rest of the line, and the newline its end:

    6 * 2 = 12
    14 * 31 = 434
    7 * 8 =

Bare expressions, because small models answer the generators' full sentences with junk. The prompt ends with ` =`, not
with a space behind it: byte-level BPE attaches the space to what follows (` -2` is ` -` and `2`), so only then are the
prompt's tokens a prefix of the whole line's, for negative answers too. The model must end a completion at the newline:
see `hclm_rl.testbed.smollm2`.

One answer is right, so part of any gain can be the habit of giving the commonest one: report `constant_score` beside
pass@1.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset

from hclm_rl.testbed.task import Row, Task

PROBLEMS = ("sums", "products", "gcd")
MAX_COMPLETION_LENGTH = 8  # tokens; the longest right answer, a space, four digits and the newline, has 6
DRAWS_PER_ROW = 100  # after so many draws for each row asked for, the space of questions is taken to be too small

Key = tuple[str, int, int]
INTEGER = re.compile(r"-?[1-9][0-9]*|0")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its one answer."""

    expression: str  # such as "6 * 2"
    answer: str  # canonical: "12", "-3", "0"
    key: Key  # what is asked: operator and operands, sorted where their order does not matter


def make_task(  # long: a third is its docstring
    problem: str = "products",
    *,
    prompts: int = 400,
    eval_prompts: int = 50,
    shots: int = 2,
    seed: int = 0,
    max_digits: int | None = None,
    eval_split: Literal["validation", "test"] = "test",
) -> Task:
    """Rows with `prompt`, `answer` and `question`, split by question, and the exact verifier as reward (1 or 0).

    problem: "sums" (two terms, + or -), "products" (two factors; both have the same number of digits), or "gcd" (two
    numbers of 1 to 30). max_digits: of an operand; 1 for sums and 2 for products unless given. Choose settings with
    eval_split "validation", report with "test": the questions differ, those of training are the same.

    The evaluation questions are all different, and neither they nor their mirror images (`2 * 6` for `6 * 2`) occur
    in training or in any prompt's shots. Training questions may repeat, with other shots: small spaces have fewer
    questions than `prompts` (one-digit sums 155, one-digit products 55). The shots are drawn from the training
    questions, without the row's own. Same arguments, same task; the test questions do not depend on `prompts` but for
    their shots.

    Refuses another split, and more held-out questions than there are.
    """
    _check(problem, prompts, eval_prompts, shots, max_digits)
    if eval_split not in ("validation", "test"):
        raise ValueError(f"eval_split must be validation or test, got {eval_split!r}")
    rng = random.Random(seed)
    # reasoning-gym draws question i from `seed + i`, so neighbouring seeds would share their questions
    drawn = _draw(problem, max_digits, rng.getrandbits(32), draws=DRAWS_PER_ROW * (prompts + eval_prompts))
    training, held_out, validation = _split(drawn, prompts, eval_prompts, eval_split == "validation")
    examples = list({question.key: question for question in training}.values())
    measured = held_out if eval_split == "test" else validation
    if len(training) < prompts or len(examples) <= shots or len(measured) < eval_prompts:
        raise ValueError(
            f"{problem} has too few different questions for eval_prompts={eval_prompts} and shots={shots}: "
            f"lower them or raise max_digits"
        )

    return Task(
        train_dataset=Dataset.from_list([_row(question, examples, shots, rng) for question in training]),
        eval_dataset=Dataset.from_list([_row(question, examples, shots, rng) for question in measured.values()]),
        reward_funcs=[exact_answer],
        answer=read_answer,
        is_correct=is_correct,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )


def read_answer(row: Row, completion: str) -> str | None:
    """The integer on the completion's first line in canonical form; None for anything else there.

    Spaces around it are allowed; a plus sign, leading zeros, "-0", further words or another script's digits are not.
    """
    line = completion.split("\n", 1)[0].strip(" ")
    return line if INTEGER.fullmatch(line) else None


def is_correct(row: Row, completion: str) -> bool:
    """Whether the answer that stands in the completion is the right one."""
    return read_answer(row, completion) == row["answer"]


def exact_answer(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """TRL reward: 1 where the completion's first line is the right integer, else 0."""
    return [float(is_correct({"answer": right}, text)) for text, right in zip(completions, answer, strict=True)]


def constant_score(rows: Iterable[Row]) -> tuple[str, float]:
    """(answer, score) of always giving the commonest right answer of `rows`; of a tie, the one that occurs first."""
    counts = Counter(str(row["answer"]) for row in rows)
    [(answer, count)] = counts.most_common(1)
    return answer, count / counts.total()


def _check(problem: str, prompts: int, eval_prompts: int, shots: int, max_digits: int | None) -> None:
    if problem not in PROBLEMS:
        raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {problem!r}")
    if min(prompts, eval_prompts) < 1:
        raise ValueError(f"prompts and eval_prompts must be at least 1, got {prompts} and {eval_prompts}")
    if shots < 1:
        raise ValueError(f"shots must be at least 1 (without one the model cannot know the format), got {shots}")
    if max_digits is not None and (problem == "gcd" or max_digits not in (1, 2)):
        raise ValueError(f"max_digits must be 1 or 2, for sums and products only, got {max_digits} for {problem}")


def _split(
    drawn: Iterable[Question], prompts: int, eval_prompts: int, validates: bool
) -> tuple[list[Question], dict[Key, Question], dict[Key, Question]]:
    """(training, test, validation) as far as the draws suffice; no key in two of them."""
    held_out: dict[Key, Question] = {}
    validation: dict[Key, Question] = {}
    training: list[Question] = []
    seen: set[Key] = set()  # of test and training, once these are complete
    for question in drawn:
        if len(held_out) < eval_prompts:
            held_out.setdefault(question.key, question)
        elif len(training) < prompts:
            if question.key not in held_out:
                training.append(question)
        elif validates and len(validation) < eval_prompts:
            seen = seen or {each.key for each in training} | held_out.keys()
            if question.key not in seen:
                validation.setdefault(question.key, question)
        else:
            break
    return training, held_out, validation


def _draw(problem: str, max_digits: int | None, seed: int, draws: int) -> Iterator[Question]:
    """Seeded questions of reasoning-gym, in its own distribution, as bare expressions."""
    try:
        import reasoning_gym
    except ImportError:
        raise ImportError("The package reasoning-gym is missing: pip install 'hclm-rl[eval]'.") from None

    if problem == "gcd":
        source = reasoning_gym.create_dataset("gcd", min_value=1, max_value=30, seed=seed, size=draws)
    elif problem == "sums":
        digits = max_digits or 1
        source = reasoning_gym.create_dataset("chain_sum", max_terms=2, max_digits=digits, seed=seed, size=draws)
    else:
        digits = max_digits or 2
        source = reasoning_gym.create_dataset("products", max_digits=digits, seed=seed, size=draws)

    for entry in source:
        if problem == "gcd":
            left, right = entry["metadata"]["numbers"]
            operator, expression = "gcd", f"gcd({left}, {right})"
        else:
            expression = entry["metadata"]["expression"]
            first, operator, second = expression.split(" ")
            left, right = int(first), int(second)
        operands = (left, right) if operator == "-" else (min(left, right), max(left, right))
        yield Question(expression=expression, answer=entry["answer"], key=(operator, *operands))


def _row(question: Question, examples: list[Question], shots: int, rng: random.Random) -> dict[str, str]:
    # one more than needed, so that the row's own question can be left out
    drawn = [example for example in rng.sample(examples, shots + 1) if example.key != question.key][:shots]
    lines = [f"{example.expression} = {example.answer}\n" for example in drawn]
    prompt = "".join(lines) + f"{question.expression} ="
    return {"prompt": prompt, "answer": question.answer, "question": question.expression}
