"""What every run leaves in its `output_dir`, whoever starts it: `log.jsonl` and `run.json`."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..chain.chain import Chain
from ..chain.state import settle
from ..recipe.written_out import as_recipe
from ..watch.callback import CollapseCallback
from ..watch.report.runs import LOG_NAME, RECIPE_NAME, REPORT_NAME, RUN_NAME, SUMMARY_NAME, read_log
from ..watch.secrets import hide, secrets_in, without
from ..watch.trace import FOLDER as TRACE_FOLDER
from ..watch.trackers import pages_of_run
from ..watch.versions import commit_of, now, versions
from .every_step import show_every_step

logger = logging.getLogger(__name__)

# what belongs to one run; the model that it left is written over, as the trainers of transformers do
OF_A_RUN = (LOG_NAME, RUN_NAME, SUMMARY_NAME, RECIPE_NAME, REPORT_NAME, TRACE_FOLDER, "checkpoint-*")
AT_THE_END = "train_runtime"  # in the entry that transformers logs when a run is done
EARLIER = "earlier"  # <output_dir>/earlier-1 holds the first run, earlier-2 the second


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; whoever is killed leaves the old one or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    settle(unfinished, path)


def set_run_aside(folder: Path) -> Path | None:
    """Moves a run that trained in this folder into one of its own beside; gives that, None where there was none."""
    if not read_log(folder / LOG_NAME)[0] and not (folder / SUMMARY_NAME).exists():
        return None
    taken = [each.name.removeprefix(f"{EARLIER}-") for each in folder.glob(f"{EARLIER}-*")]
    aside = folder / f"{EARLIER}-{1 + max((int(each) for each in taken if each.isdecimal()), default=0)}"
    aside.mkdir()
    for pattern in OF_A_RUN:
        for each in folder.glob(pattern):
            each.rename(aside / each.name)
    return aside


def settings_of(args: Any) -> dict[str, Any]:
    """The fields that differ from their defaults, as text where JSON has no word for them."""
    found = {}
    for each in fields(args):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = getattr(args, each.name)
        if each.init and value != default:
            found[each.name] = value
    return json.loads(json.dumps(found, default=str))


class RunWriter(TrainerCallback):
    """Writes `run.json` when training begins, and when it ended.

    A run before it in the same folder is not lost: its log, traces and checkpoints move to `earlier-1`, `earlier-2`. A
    run that goes on from a checkpoint stays where it is.
    """

    def __init__(self, trainer: str, chain: Chain, model: str) -> None:
        self.about = {"trainer": trainer, "model": model, "terms": as_recipe(list(chain.links))}
        self.written: dict[str, Any] = {}
        self.secrets: list[str] = []  # beside those of the config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        if not state.global_step and (aside := set_run_aside(folder)):
            logger.warning("%s held a run: it is in %s, with its checkpoints", folder, aside.name)
        settings = settings_of(args)
        self.written = {
            **self.about,
            "started": now(),
            "ended": None,
            "from_step": state.global_step,
            "max_steps": state.max_steps,
            "processes": args.world_size,
            "settings": {key: value for key, value in settings.items() if key != "entropy_terms"},
            "versions": versions(),
            "commit": commit_of(Path.cwd()),
            "trackers": pages_of_run(),
        }
        self.write(folder, args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.written and state.is_world_process_zero:
            self.written |= {"ended": now(), "steps": state.global_step}
            self.write(Path(args.output_dir or ""), args)

    def write(self, folder: Path, args: TrainingArguments) -> None:
        """Without tokens and keys."""
        text = json.dumps(hide(self.written), indent=1, default=repr)
        write_whole(folder / RUN_NAME, without(text, [*self.secrets, *secrets_in([vars(args)])]) + "\n")


class LogWriter(TrainerCallback):
    """Writes one JSON object per logged step, each line at once, so that a run can be watched and survives a crash."""

    def __init__(self) -> None:
        self.path: Path | None = None  # once training began: what is evaluated before is no part of a run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            self.path = Path(args.output_dir or "") / LOG_NAME
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a resumed run repeats the steps after its checkpoint, and writes the line at its end anew
            log = read_log(self.path)[0]
            kept = [each for each in log if each["step"] <= state.global_step and AT_THE_END not in each]
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept if state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self.path is not None and state.is_world_process_zero:
            entry = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            with self.path.open("a") as file:
                file.write(json.dumps(entry, default=float) + "\n")


@contextmanager
def writing_a_run(trainer: Any, chain: Chain, given: dict[str, Any]) -> Iterator[None]:
    """While TRL's trainer is made: the callbacks that watch and write a run go around those of the user.

    `chain`: of the terms that the user named.
    """
    config, own, model = given.get("args"), list(given.get("callbacks") or []), given.get("model")
    action: Any = getattr(config, "watch_collapse", "warn")
    before: list = [] if action == "off" or any(map(is_watch, own)) else [CollapseCallback(action=action)]
    has_log = getattr(config, "run_log", True)
    if has_log:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        before.append(RunWriter(type(trainer).__name__, chain, name or type(model).__name__))
    given["callbacks"] = [*before, *own, *([LogWriter()] if has_log else [])]
    yield
    trainer._hclm.watcher = before[0] if before and is_watch(before[0]) else None
    put_watch_first(trainer)


def note(trainer: Any, secrets: Sequence[str], **more: object) -> None:
    """Puts more into `run.json` than the trainer knows, and keeps more out of it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RunWriter):
            callback.about |= more
            callback.secrets += secrets


def is_watch(callback: object) -> bool:
    """A callback may be given as a class, too."""
    return isinstance(callback, CollapseCallback) or (
        isinstance(callback, type) and issubclass(callback, CollapseCallback)
    )


def take_its_place(trainer: Any, callback: object) -> None:
    """Lets go of the detector that the run got by itself, for one of the user's."""
    if is_watch(callback) and trainer._hclm.watcher is not None:
        trainer.remove_callback(trainer._hclm.watcher)
        trainer._hclm.watcher = None


def put_watch_first(trainer: Any) -> None:
    """What it and others (`adds_to_log`) put into a log entry is to reach the trackers and the log too."""

    def place(callback: object) -> int:
        return 0 if is_watch(callback) else 1 if getattr(callback, "adds_to_log", False) else 2

    trainer.callback_handler.callbacks.sort(key=place)
    show_every_step(trainer)
