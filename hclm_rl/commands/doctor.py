"""`hclm-rl doctor`: what a recipe's forces and mistakes will be, said before training

A dry run of a few optimiser steps at learning rate 0 on the recipe's own model, prompts, rewards, terms and optimiser;
then each surrogate's force, pulled back to the parameters. Nothing is written but what is asked for.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from ..chain.chain import Chain
from ..chain.finite import NotFinite
from ..recipe.arguments import Algorithm, Settings, parse, recipe_of, with_recipe_apart
from ..recipe.config import GRPOConfig, RLOOConfig, build_chain
from ..recipe.refusals import refuse_unwritable, refuse_what_the_run_lacks
from ..responses.names import custom_code
from . import size_page
from .diagnosis import Diagnosis
from .dry_run import OTHERS, DryRun, Sizes, dry_run, dry_settings, generators_put_back, sizes
from .forces_of import forces_of
from .helps import of_doctor
from .loading import build_trainer, load_rows, refuse_batch_larger_than_data
from .mistakes import (
    chain_mistakes,
    cut_off,
    memory_mistakes,
    strengths_of,
    target_mistakes,
    token_mistakes,
)
from .page import show
from .precision import of_precision
from .sizes import ASKED

LEAST_STEPS = 3  # from which on a norm without its noise has an error

# The embedded default, for `hclm-rl doctor` without a recipe: the testbed as the quickstart trains on it.
DEFAULT = {
    "task": "coins",
    "task_kwargs": '{"prompts": 256}',
    "model_name_or_path": "testbed",
    "num_generations": 16,
    "per_device_train_batch_size": 128,
    "steps_per_generation": 2,
    "bf16": "false",
    "gradient_checkpointing": "false",
}


def examine(
    line: Sequence[str], algorithm: Algorithm = "grpo", prompts: int = 8, steps: int = 8, tries: bool = False
) -> Diagnosis:
    """`line`: --config RECIPE and any overrides, as `hclm-rl grpo` takes them.

    Models and optimisers are its own; the global generators are left as they were.
    """
    start = time.perf_counter()
    recipe = str(recipe_of(line) or "the embedded default")
    mistakes: list[str] = []

    def unusable(error: Exception) -> Diagnosis:
        found = [*mistakes, " ".join(str(error).split())]
        return Diagnosis(recipe=recipe, mistakes=found, seconds=time.perf_counter() - start)

    try:
        own = parse(algorithm, line)
        config = own[1]
        with custom_code(own[0].allow_custom_code):
            chain = build_chain(config.entropy_terms)
            rows = load_rows(own)
        refuse_batch_larger_than_data(rows, config)
        refuse_unwritable(Path(config.output_dir or "trainer_output"))
    except (ValueError, OSError, ImportError) as error:
        return unusable(error)
    mistakes += chain_mistakes(chain, config)
    with tempfile.TemporaryDirectory() as folder, generators_put_back():
        try:
            of = sizes(config, prompts)
            settings = parse(algorithm, line, instead=dry_settings(config, of, steps, folder))
            run = started(algorithm, settings, chain, config, of, steps)
        except (ValueError, OSError, ImportError, NotFinite) as error:
            return unusable(error)
        mistakes += memory_mistakes(run.trainer.model, config)
        try:
            found = read_from(run, recipe, chain, config, tries)
        except OSError as error:  # vectors of a large model lie on the disk, which may fill up
            return unusable(error)
        found.notes.extend(of.notes())
    return replace(found, mistakes=mistakes + found.mistakes, seconds=time.perf_counter() - start)


def started(
    algorithm: Algorithm, settings: Settings, chain: Chain, config: GRPOConfig | RLOOConfig, of: Sizes, steps: int
) -> DryRun:
    """The dry run of a recipe, whose own settings are `config`."""
    trainer, _ = build_trainer(algorithm, settings, [])
    refuse_what_the_run_lacks(chain, trainer.model, config)
    with custom_code(settings[0].allow_custom_code):
        return dry_run(trainer, of, steps, min(OTHERS, max(steps, 2)), config.learning_rate)


def read_from(
    run: DryRun, recipe: str, chain: Chain, config: GRPOConfig | RLOOConfig, tries: bool = False
) -> Diagnosis:
    """What the dry steps show; the mistakes are those that it takes a response's length and the entropy to see."""
    width = getattr(run.trainer.model, "config").get_text_config().hidden_size  # noqa: B009 (typed as a module)
    notes = strengths_of(chain)[2]
    entropy, length = (  # a step on responses that an earlier one made says nothing of their lengths
        statistics.fmean(entry[key] for entry in run.log if key in entry)
        for key in ("entropy", "completions/mean_length")
    )
    share, mistakes, more_notes = cut_off(run.log, config)
    rows_at_once = config.per_device_train_batch_size * max(config.world_size, 1)
    rollout = rows_at_once * (config.steps_per_generation or 1)  # over which terms take their statistics
    if not run.has_rewards:
        notes.append("no group of the dry run had different rewards, so there was no policy gradient to compare with")
    if len(run.gradients) < LEAST_STEPS:
        notes.append(
            f"{len(run.gradients)} dry steps do not tell a gradient from its noise, and what is said of it may be "
            f"either: --steps takes {LEAST_STEPS} or more"
        )
    precision_mistakes, precision_notes = of_precision(run)
    forces, force_notes = forces_of(run, chain, config, tries)
    return Diagnosis(
        recipe=recipe,
        entropy=entropy,
        tokens_per_step=round(length * rows_at_once * config.gradient_accumulation_steps),
        width=width,
        cut_off=share,
        forces=forces,
        mistakes=[
            *mistakes,
            *precision_mistakes,
            *token_mistakes(chain, round(length * rollout), rollout, width),
            *target_mistakes(chain, entropy),
        ],
        notes=[*notes, *more_notes, *precision_notes, *force_notes],
    )


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """As on the command line."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where the recipe has a mistake, one of its forces is not healthy, or none could be measured."""
    if any(each.split("=")[0] == ASKED for each in arguments):
        return size_page.main(arguments)
    options, line = of_doctor().parse_known_args(arguments)
    if options.prompts < 1 or options.steps < 1:
        raise ValueError(f"--prompts and --steps must be at least 1, got {options.prompts} and {options.steps}")
    line = with_recipe_apart(line)
    if recipe_of(line) is None:
        line = [*as_flags(DEFAULT), *line]
    found = examine(line, options.algorithm, options.prompts, options.steps, options.tries)
    if options.json:
        print(json.dumps(asdict(found) | {"verdict": found.verdict}, indent=1))
    else:
        show(Console(), found)
    is_sick = any(force.is_in_recipe and force.regime not in ("healthy", "not known") for force in found.forces)
    return 1 if found.mistakes or is_sick or not found.forces else 0
