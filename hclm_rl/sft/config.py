"""TRL's SFTConfig with `sft_method`, and what its words mean."""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import trl

from ..recipe.named import class_name, filled, named_entry, refuse_unknown
from ..recipe.trl_range import other_trl
from .em_ft import EmFt
from .method import SftMethod

if sentence := other_trl():
    raise ImportError(sentence)

METHODS = ("curio_sft", "em_ft", "entropy_sft", "mix_ce")


def build_method(entry: SftMethod | str | Mapping[str, Any] | None) -> SftMethod | None:
    """`sft_method` as given, in Python, YAML or JSON; a ValueError says what is wrong with it in one sentence."""
    if entry is None or isinstance(entry, SftMethod):
        return entry
    name, given = named_entry(entry, "sft_method")
    refuse_unknown(name, METHODS, "sft_method")
    kind = getattr(importlib.import_module(f".{name}", __package__), class_name(name))
    return filled(kind, name, given)


def name_of(method: SftMethod) -> str:
    """As a recipe has it."""
    return type(method).__module__.rpartition(".")[2]


@dataclass
class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig plus `sft_method`.

    The fields of TRL's are as they were: https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig.

    Args:
        sft_method (`str` or `dict`, *optional*):
            What stands in place of plain cross-entropy: `"mix_ce"`, a name with hyper-parameters
            (`{"curio_sft": {"alpha": 0.5}}`), or the same as JSON text. One of `curio_sft`, `em_ft`, `entropy_sft`,
            `mix_ce`; see docs/sft.md. Without it, training is TRL's bit for bit.

    ```python
    >>> SFTConfig(output_dir="out", sft_method={"entropy_sft": {"ratio": 0.8}})
    ```
    """

    sft_method: dict | str | None = field(
        default=None,
        metadata={
            "help": f"In place of plain cross-entropy: one of {', '.join(METHODS)}, alone or with hyper-parameters, "
            '`{"curio_sft": {"alpha": 0.5}}`; in YAML a mapping, on the command line JSON.'
        },
    )

    def __post_init__(self) -> None:
        refuse_settings(self, build_method(self.sft_method))
        super().__post_init__()


def refuse_settings(config: trl.SFTConfig, method: SftMethod | None) -> None:
    """Settings of TRL's that a method cannot work with."""
    if method is None:
        return
    name = name_of(method)
    if config.loss_type == "dft":
        raise ValueError(f"{name} is a loss of its own beside loss_type 'dft': drop one of the two")
    if config.label_smoothing_factor:
        raise ValueError(f"{name} reads the label's own log-prob: set label_smoothing_factor to 0")
    if isinstance(method, EmFt) and (config.packing or config.padding_free):
        raise ValueError(f"{name} samples a response to each prompt: set packing and padding_free to false")


def as_recipe(method: SftMethod) -> dict[str, Any]:
    """What a checkpoint says of the method that made it."""
    return {name_of(method): asdict(method)}
