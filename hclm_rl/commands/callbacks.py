"""What the command line puts into a run's folder, and what it measures before the first step."""

import inspect
import logging
import time
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..responses.names import nearest
from ..trainer.folder import write_whole
from ..trainer.reset import ResetReference
from ..watch.report.runs import RECIPE_NAME, SUMMARY_NAME
from ..watch.secrets import hide_in_yaml

logger = logging.getLogger(__name__)


class FolderOpener(TrainerCallback):
    """Takes the summary of a run before out of the folder and puts this one's recipe in, without its tokens and keys,
    once training is to begin.

    By then the run has been built and its checkpoint loaded: a run that is refused leaves the folder as it was.
    """

    def __init__(self, folder: Path, recipe: Path | None) -> None:
        self.folder, self.recipe = folder, recipe
        # read at once: where it is that of the run before in this folder, it moves aside with that run
        self.text = hide_in_yaml(recipe.read_text(encoding="utf-8")) if recipe else ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            (self.folder / SUMMARY_NAME).unlink(missing_ok=True)
            own = self.folder / RECIPE_NAME
            if self.recipe and not (own.exists() and self.recipe.resolve() == own.resolve()):
                write_whole(own, self.text)


class MeasureAtStart(TrainerCallback):
    """Measures once: as a callback when the model is wrapped for training, unless a run is resumed."""

    def __init__(self, measure: Callable[[], dict | None]) -> None:
        self.measure, self.found, self.seconds = measure, None, 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self.found = self.measure()
        self.seconds = time.perf_counter() - start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.global_step:
            self()


class UntrainedTeller(TrainerCallback):
    """Says in one warning that nothing is trained: every response is cut off, and masked for it.

    The run goes on, as TRL's own does.
    """

    def __init__(self) -> None:
        self.has_told = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        is_all = (logs or {}).get("completions/clipped_ratio") == 1
        if self.has_told or not (is_all and getattr(args, "mask_truncated_completions", False)):
            return
        self.has_told = True
        if state.is_world_process_zero:
            logger.warning(
                "nothing is trained at step %d: every response was cut off at max_completion_length %s, and "
                "mask_truncated_completions leaves such responses out; raise max_completion_length",
                state.global_step,
                getattr(args, "max_completion_length", None),
            )


def reset_of(given: dict) -> ResetReference:
    """What stands below `reset_reference`."""
    known = inspect.signature(ResetReference).parameters
    for name in given:
        if name not in known:
            raise ValueError(f"reset_reference has no {name!r}; it has: {nearest(name, known)}, ...")
    return ResetReference(**given)
