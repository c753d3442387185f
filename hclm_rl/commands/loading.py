"""What a recipe names, loaded: task, rewards, data, model, and the trainer made of them."""

import os
from collections.abc import Callable
from typing import Any

import datasets
from transformers import TrainerCallback
from trl import ModelConfig, rewards
from trl.scripts.utils import DatasetMixtureConfig, get_dataset
from trl.trainer.utils import get_peft_config, get_quantization_config

from ..recipe.arguments import REWARDS, Algorithm, RunArguments, Settings
from ..recipe.config import GRPOConfig, RLOOConfig
from ..recipe.refusals import is_fsdp1
from ..responses.names import find_function, nearest
from ..testbed import Task, find_task
from ..testbed.policy import SHAPES, policy_path
from ..trainer import GRPOTrainer, RLOOTrainer

Splits = datasets.DatasetDict | datasets.IterableDatasetDict
Rows = datasets.Dataset | datasets.IterableDataset
Reward = str | Callable[..., list[float | None]]

TESTBED = "testbed"  # as model_name_or_path: the shipped policy of the task


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


def split_of(of: Splits, split: str, key: str) -> Rows:
    if split not in of:
        raise ValueError(f"the data set has no split '{split}', only {', '.join(map(str, of))}; set {key}")
    return of[split]


def train_and_held_out(
    task: Task | None, arguments: RunArguments, config: GRPOConfig | RLOOConfig, mixture: DatasetMixtureConfig
) -> tuple[Rows, Rows | None]:
    """The prompts to train on and, where the run evaluates on the way, those held out."""
    evaluates = config.eval_strategy != "no"
    if task is not None:
        return task.train_dataset, task.eval_dataset if evaluates else None
    loaded = load_datasets(arguments, mixture)
    train = split_of(loaded, arguments.dataset_train_split, "dataset_train_split")
    return train, split_of(loaded, arguments.dataset_test_split, "dataset_test_split") if evaluates else None


def init_kwargs(config: GRPOConfig | RLOOConfig, model: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` gets: the recipe's keys, and over them its own `model_init_kwargs`."""
    assert not isinstance(config.model_init_kwargs, str)
    return {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }


def refuse_what_cannot_run(
    algorithm: Algorithm, arguments: RunArguments, config: GRPOConfig | RLOOConfig, has_tools: bool
) -> None:
    """A sentence for what the machine, the launcher or TRL would answer with a riddle."""
    if arguments.eval_samples and is_fsdp1(config):
        raise ValueError("eval_samples under FSDP1 was never tried: use FSDP2 (fsdp_version: 2), DDP or ZeRO")
    if has_tools and algorithm != "grpo":
        raise ValueError(f"the task '{arguments.task}' has tools, which TRL's RLOO trainer does not run: use grpo")
    if config.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started and this one sees {config.world_size}: start them with "
            "one of recipes/accelerate"
        )


def build_trainer(
    algorithm: Algorithm, settings: Settings, callbacks: list[TrainerCallback]
) -> tuple[GRPOTrainer | RLOOTrainer, Task | None]:
    """Everything up to the first step; a ValueError says what the recipe lacks, mostly before a model is loaded."""
    arguments, config, model, mixture = settings
    task = load_task(arguments)
    reward_funcs = [find_reward(name) for name in arguments.reward_funcs or []] or (task.reward_funcs if task else [])
    if not reward_funcs:
        raise ValueError(f"the reward is missing: set reward_funcs ({', '.join(REWARDS)}, or a dotted path), or task")
    train, held_out = train_and_held_out(task, arguments, config, mixture)
    if task is not None:
        longest = task.max_completion_length
        config.max_completion_length = min(config.max_completion_length or longest, longest)
    path = model.model_name_or_path or (TESTBED if arguments.task in SHAPES else None)
    if path is None:
        raise ValueError("the model is missing: set model_name_or_path (a folder, a name on the hub, or `testbed`)")
    config.model_init_kwargs = init_kwargs(config, model)
    has_tools = task is not None and task.environment is not None
    refuse_what_cannot_run(algorithm, arguments, config, has_tools)
    environment = {"environment_factory": task.environment} if task is not None and has_tools else {}
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
