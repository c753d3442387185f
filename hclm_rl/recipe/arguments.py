"""What a training run is told, in YAML and on the command line: TRL's keys, the task, what is measured."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments
from trl.trainer.model_config import ModelConfig

from ..responses.names import FLAG, custom_code
from .config import GRPOConfig, RLOOConfig
from .custom_code import refuse_unnamed_code, variables_of
from .late import refuse_what_fails_late
from .limits import refuse_out_of_range
from .packages import refuse_missing_packages
from .parser import RecipeParser
from .reading import read_recipe
from .shipped import recipe_at
from .weights import entropy_sgd_of

Algorithm = Literal["grpo", "rloo"]
Settings = tuple["RunArguments", GRPOConfig | RLOOConfig, ModelConfig, DatasetMixtureConfig]

TASKS = ("arithmetic", "coins", "coins_noisy", "hidden_number", "products")
OWN_REWARD = "right_answer"  # hclm_rl/evaluation/reward.py; the others are TRL's
REWARDS = (
    "accuracy_reward",
    "think_format_reward",
    "reasoning_accuracy_reward",
    "get_soft_overlong_punishment",
    OWN_REWARD,
)


@dataclass
class RunArguments(ScriptArguments):
    """TRL's script arguments plus what says where prompts and rewards come from, and what is measured."""

    task: str | None = field(
        default=None,
        metadata={
            "help": f"A task with its prompts, rewards and verifier: {', '.join(TASKS)}, or the dotted path of a "
            "function that returns a Task. It stands in place of a data set."
        },
    )
    task_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of the task: in YAML a mapping, on the command line JSON."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Reward functions: {', '.join(REWARDS)}, or dotted paths; they replace the task's. Default, where "
            f"the data has a column `answer`: {OWN_REWARD}."
        },
    )
    eval_samples: int = field(
        default=0,
        metadata={"help": "Responses per held-out prompt of the task, before and after training; 0: no measurement."},
    )
    eval_batch: int = field(default=1024, metadata={"help": "Responses that the measurement generates at once."})
    decay_to_start: float | None = field(
        default=None,
        metadata={
            "help": "After each optimiser step, pull weights back to where training began, this many times the "
            "learning rate, but where the gradient says that they are learning something (Adam's moments)."
        },
    )
    decay_to_start_gate: bool = field(
        default=True, metadata={"help": "False: the decay without that gate, all weights alike, as a control."}
    )
    reset_reference: dict | str | None = field(
        default=None,
        metadata={
            "help": "When the policy becomes the reference of the KL and the optimiser starts anew (ProRL): every, "
            "steps, or patience with min_gain and metric; keeps_scale. In YAML a mapping, on the command line JSON."
        },
    )
    soft_overlong_length: int | None = field(
        default=None,
        metadata={"help": "Tokens from which on get_soft_overlong_punishment pays -1; default: max_completion_length."},
    )
    soft_overlong_cache: int | None = field(
        default=None,
        metadata={"help": "Tokens before that in which its punishment grows from 0 to -1; default: a fifth of them."},
    )
    sigma_reparam: bool = field(
        default=False,
        metadata={
            "help": "Whether to train under sigmaReparam: each linear layer over its largest singular value, times a "
            "number that is learnt. The model starts unchanged and is written plain."
        },
    )
    entropy_sgd: dict | str | None = field(
        default=None,
        metadata={
            "help": "Entropy-SGD in place of optim, with hyper-parameters, `{inner_steps: 20}`; its lr (default: "
            "learning_rate) is that of the outer steps, each of which takes inner_steps optimiser steps."
        },
    )
    allow_custom_code: bool = field(
        default=False,
        metadata={
            "help": "On the command line only: let the recipe name code from outside the library by dotted paths, and "
            "bring code along with a model. SECURITY.md says what that trusts."
        },
    )
    save_final: bool = field(default=True, metadata={"help": "Whether to write the trained model into output_dir."})

    def __post_init__(self) -> None:
        for name, example in (("task_kwargs", '{"prompts": 64}'), ("reset_reference", '{"every": 200}')):
            if isinstance(given := vars(self)[name], str):
                try:
                    given = json.loads(given)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} on the command line is JSON, as in '{example}': {error}") from error
                setattr(self, name, given)
            if not isinstance(given, dict | None):
                raise ValueError(f"{name} must be a mapping, got {given!r}")
        if self.entropy_sgd is not None:
            entropy_sgd_of(self.entropy_sgd)  # says what is wrong
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.eval_samples < 0 or self.eval_batch < 1:
            raise ValueError(
                f"eval_samples must be >= 0 and eval_batch >= 1, got {self.eval_samples} and {self.eval_batch}"
            )
        if self.eval_samples and not self.task:
            raise ValueError("eval_samples needs a task, whose verifier says which answers are right: set task")


def make_parser(algorithm: Algorithm, prog: str | None = None) -> RecipeParser:
    """The keys and flags of a run: ours, TRL's algorithm, model and data set mixture."""
    config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[algorithm]
    types: list = [RunArguments, config, ModelConfig, DatasetMixtureConfig]
    return RecipeParser(types, prog=prog)


def parse(algorithm: Algorithm, line: Sequence[str], instead: Mapping[str, object] | None = None) -> Settings:
    """Recipe and flags to settings, for its keys `instead`; a ValueError names the key at fault."""
    parser = make_parser(algorithm, prog=f"hclm-rl {algorithm}")
    parser.instead = instead or {}
    return settings_by(parser, line)


def settings_by(parser: RecipeParser, line: Sequence[str]) -> tuple[Any, ...]:
    """One object of each of the parser's types, with the refusals that the recipes of all commands share."""
    recipe = recipe_of(line)
    given = read_recipe(recipe) if recipe is not None else {}
    at = line.index("--config") if recipe is not None else len(line)
    flags = [*line[:at], *line[at + 2 :]]
    parser.refuse_unknown_keys([key for key in given if key != "env"], flags)
    if "allow_custom_code" in given:
        raise ValueError(f"allow_custom_code is {FLAG} on the command line only: a recipe may not allow it to itself")
    parser.set_defaults_with_config(**{key: value for key, value in given.items() if key != "env"})
    named = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    if "use_cpu" in parser.known() and is_left_to_cpu({*given, *named}):
        flags += ["--use_cpu", "true"]
    words, _ = parser.parse_known_args(flags)
    refuse_out_of_range(vars(words), parser.limits)
    refuse_missing_packages(vars(words))
    if not words.allow_custom_code:
        refuse_unnamed_code(given)
    set_environment(given)
    with custom_code(words.allow_custom_code):
        settings = parser.settings(flags)
    for each in settings:
        if isinstance(each, TrainingArguments):
            refuse_what_fails_late(each)
    return settings


def is_left_to_cpu(named: Collection[str]) -> bool:
    """Whether no accelerator is there and nothing is said of it: TRL's default, bfloat16, would end such a run."""
    return not torch.accelerator.is_available() and not {"use_cpu", "bf16", "fp16"} & {*named}


def set_environment(recipe: Mapping[str, object]) -> None:
    """What stands below `env`, as TRL has it. Refuses what is no name with a value."""
    env = recipe.get("env") or {}
    if not isinstance(env, Mapping):
        raise ValueError(f"env must be names and values, as in `WANDB_PROJECT: mine`, got {type(env).__name__}")
    for name in variables_of(recipe):
        value = env[name]
        is_name = isinstance(name, str) and name and not {"=", "\0"} & set(name)
        if not is_name or not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise ValueError(f"env must be names and values, as in `WANDB_PROJECT: mine`, got {name!r:.80}")
        os.environ[name] = str(value)


def with_recipe_apart(line: Sequence[str]) -> list[str]:
    """--config=FILE as --config FILE, the one form that TRL reads."""
    return [part for each in line for part in (each.split("=", 1) if each.startswith("--config=") else [each])]


def recipe_of(line: Sequence[str]) -> Path | None:
    """The file that --config names. Refuses it twice, or without a path."""
    if "--config" not in line:
        return None
    if line.count("--config") > 1:
        raise ValueError("--config came twice: a run has one recipe, and flags override its keys")
    after = line.index("--config") + 1
    if after == len(line):
        raise ValueError("--config needs the path of a recipe")
    return recipe_at(Path(line[after]))
