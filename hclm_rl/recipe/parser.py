"""TRL's parser for recipes and flags, with every mistake said in one sentence that has the key."""

import dataclasses
import enum
import functools
import json
import typing
from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from trl.scripts.utils import TrlParser

from ..responses.names import nearest
from ..watch.secrets import HIDDEN, is_secret
from .limits import Limit
from .moved import MOVED
from .values import fits, is_mixed, options_of, shown, written

# text of these may be the path of a JSON file, of the other mappings JSON alone
FILES = ("deepspeed", "fsdp_config", "accelerator_config")
# checked where they are read, whose sentences say more
ELSEWHERE = ("task_kwargs", "reset_reference", "entropy_terms", "entropy_sgd", "sft_method", "decoding", "rollout")
# what TRL and transformers take beside the type that they declare
WIDER: Mapping[str, object] = {
    "scale_rewards": str | bool,
    "resume_from_checkpoint": str | bool | None,
    "fsdp": str | bool | list[str] | None,
    "datasets": list[dict],
    "debug": str | list[str],
    "include_num_input_tokens_seen": str | bool,
    "entropy_terms": typing.Any,
    "task_kwargs": typing.Any,
    "entropy_sgd": typing.Any,
    "sft_method": typing.Any,
    "decoding": typing.Any,
    "rollout": typing.Any,
    "reset_reference": typing.Any,
}
CHOICES: Mapping[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
}
# what YAML 1.1 makes of words without quotes
READ_AS = {False: ("off", "no"), True: ("on", "yes")}


@functools.cache
def types_of(kind: type) -> Mapping[str, object]:
    """Every key of a dataclass with its type."""
    hints = typing.get_type_hints(kind)
    return {each.name: WIDER.get(each.name, hints[each.name]) for each in dataclasses.fields(kind)}


def words_of(key: str, annotation: object) -> tuple[str, ...]:
    """The words that a key takes; none where any text will do."""
    if key in CHOICES:
        return CHOICES[key]
    words: list[str] = []
    for option in options_of(annotation):
        if typing.get_origin(option) is typing.Literal:
            words += [each for each in typing.get_args(option) if isinstance(each, str)]
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            words += [str(each.value) for each in option]
    return tuple(words)


class RecipeParser(TrlParser):
    """TRL's parser; what is wrong is said in one sentence, as a ValueError, without pages of usage.

    `instead` stands in for what recipe and flags say of its keys, of those that the algorithm knows; `limits` are
    those of a command's own keys.
    """

    instead: Mapping[str, object] = MappingProxyType({})
    limits: Mapping[str, Limit] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Namespace, list[str]]:
        """Refuses text where a mapping is meant, and puts in what a key stands for."""
        namespace, left = super().parse_known_args(*args, **kwargs)
        refuse_text_that_is_no_mapping(vars(namespace), self.known())
        vars(namespace).update({key: value for key, value in self.instead.items() if hasattr(namespace, key)})
        return namespace, left

    def error(self, message: str) -> NoReturn:
        """A mistake on the command line is a ValueError, which the command tells in one sentence."""
        raise ValueError(message)

    def known(self) -> dict[str, object]:
        """All keys with their types."""
        return {name: kind for of in self.dataclass_types for name, kind in types_of(of).items()}  # type: ignore

    def refuse_unknown_keys(self, keys: Sequence[str], line: Sequence[str]) -> None:
        """All unknown keys of recipe and command line at once; what became of those of older versions."""
        flags = [each.split("=", 1)[0] for each in line if each.startswith("--") and each != "--"]
        known = self.known()
        strange = [(key, "in the recipe") for key in keys if key not in known]
        strange += [
            (each.removeprefix("--").replace("-", "_"), "on the command line")
            for each in flags
            if each not in self._option_string_actions and each != "--help"
        ]
        if len(strange) == 1 and strange[0][0] not in MOVED:
            [(key, where)] = strange
            raise ValueError(f"unknown key '{key:.80}' {where}; the nearest known ones are {nearest(key, known)}")
        if strange:
            said = [
                f"'{key:.80}' {where} ({MOVED.get(key) or f'nearest: {nearest(key, known)}'})" for key, where in strange
            ]
            raise ValueError(f"unknown key{'s' * (len(said) > 1)} {', '.join(said)}")

    def set_defaults_with_config(self, **config: object) -> list[str]:
        known = self.known()
        return super().set_defaults_with_config(**{key: meant(key, value, known[key]) for key, value in config.items()})

    def settings(self, line: Sequence[str]) -> tuple[Any, ...]:
        """The filled dataclasses; what they raise of themselves is said as a sentence too."""
        try:
            *settings, left = self.parse_args_into_dataclasses(
                list(line), return_remaining_strings=True, look_for_args_file=False
            )
        except (TypeError, ArithmeticError, AttributeError, LookupError, AssertionError, RuntimeError) as error:
            raise ValueError(f"these settings do not go together: {type(error).__name__}: {error}") from error
        if left:
            raise ValueError(f"unexpected argument '{left[0]}'; keys are written --key value, the recipe --config FILE")
        return tuple(settings)


def meant(key: str, value: object, annotation: object) -> object:
    """A recipe's value as the key takes it, or a sentence with what it takes. The sentence is a ValueError."""
    options, words = options_of(annotation), words_of(key, annotation)
    if isinstance(value, bool) and not fits(value, annotation):
        value = next((word for word in READ_AS[value] if word in words), value)
    if isinstance(value, str):
        if words and value not in words:
            raise ValueError(f"{key} must be one of {', '.join(map(repr, words))}, got {shown(value)}")
        if words or {str, int, float, bool, typing.Any} & {*options}:
            return value  # argparse reads numbers as it would on the command line: 1e-6 is text in YAML
        if any(typing.get_origin(each) is list and str in typing.get_args(each) for each in options):
            return [value]
    if not fits(value, annotation):
        came = HIDDEN if is_secret(key) else shown(value)
        takes = f"one of {', '.join(map(repr, words))}" if words else written(annotation)
        hint = ""
        if isinstance(value, bool) and str in options:
            hint = "; YAML reads on, off, yes and no as true and false: write the word in quotes"
        elif isinstance(value, (int, float)) and str in options:
            hint = "; write it in quotes"
        raise ValueError(f"{key} must be {takes}, got {type(value).__name__} {came}{hint}")
    return value


def refuse_text_that_is_no_mapping(settings: Mapping[str, object], known: Mapping[str, object]) -> None:
    """Mappings that came as text: JSON, or for some the path of a file."""
    for key, value in settings.items():
        if key in ELSEWHERE or not isinstance(value, str) or not is_mixed(known.get(key)):
            continue
        if key in FILES and value.lstrip()[:1] != "{":
            continue
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            read = None
        if not isinstance(read, dict):
            raise ValueError(f"{key} must be a mapping, on the command line as JSON, got the text {shown(value)}")
