"""What happened to every response token in chosen optimiser steps: one parquet table a step, or one part a process.

A row is a token that counts. Its columns: `prompt` and `response` (numbers in the generation batch of all processes),
`position`, `id`, `token` (text), `prompt_text`, `reward` (of the response, before any term), `logp` and `old_logp`
(nats, before this update and at the sampling policy), `entropy` (nats), `advantage_before` and `advantage` (as TRL made
it and as its loss got it), `weight` (their ratio, empty where the first is 0), and `<link>/<metric>` for every metric
that a term gives per token: a (rows, T) tensor or `Quantiles`. So `information_force` fills
`information_force/leverage`, `/force` and `/influence`, and a term of your own fills its own. Nothing here touches
training.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:  # whoever only reads a trace need not wait for torch
    from torch import Tensor

FOLDER = "trace"


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of these tokens."""
        ...


def file_of(folder: Path, step: int, part: int = 0, of: int = 1) -> Path:
    """Where the run in `folder` keeps the trace of an optimiser step: that of one of several processes, or all."""
    name = f"step-{step:05d}" if of == 1 else f"step-{step:05d}.part-{part:05d}-of-{of:05d}"
    return Path(folder) / FOLDER / f"{name}.parquet"


def parts_of(folder: Path, step: int) -> dict[int, list[Path]]:
    """The files of an optimiser step that are there, by the number of processes of the run that wrote them."""
    whole = file_of(folder, step)
    found = {1: [whole]} if whole.is_file() else {}
    for file in sorted(whole.parent.glob(f"{whole.stem}.part-*-of-*.parquet")):
        found.setdefault(int(file.stem.rpartition("-")[2]), []).append(file)
    return found


def files_of(folder: Path, step: int) -> list[Path]:
    """All files of an optimiser step; none where one of them is missing."""
    whole = [files for count, files in parts_of(folder, step).items() if len(files) == count]
    return whole[0] if whole else []


def traced_steps(folder: Path) -> list[int]:
    """The optimiser steps, counted from 1 as in the log, of which the run in `folder` has a whole trace."""
    names = {file.stem.partition(".")[0] for file in (Path(folder) / FOLDER).glob("step-*.parquet")}
    numbers = [name.removeprefix("step-") for name in names]
    return sorted(int(number) for number in numbers if number.isdecimal() and files_of(folder, int(number)))


def read_trace(folder: Path, step: int) -> pa.Table:
    """The tokens of one optimiser step of the run in `folder`, by response and position; `.to_pandas()` from here.

    Refuses a step without a whole trace.
    """
    files = files_of(folder, step)
    if not files:
        known = ", ".join(map(str, traced_steps(folder))) or "none"
        there = " and ".join(f"{len(own)} of {count} parts" for count, own in parts_of(folder, step).items())
        but = f" but {there}: the rest was cut off, or is on another machine" if there else ""
        raise ValueError(f"{folder} has no trace of step {step}{but}; traced steps: {known}")
    return in_order([pq.read_table(file) for file in files])


def in_order(tables: Sequence[pa.Table]) -> pa.Table:
    """One table, by response and position; a metric that was given in some only is empty in the others."""
    whole = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    return whole.sort_by([("response", "ascending"), ("position", "ascending")])


def prompts_in(folder: Path, step: int) -> set[str]:
    """The texts of the prompts that the run in `folder` traced at this step."""
    return set(pq.read_table(file_of(folder, step), columns=["prompt_text"])["prompt_text"].unique().to_pylist())


def token_texts(
    ids: Sequence[int] | np.ndarray, decode: Callable[[list[int]], str], is_first: np.ndarray | None = None
) -> list[str]:
    """The text that each token adds to the one before it, spaces included; a part of a character reads as U+FFFD.

    `is_first`: where a response begins, whose first token has none before it. A pair of tokens is decoded once,
    however often it comes.
    """
    own = np.asarray(ids, dtype=np.int64)
    if not len(own):
        return []
    before = np.concatenate([[-1], own[:-1]])
    if is_first is not None:
        before = np.where(is_first, -1, before)
    size = int(own.max()) + 1
    pairs, place = np.unique((before + 1) * size + own, return_inverse=True)
    alone = {token: decode([token]) for token in np.unique(own).tolist()}

    def added(first: int, token: int) -> str:
        text = alone.get(first, "")  # of the first token in all, nothing
        both = decode([first, token]) if text else ""
        return both[len(text) :] if text and both.startswith(text) else alone[token]

    return np.array([added(key // size - 1, key % size) for key in pairs.tolist()], dtype=object)[place].tolist()


@dataclass(kw_only=True)
class Trace:
    """Collects one optimiser step's tokens on this process, micro-batch by micro-batch, and writes them."""

    folder: Path  # of the run
    steps: tuple[int, ...] = ()  # counted from 1, as in the log
    every: int | None = None  # and every so many
    _parts: list[dict[str, "Tensor"]] = field(default_factory=list)  # one a micro-batch: {column: (tokens,)}
    _masks: list["Tensor"] = field(default_factory=list)
    _prompts: dict[int, list[int]] = field(default_factory=dict)  # number -> ids

    def __post_init__(self) -> None:
        if any(isinstance(step, bool) or not isinstance(step, int) or step < 1 for step in self.steps):
            raise ValueError(f"trace_steps are optimiser steps from 1 on, got {list(self.steps)}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"trace_every must be at least 1, got {self.every}")

    @property
    def is_on(self) -> bool:
        """Whether any step is traced."""
        return bool(self.steps or self.every)

    def wants(self, step: int) -> bool:
        """Whether this step is traced."""
        return step in self.steps or bool(self.every and step % self.every == 0)

    def start(self, mask: "Tensor", columns: Mapping[str, "Tensor"], prompts: Iterable[tuple[int, list[int]]]) -> None:
        """A new micro-batch: `mask` (B, T), columns (B,) or (B, T), and the prompts in it by number."""
        self._parts.append({})
        self._masks.append(mask)
        self._prompts |= dict(prompts)
        for name, values in columns.items():
            self.add(name, values)

    def add(self, name: str, values: "Tensor") -> None:
        """One more column of the micro-batch."""
        mask = self._masks[-1]
        values = values.detach() if values.dim() == 2 else values.detach().unsqueeze(1).expand(mask.shape)
        kept = values[mask].cpu()
        self._parts[-1][name] = kept.float() if kept.is_floating_point() else kept

    def write(self, step: int, tokenizer: Decoder, process: int = 0, processes: int = 1) -> None:
        """Writes and forgets the step's tokens of this process, the first of which also takes away older files of it.

        Older files are of a run that was cut off, or of another number of processes.
        """
        parts, self._parts, self._masks = self._parts, [], []
        prompts, self._prompts = self._prompts, {}
        file = file_of(self.folder, step, process, processes)
        if process == 0:
            for count, older in parts_of(self.folder, step).items():
                for each in older if count != processes else ():
                    each.unlink()
        if not parts:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        pq.write_table(in_order([table_of(part, prompts, tokenizer) for part in parts]), unfinished)
        unfinished.replace(file)


def table_of(part: Mapping[str, "Tensor"], prompts: Mapping[int, list[int]], tokenizer: Decoder) -> pa.Table:
    """A micro-batch's tokens, which come response by response."""
    columns = {name: values.numpy() for name, values in part.items()}
    is_first = np.diff(columns["response"], prepend=-1) != 0
    tokens = token_texts(columns["id"], tokenizer.decode, is_first)
    numbers = sorted(prompts)
    texts = pa.array([tokenizer.decode(prompts[number]) for number in numbers], pa.string())
    of_prompt = pa.DictionaryArray.from_arrays(pa.array(np.searchsorted(numbers, columns["prompt"]), pa.int32()), texts)
    arrays = {name: pa.array(values) for name, values in columns.items()}
    before, after = (columns[name].astype(np.float64) for name in ("advantage_before", "advantage"))
    is_weighed = before != 0
    weights = np.divide(after, before, out=np.zeros_like(after), where=is_weighed)
    given = {
        "token": pa.array(tokens, pa.string()),
        "prompt_text": of_prompt,
        "weight": pa.array(weights.astype(np.float32), mask=~is_weighed),
    }
    return pa.table(arrays | given)
