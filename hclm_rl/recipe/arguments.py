"""What a training run is told, in YAML and on the command line: TRL's keys, the task, what is measured."""

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import yaml
from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig

from ..responses.names import nearest
from .config import GRPOConfig, RLOOConfig
from .values import fits, written

Algorithm = Literal["grpo", "rloo"]
Settings = tuple["RunArguments", GRPOConfig | RLOOConfig, ModelConfig, DatasetMixtureConfig]

TASKS = ("arithmetic", "coins", "hidden_number", "products")
REWARDS = ("accuracy_reward", "think_format_reward", "reasoning_accuracy_reward", "get_soft_overlong_punishment")


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
        metadata={"help": f"Reward functions: {', '.join(REWARDS)}, or dotted paths; they replace the task's."},
    )
    eval_samples: int = field(
        default=0,
        metadata={"help": "Responses per held-out prompt of the task, before and after training; 0: no measurement."},
    )
    eval_batch: int = field(default=1024, metadata={"help": "Responses that the measurement generates at once."})
    watch_collapse: Literal["off", "warn", "stop"] = field(
        default="warn",
        metadata={
            "help": "Log collapse/state and warn when the entropy goes astray; stop: end training once it has "
            "collapsed or explodes."
        },
    )
    save_final: bool = field(default=True, metadata={"help": "Whether to write the trained model into output_dir."})

    def __post_init__(self) -> None:
        if isinstance(self.task_kwargs, str):
            try:
                self.task_kwargs = json.loads(self.task_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"task_kwargs on the command line is JSON, as in '{{\"prompts\": 64}}': {error}"
                ) from error
        if not isinstance(self.task_kwargs, dict | None):
            raise ValueError(f"task_kwargs must be a mapping, got {self.task_kwargs!r}")
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        if self.eval_samples < 0 or self.eval_batch < 1:
            raise ValueError(
                f"eval_samples must be >= 0 and eval_batch >= 1, got {self.eval_samples} and {self.eval_batch}"
            )
        if self.eval_samples and not self.task:
            raise ValueError("eval_samples needs a task, whose verifier says which answers are right: set task")


class RecipeParser(TrlParser):
    """TRL's parser; what is wrong is said in one sentence, as a ValueError, without pages of usage.

    `instead` stands in for what recipe and flags say of its keys, of those that the algorithm knows.
    """

    instead: Mapping[str, object] = MappingProxyType({})

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        namespace, left = super().parse_known_args(*args, **kwargs)
        vars(namespace).update({key: value for key, value in self.instead.items() if hasattr(namespace, key)})
        return namespace, left

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def known(self) -> dict[str, object]:
        """All keys with their types."""
        return {
            each.name: typing.get_type_hints(of)[each.name]
            for of in self.dataclass_types
            for each in dataclasses.fields(of)
        }

    def refuse_unknown(self, key: str, where: str) -> NoReturn:
        raise ValueError(f"unknown key '{key}' {where}; the nearest known ones are {nearest(key, self.known())}")

    def set_defaults_with_config(self, **config: object) -> list[str]:
        known = self.known()
        for key, value in config.items():
            if key not in known:
                self.refuse_unknown(key, "in the recipe")
            options = set(typing.get_args(known[key]) or (known[key],))
            # text is left to argparse, which reads it as it would on the command line: 1e-6 is text in YAML
            if options <= {int, float, bool, type(None)} and not (isinstance(value, str) or fits(value, known[key])):
                raise ValueError(f"{key} must be {written(known[key])}, got {type(value).__name__} {value!r}")
        return super().set_defaults_with_config(**config)


def make_parser(algorithm: Algorithm, prog: str | None = None) -> RecipeParser:
    """The keys and flags of a run: ours, TRL's algorithm, model and data set mixture."""
    config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[algorithm]
    types: list = [RunArguments, config, ModelConfig, DatasetMixtureConfig]
    return RecipeParser(types, prog=prog)


def parse(algorithm: Algorithm, line: Sequence[str], instead: Mapping[str, object] | None = None) -> Settings:
    """Recipe and flags to settings, for its keys `instead`; a ValueError names the key at fault."""
    parser = make_parser(algorithm, prog=f"hclm-rl {algorithm}")
    parser.instead = instead or {}
    recipe = recipe_of(line)
    if recipe is not None and not recipe.is_file():
        raise ValueError(f"no recipe at '{recipe}': --config names a YAML file")
    try:
        *settings, left = parser.parse_args_and_config(line, return_remaining_strings=True)
    except yaml.YAMLError as error:
        raise ValueError(f"{recipe} is not valid YAML: {error}") from error
    for each in left:
        if each.startswith("--"):
            parser.refuse_unknown(each.removeprefix("--").split("=", 1)[0].replace("-", "_"), "on the command line")
        raise ValueError(f"unexpected argument '{each}'; keys are written --key value, the recipe --config FILE")
    return tuple(settings)  # type: ignore[return-value]


def with_recipe_apart(line: Sequence[str]) -> list[str]:
    """--config=FILE as --config FILE, the one form that TRL reads."""
    return [part for each in line for part in (each.split("=", 1) if each.startswith("--config=") else [each])]


def recipe_of(line: Sequence[str]) -> Path | None:
    """The file that --config names."""
    if "--config" not in line:
        return None
    after = line.index("--config") + 1
    if after == len(line):
        raise ValueError("--config needs the path of a recipe")
    return Path(line[after])
