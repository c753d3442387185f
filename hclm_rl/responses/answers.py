"""What a response answers and which answers are the same, for terms that compare the responses of a group.

A rule that finds the answer is named in a recipe: a regular expression with one group (the last match counts), or the
dotted path of a function `text -> answer`, None where there is none. Answers are compared as text.
"""

import functools
import importlib.util
import logging
import re
from collections.abc import Callable, Sequence

import regex
import torch

from ..types import Rollout
from .limits import OverLimits
from .mathematics import equal
from .names import find_function
from .readers import after_thought, boxed, has_box, minus_signs

DEFAULT = "hclm_rl.answers.boxed_or_numbers"
LATEX_TYPOGRAPHY = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|(?<!\\)\\[!,;:]|(?<=\d)\{,\}(?=\d)")
PATTERN_SECONDS = 1.0  # for one response

Extract = Callable[[str], str | None]
Same = Callable[[str, str], bool]


def final_text(said: str | Sequence[dict]) -> str:
    """The text of a prompt or completion: itself, or the last message of a chat, without images and tool calls."""
    if isinstance(said, str):
        return said
    content = said[-1].get("content") if said else ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return content or ""


def own_last_words(completion: Sequence[dict]) -> str:
    """The text of a conversation's last turn; empty where a tool had the last word."""
    return final_text(completion) if completion and completion[-1].get("role") == "assistant" else ""


def boxed_or_numbers(text: str) -> str | None:
    r"""What is in the last \boxed{...}; without one the whole text, if it is nothing but whole numbers, as a row of
    coins and remainders of the task `coins` is: two such rows that are both right agree iff they pay the same coins."""
    said = after_thought(text)
    if has_box(said):
        return boxed(said)
    words = minus_signs(said).split()
    return " ".join(words) if words and all(re.fullmatch(r"-?[0-9]+", word) for word in words) else None


def extractor(how: str) -> Extract:
    """The rule of that name; raises one sentence where it is none."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", how):
        return checked(how, find_function(how, "function that finds answers"))
    try:
        re.compile(how)  # the syntax is that of `re`, the clock that of `regex`
        pattern = regex.compile(how)
    except (re.error, regex.error) as error:
        raise ValueError(f"answer is no regular expression ({error}) and no dotted path, got {how!r}") from error
    if pattern.groups != 1:
        raise ValueError(f"answer must have one group, which holds the answer, got {how!r} with {pattern.groups}")

    def last_match(text: str) -> str | None:
        try:
            found = pattern.findall(text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            logging.getLogger(__name__).warning(
                "the answer pattern %r was stopped after %g s on a response of %d characters, which counts as without "
                "an answer",
                how,
                PATTERN_SECONDS,
                len(text),
            )
            return None
        return found[-1] if found else None

    return last_match


def checked(name: str, find: Callable[[str], object]) -> Extract:
    """A stranger's function, which must return text or None."""

    @functools.wraps(find)
    def text_or_none(text: str) -> str | None:
        found = find(text)
        if found is None or isinstance(found, str):
            return found
        raise ValueError(f"answer function '{name}' must return text or None, got {type(found).__name__} {found!r:.80}")

    return text_or_none


def normalised(answer: str) -> str:
    """Without what does not change its meaning: space runs, dollar signs around it, a full stop, LaTeX typography, the
    parentheses of a choice (C); with the hyphen for every minus sign."""
    answer = LATEX_TYPOGRAPHY.sub("", minus_signs(answer)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    answer = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", answer)
    answer = " ".join(answer.split()).removesuffix(".").strip("$").removesuffix(".").strip()
    return re.sub(r"^\(([A-Z])\)$", r"\1", answer)


def answer_of(said: str | Sequence[dict], extract: Extract) -> str | None:
    """The normalised answer of a completion; None where there is none, it is empty or a tool had the last word."""
    found = extract(said if isinstance(said, str) else own_last_words(said))
    return None if found is None else normalised(found) or None


def as_whole(answer: str) -> re.Pattern[str]:
    """Finds the answer where it is not part of a longer word or number: 4 neither in 24 nor in 4.5, .4 or 4,500."""
    before = r"(?<!\w)(?<!(?<!\.)\.)" if answer[:1].isalnum() else ""
    if re.match(r"\d{3}(?!\d)", answer):
        before += r"(?<!\d,)"
    after = r"(?!\w|\.\d|,\d{3}(?!\d))" if answer[-1:].isalnum() else ""
    return re.compile(before + re.escape(answer) + after)


def equivalence(name: str) -> Same:
    """ "text": equal normalised answers. "math_verify": equal as mathematics; what takes too long is not equal.

    Refuses "math_verify" where that package is missing.
    """
    if name == "text":
        return lambda a, b: a == b
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("equivalence 'math_verify' needs a package that is missing: pip install 'hclm-rl[eval]'")
    return same_in_mathematics


@functools.lru_cache(maxsize=65536)
def same_in_mathematics(first: str, second: str) -> bool:
    """What goes over the limits is the same as its own text alone. Each answer meets a 1 before it meets others, so
    that one which cannot be computed with costs its time once and not once for each of the group."""
    if first == second:
        return True
    if not (can_be_compared(first) and can_be_compared(second)):
        return False
    try:
        return equal(first, second)
    except OverLimits:
        return False


@functools.lru_cache(maxsize=65536)
def can_be_compared(answer: str) -> bool:
    try:
        equal("1", answer)
    except OverLimits as error:
        logging.getLogger(__name__).warning(
            "the answer %.60r went over the limits of judging (%s): it equals nothing but its own text", answer, error
        )
        return False
    return True


def clusters(answers: Sequence[str | None], same: Same) -> list[int]:
    """The number of each answer's cluster: it joins the first whose first member it equals, else it opens the next.

    A missing answer is a cluster of its own, so that "no answer" is never what most responses agree on.
    """
    numbers: list[int] = []
    founders: list[str | None] = []
    for answer in answers:
        joins = (n for n, first in enumerate(founders) if first is not None and answer is not None)
        number = next((n for n in joins if same(founders[n] or "", answer or "")), len(founders))
        if number == len(founders):
            founders.append(answer)
        numbers.append(number)
    return numbers


def by_group(rollout: Rollout, extract: Extract) -> dict[int, list[str | None]]:
    """The answers to each prompt that has responses on this process: {number of the prompt: those of all its group}."""
    answers, size = of_everyone(rollout, extract), rollout.group_rewards.size(1)
    return {group: answers[group * size : (group + 1) * size] for group in rollout.group.unique().tolist()}


def of_everyone(rollout: Rollout, extract: Extract) -> list[str | None]:
    """The answers of the responses of all processes, which come as bytes through `everywhere`."""
    own = [answer_of(text, extract) for text in rollout.texts]
    encoded = [b"" if answer is None else answer.encode(errors="replace") for answer in own]
    device = rollout.mask.device
    lengths = torch.tensor([-1 if a is None else len(code) for a, code in zip(own, encoded, strict=True)])
    width = max(1, *map(len, encoded))
    codes = torch.tensor([list(code.ljust(width, b"\0")) for code in encoded], dtype=torch.uint8)
    all_lengths = rollout.everywhere(lengths.to(device)).tolist()
    rows = rollout.everywhere(codes.to(device)).cpu().numpy()
    return [None if n < 0 else bytes(row[:n]).decode() for n, row in zip(all_lengths, rows, strict=True)]


def repeats(question: str, answer: str, share: float) -> bool:
    """Whether more than `share` of the answer's words stand in the question, in order, or all of it stands there.

    The first is ROUGE-L precision: the longest common subsequence of words over the words of the answer.
    """
    if answer.lower() in question.lower():
        return True
    asked, said = (re.findall(r"\w+", text.lower()) for text in (question, answer))
    # the longest common subsequence, 64 cells of its table at a time: the zeros in `row` are the steps up in the row
    # (Hyyro, 2004, "Bit-parallel LCS-length computation revisited")
    places: dict[str, int] = {}
    for at, word in enumerate(asked):
        places[word] = places.get(word, 0) | 1 << at
    row = full = (1 << len(asked)) - 1
    for word in said:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    common = len(asked) - row.bit_count()
    return bool(said) and common / len(said) > share
