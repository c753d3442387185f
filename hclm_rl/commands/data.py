"""Prompts to train on: a JSONL file as `hclm-rl eval` takes it, another file, a folder, a data set of the hub"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import datasets
import pyarrow as pa

from ..evaluation.reward import right_answer
from ..evaluation.tasks import is_messages, is_text, jsonl_rows
from ..recipe.arguments import OWN_REWARD, REWARDS

Splits = datasets.DatasetDict | datasets.IterableDatasetDict
Rows = datasets.Dataset | datasets.IterableDataset

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
ANSWER = "answer"  # the column that the reward `right_answer` reads


def load_named(name: str, config: str | None, is_streamed: bool, of_prompts: bool = True) -> Splits:
    """What `dataset_name` names; of a single file the split `train`. `of_prompts`: each row must have a prompt."""
    path = Path(name)
    if path.suffix in READERS and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"no file at '{path}': dataset_name is a file, a folder, or a data set of the hub")
        if path.suffix == ".jsonl" and not is_streamed:
            return datasets.DatasetDict({"train": from_jsonl(path, of_prompts)})
        return datasets.load_dataset(READERS[path.suffix], data_files={"train": name}, streaming=is_streamed)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = datasets.load_from_disk(name)
        return found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({"train": found})
    return datasets.load_dataset(name, name=config, streaming=is_streamed)


def from_jsonl(path: Path, of_prompts: bool = True) -> datasets.Dataset:
    """One object a line; beside prompts answers are text, so that numbers and text may stand beside each other."""
    rows = list((checked if of_prompts else objects)(path, jsonl_rows(path)))
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path}: a column must hold one kind of value: {' '.join(str(error).split())}") from error


def objects(path: Path, rows: Iterable[tuple[str, Mapping | str]]) -> Iterable[dict]:
    """The rows, or a sentence with the line that is no object."""
    for where, row in rows:
        if isinstance(row, str):
            raise ValueError(f"{path}, {where} {row}")
        yield dict(row)


def checked(path: Path, rows: Iterable[tuple[str, Mapping | str]]) -> Iterable[dict]:
    """The rows, or a sentence with the line that is at fault."""
    first: tuple[str, bool] | None = None  # where, and whether its prompt is text
    for where, row in rows:
        if isinstance(row, str):
            raise ValueError(f"{path}, {where} {row}")
        prompt, answer = row.get("prompt"), row.get(ANSWER)
        if not (is_text(prompt) or is_messages(prompt)):
            raise ValueError(f"{path}, {where}: 'prompt' must be text, or messages with role and content")
        first = first or (where, is_text(prompt))
        if is_text(prompt) != first[1]:
            forms = ("text", "messages") if first[1] else ("messages", "text")
            raise ValueError(
                f"{path}: the prompt of {first[0]} is {forms[0]} and that of {where} is {forms[1]}: give all one form"
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise ValueError(f"{path}, {where}: '{ANSWER}' must be text or a number, got {type(answer).__name__}")
        yield {**row, ANSWER: str(answer)} if answer is not None else dict(row)


def no_reward() -> ValueError:
    return ValueError(
        f"the reward is missing: set reward_funcs ({', '.join(REWARDS)}, or a dotted path), or task, or give the data "
        f"a column '{ANSWER}' for {OWN_REWARD}"
    )


def by_answers(rows: Rows) -> list[Callable[..., list[float | None]]]:
    """The reward where none is named: whether the answer is the one in the data."""
    if ANSWER not in (rows.column_names or ()):
        raise no_reward()
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the reward {OWN_REWARD} needs math-verify: pip install 'hclm-rl[eval]'")
    return [right_answer]
