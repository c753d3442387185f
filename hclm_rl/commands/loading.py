"""What a recipe names, loaded: task, rewards, data, model, and the trainer made of them."""

import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from transformers import TrainerCallback
from trl import ModelConfig, rewards
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, get_dataset
from trl.trainer.utils import get_peft_config, get_quantization_config

from ..equations.entropy_sgd import EntropySgd
from ..evaluation.reward import right_answer
from ..recipe.arguments import OWN_REWARD, REWARDS, Algorithm, RunArguments, Settings
from ..recipe.config import GRPOConfig, RLOOConfig
from ..recipe.refusals import is_fsdp1
from ..recipe.weights import entropy_sgd_of, refuse_weights
from ..responses.names import custom_code, find_function, nearest
from ..testbed import Task, find_task
from ..testbed.policy import SHAPES, policy_path
from ..trainer import GRPOTrainer, RLOOTrainer
from ..trainer.decay_to_start import DecayToStart
from .data import Rows, Splits, by_answers, load_named, no_reward

Reward = str | Callable[..., list[float | None]]

MOST_PROMPTS = 1_000_000  # that a task is asked to make
TESTBED = "testbed"  # as model_name_or_path: the shipped policy of the task
# what TRL hands to every reward function beside the columns of the data
GIVEN_TO_REWARDS = {"prompts", "completions", "completion_ids", "trainer_state"}
GIVEN_TO_REWARDS |= {"log_extra", "log_metric", "environments"}
# columns that TRL keeps to itself, and what it gives in their place
NOT_GIVEN_TO_REWARDS = {"prompt": "prompts", "completion": "completions"}
OVERLONG_CACHE = 5  # a part of so many of the longest response, in which its punishment grows: DAPO has 4096 of 20480


def find_reward(name: str, arguments: RunArguments, config: GRPOConfig | RLOOConfig) -> Reward:
    """TRL's function of that name, or the one at a dotted path."""
    if name == "get_soft_overlong_punishment":
        return soft_overlong_punishment(arguments, config.max_completion_length)
    if name == OWN_REWARD:
        return right_answer
    if name in REWARDS:
        return getattr(rewards, name)
    if "." not in name:
        raise ValueError(
            f"unknown reward function '{name:.80}'; the nearest are {nearest(name, REWARDS)}; `hclm-rl grpo --help` "
            "lists all; a dotted path names one of your own"
        )
    found = find_function(name, "reward function")
    refuse_signature(found, name)
    return found


def soft_overlong_punishment(arguments: RunArguments, longest: int | None) -> Reward:
    """TRL's, of the run's own length unless the recipe says another."""
    length = arguments.soft_overlong_length or longest
    if length is None:
        raise ValueError(
            "get_soft_overlong_punishment needs a limit: set max_completion_length or soft_overlong_length"
        )
    cache = arguments.soft_overlong_cache or max(length // OVERLONG_CACHE, 1)
    if cache > length:
        raise ValueError(f"soft_overlong_cache must be at most soft_overlong_length, {length} tokens, got {cache}")
    if longest is not None and length - cache >= longest:
        raise ValueError(
            f"get_soft_overlong_punishment begins after {length - cache} tokens (soft_overlong_length - "
            f"soft_overlong_cache) and a response ends at max_completion_length {longest}: it would punish nothing"
        )
    return rewards.get_soft_overlong_punishment(max_completion_len=length, soft_punish_cache=cache)


def refuse_signature(reward: Callable, name: str) -> None:
    """A reward function that cannot take what TRL calls it with; what it asks for by name may be a column."""
    try:
        columns = dict.fromkeys([*asked_by_name(reward), "any_column_of_the_data"])
        inspect.signature(reward).bind(**{**columns, "prompts": [], "completions": [], "completion_ids": []})
    except TypeError as error:
        raise ValueError(
            f"the reward function '{name}' must take prompts, completions, completion_ids and every column of the "
            f"data, as in `def {name.rpartition('.')[2]}(completions, **kwargs)`: {error}"
        ) from error
    except ValueError:  # a builtin, which does not say what it takes
        return


def asked_by_name(reward: Callable) -> list[str]:
    """The parameters without a default that can be given by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(reward).parameters.values()
    return [each.name for each in parameters if each.kind in by_name and each.default is inspect.Parameter.empty]


def refuse_missing_columns(reward_funcs: Iterable[Reward], rows: Rows) -> None:
    """Reward functions that ask for what the data has not; a stream may not know its columns."""
    for reward in reward_funcs:
        if rows.column_names is None or isinstance(reward, str) or not inspect.isfunction(reward):
            continue
        asked = asked_by_name(reward)
        if kept := [name for name in asked if name in NOT_GIVEN_TO_REWARDS]:
            raise ValueError(
                f"the reward function '{reward.__name__}' asks for '{kept[0]}'; TRL gives it as "
                f"'{NOT_GIVEN_TO_REWARDS[kept[0]]}', a list with one for each response"
            )
        if lacking := [name for name in asked if name not in {*rows.column_names, *GIVEN_TO_REWARDS}]:
            raise ValueError(
                f"the reward function '{reward.__name__}' asks for '{lacking[0]}', and the data has the columns "
                f"{', '.join(map(str, rows.column_names))}"
            )


def load_task(arguments: RunArguments) -> Task | None:
    if not arguments.task:
        return None
    if arguments.dataset_name:
        raise ValueError(f"the task '{arguments.task}' brings its own prompts: drop dataset_name, or drop task")
    assert not isinstance(arguments.task_kwargs, str)
    kwargs = arguments.task_kwargs or {}
    if strange := [key for key in kwargs if not isinstance(key, str)]:
        raise ValueError(f"task_kwargs of '{arguments.task}': a key must be text, got {strange[0]!r:.80}")
    for key in ("prompts", "eval_prompts"):
        count = kwargs.get(key, 1)
        if isinstance(count, int) and not 1 <= count <= MOST_PROMPTS:
            raise ValueError(f"task_kwargs of '{arguments.task}': {key} must be in 1 to {MOST_PROMPTS}, got {count}")
    try:
        return find_task(arguments.task, **kwargs)
    except (TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"task_kwargs of '{arguments.task}': {error}") from error


def shipped_policy(task: str | None) -> str:
    """The task's own; that of coins for any other (a task of the user's with its words, say)."""
    return policy_path(task) if task in SHAPES else policy_path()


def load_datasets(arguments: ScriptArguments, mixture: DatasetMixtureConfig, of_prompts: bool = True) -> Splits:
    """As in TRL's scripts, and a file, whose rows have a prompt each if `of_prompts`."""
    if mixture.datasets:
        return get_dataset(mixture)
    if not arguments.dataset_name:
        raise ValueError("the data set is missing: set task (whose prompts are its own), dataset_name or datasets")
    try:
        return load_named(arguments.dataset_name, arguments.dataset_config, arguments.dataset_streaming, of_prompts)
    except DatasetsError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"dataset_name '{arguments.dataset_name}' could not be loaded: {why:.300}") from error


def split_of(of: Splits, split: str, key: str) -> Rows:
    if split not in of:
        raise ValueError(f"the data set has no split '{split}', only {', '.join(map(str, of))}; set {key}")
    return of[split]


def train_and_held_out(
    task: Task | None, arguments: RunArguments, config: GRPOConfig | RLOOConfig, mixture: DatasetMixtureConfig
) -> tuple[Rows, Rows | None]:
    """The prompts to train on and, where the run evaluates on the way, those held out."""
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    if task is not None:
        train, held_out = task.train_dataset, task.eval_dataset if evaluates else None
    else:
        loaded = load_datasets(arguments, mixture)
        train = split_of(loaded, arguments.dataset_train_split, "dataset_train_split")
        held_out = split_of(loaded, arguments.dataset_test_split, "dataset_test_split") if evaluates else None
    refuse_rows(train, "the data to train on")
    if held_out is not None:
        refuse_rows(held_out, "the data to evaluate on")
    return train, held_out


def load_rows(settings: Settings) -> Rows:
    """What a run of these settings trains on."""
    arguments, config, _, mixture = settings
    return train_and_held_out(load_task(arguments), arguments, config, mixture)[0]


def refuse_rows(rows: Rows, what: str) -> None:
    """Data without prompts, or without any row."""
    if rows.column_names is not None and "prompt" not in rows.column_names:  # a stream may not know its columns
        raise ValueError(
            f"{what} has no column 'prompt', only {', '.join(map(str, rows.column_names))}: rename the one with the "
            "prompts (text, or the messages of a chat)"
        )
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise ValueError(f"{what} has no rows")


def refuse_batch_larger_than_data(rows: Rows, config: GRPOConfig | RLOOConfig) -> None:
    """TRL drops the prompts that do not fill a generation batch: with too few of them it would make no step."""
    batch, group = config.generation_batch_size, config.num_generations
    if not (isinstance(rows, datasets.Dataset) and batch and group) or len(rows) >= batch // group:
        return
    raise ValueError(
        f"the data has {len(rows)} prompt{'s' * (len(rows) != 1)} and a generation batch takes {batch // group} "
        f"(generation_batch_size {batch} / num_generations {group}), so no step could be made: give more prompts, or "
        f"lower steps_per_generation, gradient_accumulation_steps or per_device_train_batch_size"
    )


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
            "--accelerate_config: `hclm-rl recipes` lists the configurations"
        )


def rewards_of(arguments: RunArguments, config: GRPOConfig | RLOOConfig, task: Task | None) -> list:
    """The recipe's, in place of the task's; none where the data may have the answers."""
    found = [find_reward(name, arguments, config) for name in arguments.reward_funcs or []]
    found = found or list(task.reward_funcs if task else [])
    if not (found or arguments.dataset_name):
        raise no_reward()
    weights = config.reward_weights
    if found and weights is not None and len(weights) != len(found):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(found)} reward functions: one each")
    return found


def build_trainer(
    algorithm: Algorithm, settings: Settings, callbacks: list[TrainerCallback]
) -> tuple[GRPOTrainer | RLOOTrainer, Task | None]:
    """Everything up to the first step; a ValueError says what the recipe lacks, mostly before a model is loaded."""
    with custom_code(settings[0].allow_custom_code):
        task = load_task(settings[0])
        return trainer_of(algorithm, settings, task, callbacks), task


def path_of(arguments: RunArguments, model: ModelConfig) -> str:
    if path := model.model_name_or_path or (TESTBED if arguments.task in SHAPES else None):
        return path
    raise ValueError("the model is missing: set model_name_or_path (a folder, a name on the hub, or `testbed`)")


def trainer_of(
    algorithm: Algorithm, settings: Settings, task: Task | None, callbacks: list[TrainerCallback]
) -> GRPOTrainer | RLOOTrainer:
    """Of the recipe with its task loaded."""
    arguments, config, model, mixture = settings
    if task is not None:
        longest = task.max_completion_length
        config.max_completion_length = min(config.max_completion_length or longest, longest)
    named = rewards_of(arguments, config, task)
    train, held_out = train_and_held_out(task, arguments, config, mixture)
    reward_funcs = named or by_answers(train)
    refuse_missing_columns(reward_funcs, train.select_columns("prompt") if config.remove_unused_columns else train)
    refuse_batch_larger_than_data(train, config)
    path = path_of(arguments, model)
    config.model_init_kwargs = init_kwargs(config, model)
    has_tools = task is not None and task.environment is not None
    refuse_what_cannot_run(algorithm, arguments, config, has_tools)
    if arguments.decay_to_start is not None:  # before what writes the log
        callbacks = [DecayToStart(arguments.decay_to_start, arguments.decay_to_start_gate), *callbacks]
    outer = entropy_sgd_of(arguments.entropy_sgd) if arguments.entropy_sgd is not None else None
    refuse_weights(arguments.sigma_reparam, outer, config, model)
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
    if outer is not None:
        trainer.optimizer_cls_and_kwargs = (EntropySgd, outer.given(config.learning_rate, config.seed))
    return trainer
