"""The training job behind `hclm-rl grpo`, `hclm-rl rloo` and the scripts in recipes/: from a recipe to a run folder."""

import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import rewards
from trl.scripts.utils import DatasetMixtureConfig, get_dataset
from trl.trainer.utils import get_peft_config, get_quantization_config

from ..recipe.arguments import (
    REWARDS,
    Algorithm,
    RunArguments,
    Settings,
    make_parser,
    parse,
    recipe_of,
    with_recipe_apart,
)
from ..recipe.config import GRPOConfig, RLOOConfig
from ..recipe.refusals import is_fsdp1
from ..responses.answers import final_text, own_last_words
from ..responses.names import find_function, nearest
from ..testbed import Evaluation, Task, evaluate, find_task
from ..testbed.policy import SHAPES, policy_path
from ..testbed.sampling import measured
from ..trainer import GRPOTrainer, RLOOTrainer
from ..watch.collapse import CollapseCallback
from ..watch.report.runs import LOG_NAME, RECIPE_NAME, SUMMARY_NAME, read_log

__all__ = ["LogWriter", "RunArguments", "main", "make_parser", "prepare", "run"]

Splits = datasets.DatasetDict | datasets.IterableDatasetDict
Reward = str | Callable[..., list[float | None]]

TESTBED = "testbed"  # as model_name_or_path: the shipped policy of the task
# gloo's thread drops the last collective's tensors under the GIL; if the interpreter ends before, both wait for ever
SECONDS_TO_LET_GO = 0.2
PACKAGES = ("trl", "transformers", "accelerate", "torch")


def find_reward(name: str) -> Reward:
    """TRL's function of that name, or the one at a dotted path."""
    if name == "get_soft_overlong_punishment":  # the values of TRL's own script
        return rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)
    if name in REWARDS:
        return getattr(rewards, name)
    if "." not in name:
        raise ValueError(
            f"unknown reward function '{name}'; the nearest are {nearest(name, REWARDS)}; `hclm-rl grpo --help` lists "
            "all; a dotted path names one of your own"
        )
    return find_function(name, "reward function")


def load_task(arguments: RunArguments) -> Task | None:
    if not arguments.task:
        return None
    if arguments.dataset_name:
        raise ValueError(f"the task '{arguments.task}' brings its own prompts: drop dataset_name, or drop task")
    assert not isinstance(arguments.task_kwargs, str)
    try:
        return find_task(arguments.task, **(arguments.task_kwargs or {}))
    except TypeError as error:
        raise ValueError(f"task_kwargs of '{arguments.task}': {error}") from error


def shipped_policy(task: str | None) -> str:
    """The task's own; that of coins for any other (a task of the user's with its words, say)."""
    return policy_path(task) if task in SHAPES else policy_path()


def load_datasets(arguments: RunArguments, mixture: DatasetMixtureConfig) -> Splits:
    """As in TRL's scripts."""
    if mixture.datasets:
        return get_dataset(mixture)
    if not arguments.dataset_name:
        raise ValueError("the data set is missing: set task (whose prompts are its own), dataset_name or datasets")
    return datasets.load_dataset(
        arguments.dataset_name, name=arguments.dataset_config, streaming=arguments.dataset_streaming
    )


def split_of(of: Splits, split: str, key: str) -> datasets.Dataset | datasets.IterableDataset:
    if split not in of:
        raise ValueError(f"the data set has no split '{split}', only {', '.join(map(str, of))}; set {key}")
    return of[split]


def build_trainer(
    algorithm: Algorithm, settings: Settings, callbacks: list[TrainerCallback]
) -> tuple[GRPOTrainer | RLOOTrainer, Task | None]:
    """Everything up to the first step; a ValueError says what the recipe lacks, mostly before a model is loaded."""
    arguments, config, model, mixture = settings
    task = load_task(arguments)
    reward_funcs = [find_reward(name) for name in arguments.reward_funcs or []] or (task.reward_funcs if task else [])
    if not reward_funcs:
        raise ValueError(f"the reward is missing: set reward_funcs ({', '.join(REWARDS)}, or a dotted path), or task")
    if task is None:
        loaded = load_datasets(arguments, mixture)
        train = split_of(loaded, arguments.dataset_train_split, "dataset_train_split")
        held_out = None
        if config.eval_strategy != "no":
            held_out = split_of(loaded, arguments.dataset_test_split, "dataset_test_split")
    else:
        train, held_out = task.train_dataset, task.eval_dataset if config.eval_strategy != "no" else None
        longest = task.max_completion_length
        config.max_completion_length = min(config.max_completion_length or longest, longest)
    path = model.model_name_or_path or (TESTBED if arguments.task in SHAPES else None)
    if path is None:
        raise ValueError("the model is missing: set model_name_or_path (a folder, a name on the hub, or `testbed`)")
    assert not isinstance(config.model_init_kwargs, str)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    if arguments.eval_samples and is_fsdp1(config):
        raise ValueError("eval_samples under FSDP1 was never tried: use FSDP2 (fsdp_version: 2), DDP or ZeRO")
    environment = {}
    if task is not None and task.environment is not None:
        if algorithm != "grpo":
            raise ValueError(f"the task '{arguments.task}' has tools, which TRL's RLOO trainer does not run: use grpo")
        environment["environment_factory"] = task.environment
    if config.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started and this one sees {config.world_size}: start them with "
            "one of recipes/accelerate"
        )
    try:
        trainer = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[algorithm](
            model=shipped_policy(arguments.task) if path == TESTBED else path,
            reward_funcs=reward_funcs,
            args=config,
            train_dataset=train,
            eval_dataset=held_out,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            callbacks=callbacks,
            **environment,
        )
    except OSError as error:  # as transformers says that there is no such model
        raise ValueError(f"model_name_or_path '{path}' could not be loaded: {error}") from error
    return trainer, task


class LogWriter(TrainerCallback):
    """Writes one JSON object per logged step, each line at once, so that a run can be watched and survives a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero:
            # a resumed run repeats the steps after its checkpoint
            kept = [entry for entry in read_log(self.path)[0] if entry["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept if state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero:
            entry = {"step": state.global_step, "max_steps": state.max_steps, **(logs or {})}
            with self.path.open("a") as file:
                file.write(json.dumps(entry, default=float) + "\n")


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


def is_sharded(trainer: GRPOTrainer | RLOOTrainer) -> bool:
    """Whether training leaves no process the whole model."""
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


def all_sample(trainer: GRPOTrainer | RLOOTrainer, task: Task) -> bool:
    """Whether the processes must sample together: for TRL's loop of tool calls, and each with its part of the model."""
    return task.environment is not None or is_sharded(trainer)


def on_held_out(
    trainer: GRPOTrainer | RLOOTrainer, task: Task, arguments: RunArguments, config: GRPOConfig | RLOOConfig
) -> Evaluation:
    """The policy as it is on the task's held-out prompts; on this process alone, unless `all_sample`."""
    if all_sample(trainer, task):
        rows = [dict(row) for row in task.eval_dataset]
        repeated = [row for row in rows for _ in range(arguments.eval_samples)]
        said = trainer.sample_responses(repeated, batch=arguments.eval_batch, seed=config.seed)
        text_of = final_text if task.environment is None else own_last_words
        texts = [text_of(each) for each in said.completions]
        return measured(rows, task, arguments.eval_samples, texts, said.entropy_sums, said.lengths)
    assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
    return evaluate(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        task.eval_dataset,
        task,
        samples=arguments.eval_samples,
        temperature=config.temperature,
        seed=config.seed,
        batch=arguments.eval_batch,
    )


def written(result: Evaluation) -> dict:
    """As summary.json holds it."""
    return {
        "prompts": result.prompts,
        "samples": result.samples,
        "means": result.means(),
        "standard_errors": result.standard_errors,
    }


def measure(
    trainer: GRPOTrainer | RLOOTrainer, task: Task | None, arguments: RunArguments, config: GRPOConfig | RLOOConfig
) -> dict | None:
    """Means and standard errors on the task's held-out prompts.

    Taken on the main process while the others wait, unless `all_sample`.
    """
    if not (task and arguments.eval_samples):
        return None
    found = None
    if trainer.accelerator.is_main_process or all_sample(trainer, task):
        found = written(on_held_out(trainer, task, arguments, config))
    trainer.accelerator.wait_for_everyone()
    return found


def checkpoint_of(config: GRPOConfig | RLOOConfig) -> str | None:
    """The folder to resume from; `true` means the last one in output_dir."""
    wanted = config.resume_from_checkpoint
    if wanted in (None, False, "", "false", "False"):
        return None
    where = str(config.output_dir) if wanted in (True, "true", "True") else wanted
    found = None
    if Path(where).is_dir():
        found = get_last_checkpoint(where) if where == config.output_dir else where
    if found is None:
        raise ValueError(f"resume_from_checkpoint: no checkpoint at '{where}'")
    return found


def prepare(
    algorithm: Algorithm, settings: Settings, recipe: Path | None = None, overrides: str = ""
) -> Callable[[], dict]:
    """Checks everything and loads the model; gives the rest of the run, from measuring before to the last file.

    `recipe` is copied into the run folder, `overrides` (what the command line adds to it) noted in the summary.
    """
    start = time.perf_counter()
    arguments, config, model, _ = settings
    folder = Path(config.output_dir or "trainer_output")
    checkpoint = checkpoint_of(config)
    callbacks: list[TrainerCallback] = [LogWriter(folder / LOG_NAME)]
    if arguments.watch_collapse != "off":
        callbacks.append(CollapseCallback(action=arguments.watch_collapse))
    trainer, task = build_trainer(algorithm, settings, callbacks)
    # what it adds to a log entry is to reach the trackers and the log too
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, CollapseCallback))

    def rest() -> dict:
        is_main = trainer.accelerator.is_main_process
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / SUMMARY_NAME).unlink(missing_ok=True)
            if recipe:
                (folder / RECIPE_NAME).write_text(recipe.read_text())
        trained_from = time.perf_counter()
        before = MeasureAtStart(functools.partial(measure, trainer, task, arguments, config))
        if is_sharded(trainer):
            trainer.add_callback(before)  # until then the model is not sharded
        else:
            before()
        trainer.train(resume_from_checkpoint=checkpoint)
        train_seconds = time.perf_counter() - trained_from - before.seconds
        after = measure(trainer, task, arguments, config)
        summary = {
            "algorithm": algorithm,
            "model": model.model_name_or_path or TESTBED,
            "task": arguments.task,
            "terms": json.loads(config.entropy_terms)
            if isinstance(config.entropy_terms, str)
            else config.entropy_terms,
            "overrides": overrides,
            "seed": config.seed,
            "steps": trainer.state.global_step,
            "processes": trainer.accelerator.num_processes,
            "before": before.found,
            "after": after,
            "seconds": {"all": time.perf_counter() - start, "training": train_seconds},
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        }
        if arguments.save_final:
            trainer.save_model(str(folder))
        if config.push_to_hub:
            trainer.push_to_hub(dataset_name=arguments.dataset_name)
        if is_main:
            (folder / SUMMARY_NAME).write_text(json.dumps(summary, indent=1, default=repr) + "\n")
        trainer.end()
        if trainer.accelerator.num_processes > 1:
            time.sleep(SECONDS_TO_LET_GO)
        return summary

    return rest


def run(algorithm: Algorithm, settings: Settings) -> dict:
    """The whole job; returns what summary.json holds."""
    return prepare(algorithm, settings)()


def main(algorithm: Algorithm, arguments: Sequence[str] | None = None) -> int:
    """The command line: a mistake in the recipe is one sentence on stderr and exit code 2."""
    given = sys.argv[1:] if arguments is None else arguments
    line = with_recipe_apart(given)
    device = torch.accelerator.current_accelerator()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and (device is None or device.type == "mps"):
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would train alone
    try:
        recipe = recipe_of(line)
        at = line.index("--config") if recipe else len(line)
        rest = prepare(algorithm, parse(algorithm, line), recipe, shlex.join(line[:at] + line[at + 2 :]))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"hclm-rl {algorithm}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    rest()
    return 0
