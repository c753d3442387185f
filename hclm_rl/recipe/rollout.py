"""A recipe's word for where responses come from, `rollout: {cure: {top: 20}}`, as an object."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from .. import rollouts
from ..chain.chain import Chain, Link
from ..chain.coefficients import coefficient_from
from ..responses.names import find
from ..rollouts.strategy import RolloutStrategy
from .named import class_name, filled, named_entry, refuse_unknown

ROLLOUTS = ("arbitrary_entropy", "arpo", "cure", "entropy_balanced", "entropy_fork", "prompt_augmentation")
ROLLOUT_HELP = (
    f"Where responses come from in training: one of {', '.join(ROLLOUTS)}, alone or with hyper-parameters, "
    '`{"cure": {"top": 20}}`; in YAML a mapping, on the command line JSON. A dotted path names a class of your own. '
    "Without it TRL samples them."
)


def find_rollout(name: str) -> type[RolloutStrategy]:
    """The class behind a recipe's name: `entropy_fork` is rollouts/entropy_fork.py's EntropyFork.

    Refuses an unknown name, and what is no frozen dataclass of a RolloutStrategy.
    """
    if "." in name:
        found = find(name, "rollout")
    else:
        refuse_unknown(name, ROLLOUTS, "rollout")
        found = getattr(importlib.import_module(f"{rollouts.__name__}.{name}"), class_name(name))
    if (
        not (isinstance(found, type) and issubclass(found, RolloutStrategy))
        or found is RolloutStrategy
        or "__dataclass_fields__" not in vars(found)
    ):
        raise ValueError(
            f"'{name}' is not a rollout: it must be a frozen dataclass that subclasses hclm_rl.rollouts.RolloutStrategy"
        )
    return found


def build_rollout(entry: object) -> RolloutStrategy | None:
    """`rollout` as given, in Python, YAML or JSON; a ValueError says what is wrong with it in one sentence."""
    if entry is None or (isinstance(entry, RolloutStrategy) and type(entry) is not RolloutStrategy):
        return entry
    name, given = named_entry(entry, "rollout")
    return filled(find_rollout(name), name, given)


def name_of(rollout: RolloutStrategy) -> str:
    """As a recipe and the log have it; of one's own the class's name."""
    package, _, module = type(rollout).__module__.rpartition(".")
    return module if package == rollouts.__name__ else type(rollout).__name__


def refuse_settings(rollout: RolloutStrategy | None, config: Any) -> None:
    """Settings that a rollout cannot work with."""
    if rollout is None:
        return
    name = name_of(rollout)
    if config.use_vllm and (config.vllm_mode != "colocate" or config.vllm_tensor_parallel_size > 1):
        raise ValueError(
            f"the rollout '{name}' asks vLLM as often as its own responses need, and a server, or an engine over "
            "several GPUs, must be asked by all processes at once: set vllm_mode: colocate and "
            "vllm_tensor_parallel_size: 1"
        )
    if config.use_vllm and config.vllm_structured_outputs_regex is not None:
        raise ValueError(f"the rollout '{name}' draws from all words: drop vllm_structured_outputs_regex")
    if config.use_transformers_continuous_batching or config.generation_kwargs or config.cache_implementation:
        raise ValueError(
            f"the rollout '{name}' draws tokens itself, by temperature, top_p, top_k, min_p and repetition_penalty: "
            "drop use_transformers_continuous_batching, generation_kwargs and cache_implementation"
        )
    if config.num_generations is not None:
        rollout.check(config.num_generations)


def with_its_term(chain: Chain, rollout: RolloutStrategy | None) -> Chain:
    """The chain and what the rollout itself asks: of rewards before it, as advantages are made of them; of advantages
    behind it, so that what a rollout says of its own rows stands."""
    term = None if rollout is None else rollout.term()
    if rollout is None or term is None:
        return chain
    link = Link(name=name_of(rollout), term=term, coef=coefficient_from(term.default_coef))
    return Chain((*chain.links, link) if term.shapes_advantages else (link, *chain.links))


def as_words(entry: object) -> object:
    """As a recipe has it, for the config's own file."""
    if not isinstance(entry, RolloutStrategy):
        return dict(entry) if isinstance(entry, Mapping) else entry
    kind = type(entry)
    is_ours = kind.__module__.startswith(f"{rollouts.__name__}.")
    fields: dict[str, Any] = dataclasses.asdict(entry)
    return {name_of(entry) if is_ours else f"{kind.__module__}.{kind.__qualname__}": fields}
