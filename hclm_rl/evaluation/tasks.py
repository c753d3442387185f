"""Problems with a verifier: the testbed's, reasoning-gym's, a JSONL file's, a data set's.

What cannot be used is left out with one sentence that names its line or row; the rest is evaluated.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hclm_rl.responses.limits import LENGTH, OverLimits, Unjudged, within_limits
from hclm_rl.responses.names import nearest
from hclm_rl.responses.readers import between_tags

from .math_judge import MathJudge

Judge = Callable[[str], tuple[str | None, bool]]  # completion -> canonical answer (None: unread), whether it is right
Prompt = str | list[dict[str, str]]  # text, or messages for a chat template

GYM, DATASET = "gym:", "dataset:"
GYM_INSTRUCTION = "\nPut the final answer, and nothing else, between <answer> and </answer>."
MAX_NEW_TOKENS = 512  # where the task does not say how long an answer is
FORMS = f"{GYM}NAME is a task of reasoning-gym, {DATASET}NAME a data set, PATH.jsonl a file"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A prompt and who judges the responses to it."""

    id: str  # "line 3", "row 12"
    prompt: Prompt
    judge: Judge


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A problem that is left out."""

    id: str
    why: str  # continues the sentence that the id begins

    def __str__(self) -> str:
        return f"{self.id}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What is asked, and what was left out."""

    name: str
    problems: list[Problem]
    max_new_tokens: int
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where problems come from, as the command line says it."""

    task: str
    kwargs: dict[str, object] = field(default_factory=dict)  # of a testbed or reasoning-gym task
    split: str = "test"  # the next ones are of files and data sets
    config: str | None = None
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    limit: int | None = None  # the first so many problems

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"the number of problems must be at least 1, got {self.limit}")


def rendered(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, is_chat: bool) -> str:
    """As the model reads it; with `is_chat` by the chat template, text as what the user says."""
    if not is_chat:
        assert isinstance(prompt, str)
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def load(source: Source) -> Problems:
    """The problems behind `source.task`."""
    if source.task.endswith(".jsonl"):
        return from_rows(source, Path(source.task).name, jsonl_rows(Path(source.task)))
    if source.task.startswith(DATASET):
        return from_rows(source, source.task, dataset_rows(source))
    if source.task.startswith(GYM):
        return from_gym(source)
    return from_testbed(source)


def from_testbed(source: Source) -> Problems:
    """The held-out prompts of a Task: hclm_rl/testbed/<name>.py, or a function at a dotted path.

    Refuses tasks with tools.
    """
    from hclm_rl.testbed.task import find_task

    try:
        task = find_task(source.task, **source.kwargs)
    except TypeError as error:
        raise ValueError(f"task_kwargs of '{source.task}': {error}") from error
    except ImportError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        raise ValueError(f"{error}; {FORMS}" if str(error).startswith("no task") else str(error)) from error

    def judge(row: dict, completion: str) -> tuple[str | None, bool]:
        return task.answer(row, completion), task.is_correct(row, completion)

    if task.environment is not None:
        raise ValueError(
            f"the task '{source.task}' has tools, which this command does not run: set eval_samples in its recipe"
        )
    rows = [dict(row) for row in task.eval_dataset][: source.limit]
    problems = [
        Problem(id=f"row {i}", prompt=row["prompt"], judge=functools.partial(judge, row)) for i, row in enumerate(rows)
    ]
    return Problems(name=source.task, problems=problems, max_new_tokens=task.max_completion_length)


def from_gym(source: Source) -> Problems:
    """A data set of reasoning-gym; kwargs are its own (size 100 and seed 42 unless given).

    Refuses a name that it does not know, and names the nearest.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ValueError("reasoning-gym is missing: pip install 'hclm-rl[eval]'") from None
    name = source.task.removeprefix(GYM)
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task '{name}'; the nearest are {nearest(name, DATASETS)}")
    kwargs = {"size": source.limit or 100, "seed": 42, **source.kwargs}
    try:
        found = reasoning_gym.create_dataset(name, **kwargs)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"task_kwargs of '{source.task}': {error}") from error
    from .gym_scores import is_right

    def judge(row: int, completion: str) -> tuple[str | None, bool]:
        answer = " ".join((between_tags(completion, "<answer>", "</answer>") or "").split())
        if not answer:
            return None, False
        if len(answer) > LENGTH:
            return Unjudged(answer), False
        try:
            return answer, bool(within_limits(is_right, name, json.dumps(kwargs), row, answer))
        except OverLimits:
            return Unjudged(answer), False

    problems = [
        Problem(id=f"row {i}", prompt=entry["question"] + GYM_INSTRUCTION, judge=functools.partial(judge, i))
        for i, entry in enumerate(found)
    ]
    return Problems(name=source.task, problems=problems[: source.limit], max_new_tokens=MAX_NEW_TOKENS)


Row = tuple[str, Mapping | str]  # id, and the row or what is wrong with it


def jsonl_rows(path: Path) -> Iterable[Row]:
    """Line by line; empty lines are passed over. Refuses a file that is not there."""
    if not path.is_file():
        raise ValueError(f"no file at '{path}'; {FORMS}")
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                row = row if isinstance(row, dict) else "is not a JSON object"
            except UnicodeDecodeError:
                row = "is not UTF-8"
            except json.JSONDecodeError as error:
                row = f"is not valid JSON ({error.msg} at character {error.pos})"
            except ValueError as error:
                row = f"holds what Python does not read ({error})"
            yield f"line {number}", row


def dataset_rows(source: Source) -> Iterable[Row]:
    """The rows of a data set of the hub, or of a folder that `datasets` reads or has written.

    Refuses one that cannot be loaded.
    """
    import datasets

    name = source.task.removeprefix(DATASET)
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, name=source.config)
    except Exception as error:  # whatever the data set's format, the hub or the network raise
        raise ValueError(f"the data set '{name}' could not be loaded: {' '.join(str(error).split())}") from error
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise ValueError(f"the data set '{name}' has no split '{source.split}', only {', '.join(map(str, found))}")
        found = found[source.split]
    for column in (source.prompt_column, source.answer_column):
        if column not in found.column_names:
            raise ValueError(f"the data set '{name}' has no column '{column}', only {', '.join(found.column_names)}")
    for i, row in enumerate(found):
        yield f"row {i}", dict(row)


def from_rows(source: Source, name: str, rows: Iterable[Row]) -> Problems:
    """Rows of prompt and answer, judged by math-verify."""
    problems, skipped = [], []
    for id, row in rows:
        if len(problems) == source.limit:
            break
        found = row if isinstance(row, str) else problem_of(id, row, source)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            skipped.append(Skipped(id=id, why=found))
    return Problems(name=name, problems=problems, max_new_tokens=MAX_NEW_TOKENS, skipped=skipped)


def problem_of(id: str, row: Mapping, source: Source) -> Problem | str:
    """The problem, or what is wrong with the row."""
    prompt, answer = row.get(source.prompt_column), row.get(source.answer_column)
    if prompt is None or answer is None:
        missing = source.prompt_column if prompt is None else source.answer_column
        return f"has no '{missing}'"
    if not (is_text(prompt) or is_messages(prompt)):
        return f"'{source.prompt_column}' must be text, or messages with role and content"
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return f"'{source.answer_column}' must be text or a number, got {type(answer).__name__}"
    judge = MathJudge.of(str(answer))
    return judge if isinstance(judge, str) else Problem(id=id, prompt=prompt, judge=judge)


def is_text(prompt: object) -> bool:
    """Whether it is text with more than spaces."""
    return isinstance(prompt, str) and bool(prompt.strip())


def is_messages(prompt: object) -> bool:
    """Whether it is a list of messages with role and content."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(each, dict) and {"role", "content"} <= each.keys() for each in prompt)
    )
