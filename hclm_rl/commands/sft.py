"""`hclm-rl sft --config RECIPE`: supervised fine-tuning, plain or with `sft_method`, from a recipe to a folder."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from ..recipe.arguments import recipe_of, settings_by, with_recipe_apart
from ..recipe.parser import RecipeParser
from ..recipe.refusals import refuse_unwritable
from ..sft.config import SFTConfig, build_method, name_of
from ..sft.trainer import SFTTrainer
from ..testbed.policy import EOS, SHAPES, new_policy, new_tokenizer, policy_path, save_policy
from ..testbed.warm_start_recipe import LESSONS
from ..trainer.checkpoints import find_checkpoint
from ..trainer.folder import LogWriter, write_whole
from ..watch.report.runs import SUMMARY_NAME
from .callbacks import FolderOpener
from .data import Rows
from .loading import TESTBED, load_datasets, split_of
from .lock import RunLock

NEW_POLICY = "testbed:new"  # as model_name_or_path: the task's policy before any training
Settings = tuple["SftArguments", SFTConfig, ModelConfig, DatasetMixtureConfig]


@dataclass
class SftArguments(ScriptArguments):
    """TRL's script arguments, and the testbed's own lessons in place of a data set."""

    task: str | None = field(
        default=None,
        metadata={
            "help": f"Learn from the warm start's lessons of a task ({', '.join(LESSONS)}): prompts with one right "
            "completion each (coins_noisy: half of them wrong). It stands in place of a data set."
        },
    )
    lessons: int | None = field(default=None, metadata={"help": "The first so many of them; default: all."})
    allow_custom_code: bool = field(
        default=False,
        metadata={"help": "On the command line only: let the recipe bring code along with a model. See SECURITY.md."},
    )

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in LESSONS:
            raise ValueError(f"task must be one of {', '.join(LESSONS)}, got '{self.task:.80}'")
        if self.lessons is not None and self.lessons < 1:
            raise ValueError(f"lessons must be at least 1, got {self.lessons}")
        if self.task is not None and self.dataset_name:
            raise ValueError(f"the task '{self.task}' brings its own lessons: drop dataset_name, or drop task")


def lessons_of(task: str, seed: int, count: int | None) -> datasets.Dataset:
    """Columns prompt and completion."""
    lesson = LESSONS[task]
    texts = [text.split() for text in lesson.texts(seed, count)]
    cut = lesson.prompt_tokens
    return datasets.Dataset.from_dict(
        {
            "prompt": [" ".join(words[:cut]) for words in texts],
            "completion": [" " + " ".join(words[cut:]) for words in texts],
        }
    )


def parse(line: Sequence[str]) -> Settings:
    """Recipe and flags to settings; a ValueError names the key at fault."""
    types = [SftArguments, SFTConfig, ModelConfig, DatasetMixtureConfig]
    settings = settings_by(RecipeParser(types, prog="hclm-rl sft"), line)
    return settings[0], settings[1], settings[2], settings[3]


def data_of(settings: Settings) -> tuple[Rows, Rows | None]:
    """What is learnt from and, where the run evaluates on the way, what is held out."""
    arguments, config, _, mixture = settings
    evaluates = config.eval_strategy != "no"
    if arguments.task is not None:
        if evaluates:
            raise ValueError(
                f"the lessons of '{arguments.task}' have no part that is held out: set eval_strategy to 'no', or give "
                "dataset_name with dataset_test_split"
            )
        return lessons_of(arguments.task, config.seed, arguments.lessons), None
    if not (mixture.datasets or arguments.dataset_name):
        raise ValueError("the data set is missing: set task (whose lessons are its own), dataset_name or datasets")
    loaded = load_datasets(arguments, mixture, of_prompts=False)
    train = split_of(loaded, arguments.dataset_train_split, "dataset_train_split")
    held_out = split_of(loaded, arguments.dataset_test_split, "dataset_test_split") if evaluates else None
    for rows in (train, held_out):
        if rows is not None:
            refuse_columns(rows.column_names, config)
    return train, held_out


def refuse_columns(names: Sequence[str] | None, config: SFTConfig) -> None:
    """Rows of which TRL makes no lesson; what is streamed may not say its columns."""
    forms = [{"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"}, {config.dataset_text_field}]
    if names and not any(form <= set(names) for form in forms):
        raise ValueError(
            f"the data has the columns {', '.join(names)}; lessons have messages, or prompt and completion, or "
            f"{config.dataset_text_field} (dataset_text_field)"
        )


def model_of(settings: Settings, folder: Path) -> str:
    """A folder or a name; the testbed's policies are its own."""
    arguments, config, model, _ = settings
    path = model.model_name_or_path
    if path is None:
        raise ValueError(
            f"the model is missing: set model_name_or_path (a folder, a name, `{TESTBED}`, `{NEW_POLICY}`)"
        )
    task = arguments.task if arguments.task in SHAPES else "coins"
    if path == NEW_POLICY:
        start = folder / "start"
        save_policy(new_policy(config.seed, task), new_tokenizer(task), str(start))
        return str(start)
    return policy_path(task) if path == TESTBED else path


def build(settings: Settings, folder: Path, recipe: Path | None) -> SFTTrainer:
    """Everything up to the first step."""
    arguments, config, model, _ = settings
    train, held_out = data_of(settings)
    init = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    assert not isinstance(config.model_init_kwargs, str)
    config.model_init_kwargs = {**init, **(config.model_init_kwargs or {})}
    if arguments.task is not None and config.eos_token is None:
        config.eos_token = EOS
    path = model_of(settings, folder)
    try:
        trainer = SFTTrainer(
            model=path,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            callbacks=[FolderOpener(folder, recipe), LogWriter()],
        )
    except OSError as error:  # as transformers says that there is no such model
        raise ValueError(f"model_name_or_path '{path}' could not be loaded: {error}") from error
    if isinstance(trainer.train_dataset, datasets.Dataset) and not len(trainer.train_dataset):
        raise ValueError(
            f"no row of the data has a token to learn within max_length, {config.max_length}: raise max_length, or "
            "look at the completions"
        )
    return trainer


def run(settings: Settings, recipe: Path | None = None) -> None:
    """The whole job; the trained model and summary.json stand in output_dir, which no other run has meanwhile."""
    arguments, config, model, _ = settings
    folder = Path(config.output_dir or "trainer_output")
    refuse_unwritable(folder)
    checkpoint = find_checkpoint(config.resume_from_checkpoint, config, has_terms=False)
    lock = RunLock(folder, is_held=config.process_index == 0)
    with lock.until_error():
        trainer = build(settings, folder, recipe)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder))
        if trainer.accelerator.is_main_process:
            method = build_method(config.sft_method)
            summary = {
                "algorithm": "sft",
                "model": model.model_name_or_path,
                "task": arguments.task,
                "sft_method": None if method is None else name_of(method),
                "seed": config.seed,
                "steps": trainer.state.global_step,
            }
            write_whole(folder / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    lock.release()
    trainer.end()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: a mistake in the recipe is one sentence on stderr and exit code 2."""
    line = with_recipe_apart(sys.argv[1:] if arguments is None else arguments)
    try:
        settings = parse(line)
        run(settings, recipe_of(line))
    except (ValueError, OSError, ImportError) as error:
        print(f"hclm-rl sft: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
