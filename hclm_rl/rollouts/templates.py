"""Templates around a mathematics problem, after the kinds of Lu et al., 2026, arXiv:2602.03190; the wording is ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..responses.names import nearest_first

QUESTION = "{question}"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a problem is asked, and which marks its answer should bear.

    Args:
        name: of the template, which rewards and terms see as the column `template`
        system: what stands before all; empty: what the data set has
        user: around the problem, which stands where `{question}` is
        opener: the first words of the answer, given and not drawn: they are prompt
        once: what the answer should hold exactly once; empty: no mark is asked for
    """

    name: str
    system: str = ""
    user: str = QUESTION
    opener: str = ""
    once: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a template needs a name, got an empty one")
        if self.user.count(QUESTION) != 1:
            raise ValueError(f"template '{self.name}': user must hold {QUESTION} once, got {self.user!r:.80}")
        if not all(self.once):
            raise ValueError(f"template '{self.name}': a mark of once is empty")

    def score(self, text: str) -> float:
        """Share of its marks that the text holds exactly once, in [0, 1]; 1 where it has none."""
        return sum(text.count(mark) == 1 for mark in self.once) / len(self.once) if self.once else 1.0

    def around(self, prompt: Any) -> Any:
        """The prompt as it is asked: text, or the messages of a chat, whose last is the problem.

        Refuses a last message that is not the user's, or is no text.
        """
        if isinstance(prompt, str):
            asked = self.user.replace(QUESTION, prompt)
            return f"{self.system}\n\n{asked}" if self.system else asked
        *before, last = prompt
        if last["role"] != "user" or not isinstance(last["content"], str):
            what = "is no text" if last["role"] == "user" else f"is of the role '{last['role']!s:.40}'"
            raise ValueError(f"a template stands around what the user says last, and here the last message {what}")
        if self.system:
            before = [{"role": "system", "content": self.system}, *(m for m in before if m["role"] != "system")]
        return [*before, {**last, "content": self.user.replace(QUESTION, last["content"])}]


BOXED = "Work through the problem step by step and put the final answer in \\boxed{}."
STEPS = "Show each step of the solution and put the final answer in \\boxed{}."
PHRASE = "The final answer is:"
CLOSING = f'End with a line that begins "{PHRASE}" and gives the answer.'
OPENER = "Let's go through this step by step."
TAGS = "Think between <think> and </think>, then answer between <answer> and </answer>."
OWN_LINES = "Each of the four tags stands on a line of its own, and the answer is in \\boxed{}."
CHECK = "Let's verify step by step"
REFLECT = (
    "Solve the problem between <solution> and </solution>, then check the solution between <check> and </check>, "
    f'beginning the check with "{CHECK}". Each tag stands on a line of its own; put the answer in \\boxed{{}}.'
)
LINES = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
BARE = ("<think>", "</think>", "<answer>", "</answer>")
REFLECTIVE = ("<solution>\n", "\n</solution>\n", f"\n<check>\n{CHECK}", "\n</check>")

BUILT_IN = (
    Template(name="qwen-math", system=BOXED),
    Template(name="abel", system=BOXED, opener=OPENER),
    Template(name="simplerl", user=f"{QUESTION}\n{BOXED}"),
    Template(name="formal", system="Derive the answer formally, from definitions and known results, and box it."),
    Template(name="lm_eval_prompt8", system=STEPS, opener=OPENER),
    Template(name="lm_eval_prompt1", system=f"{STEPS} {CLOSING}", opener=OPENER, once=(PHRASE,)),
    Template(name="lm_eval_prompt4", user=f"{QUESTION}\n{CLOSING}", once=(PHRASE,)),
    Template(name="open-r1", system=f"{TAGS} {OWN_LINES}", once=LINES),
    Template(name="open-r1-teacher", system=f"{TAGS} {OWN_LINES}", opener=LINES[0], once=LINES[1:]),
    Template(name="deepseek-r1", system=TAGS, once=BARE),
    Template(name="deepseek-r1-teacher", system=TAGS, opener=BARE[0], once=BARE[1:]),
    Template(name="reflective_prompt", system=REFLECT, once=REFLECTIVE),
    Template(name="reflective_prompt-teacher", system=REFLECT, opener=REFLECTIVE[0], once=REFLECTIVE[1:]),
)


def template_of(entry: object) -> Template:
    """A name of those above, or one of the user's, as a mapping of the fields; a ValueError says what is wrong."""
    if isinstance(entry, Template):
        return entry
    known = {each.name: each for each in BUILT_IN}
    if isinstance(entry, str):
        if entry not in known:
            raise ValueError(f"no template '{entry:.80}'; the nearest are {', '.join(nearest_first(entry, known)[:3])}")
        return known[entry]
    names = [each.name for each in fields(Template)]
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"a template is a name, or a mapping with a name of {', '.join(names)}, got {entry!r:.80}")
    for key, value in entry.items():
        if key not in names:
            raise ValueError(f"a template has no '{key!s:.80}'; it has {', '.join(names)}")
        is_marks = isinstance(value, list | tuple) and all(isinstance(mark, str) for mark in value)
        if not (is_marks if key == "once" else isinstance(value, str)):
            raise ValueError(
                f"template: {key} must be {'a list of texts' if key == 'once' else 'text'}, got {value!r:.80}"
            )
    return Template(**{**entry, "once": tuple(entry.get("once", ()))})
