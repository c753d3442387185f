"""`hclm-rl doctor`: what a recipe's forces and mistakes will be, said before training

A dry run of a few optimiser steps at learning rate 0 on the recipe's own model, prompts and rewards, with one
`information_force` gauge for each surrogate. Nothing is written but what is asked for.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback

from ..chain.chain import Chain
from ..equations.forces import SURROGATES
from ..recipe.arguments import Algorithm, parse, recipe_of, with_recipe_apart
from ..recipe.config import GRPOConfig, RLOOConfig, build_chain
from ..recipe.refusals import refuse_unwritable, refuse_what_the_run_lacks
from ..responses.names import custom_code
from .diagnosis import Diagnosis, force_of, show
from .loading import build_trainer, load_rows, refuse_batch_larger_than_data
from .mistakes import (
    chain_mistakes,
    cut_off,
    memory_mistakes,
    strengths_of,
    target_mistakes,
    token_mistakes,
)

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


def dry_settings(
    config: GRPOConfig | RLOOConfig, eps: Mapping[str, float], prompts: int, steps: int, folder: str
) -> dict[str, object]:
    """What stands in for the recipe's keys: a gauge for each surrogate, `steps` on-policy steps that change nothing."""
    group = config.num_generations or 1
    rows = min(config.per_device_train_batch_size, prompts * group)
    rows = max(rows - rows % group, group)
    pieces = max(prompts * group // rows, 1)
    gauges = [
        {"information_force": {"name": of, "surrogate": of, "eps_relative": eps.get(of, 1e-4), "spectrum_every": 1}}
        for of in SURROGATES
    ]
    return {
        "entropy_terms": gauges,
        "output_dir": folder,
        "max_steps": steps,
        "learning_rate": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": pieces,
        "steps_per_generation": pieces,
        "generation_batch_size": None,
        "num_iterations": 1,
        "entropy_coef": 0.0,  # the gauges are terms, beside which TRL's own control is refused
        "use_adaptive_entropy": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "logging_strategy": "steps",
        "eval_samples": 0,
        "push_to_hub": False,
        "log_completions": False,
        "log_completions_hub_repo": None,
        "report_to": "none",
        "disable_tqdm": True,
        "save_final": False,
    }


def examine(line: Sequence[str], algorithm: Algorithm = "grpo", prompts: int = 8, steps: int = 4) -> Diagnosis:
    """`line`: --config RECIPE and any overrides, as `hclm-rl grpo` takes them."""
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
        prompts = min(prompts, len(rows)) if isinstance(rows, Dataset) else prompts
    except (ValueError, OSError, ImportError) as error:
        return unusable(error)
    mistakes += chain_mistakes(chain, config)
    _, eps, _ = strengths_of(chain)
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = parse(algorithm, line, instead=dry_settings(config, eps, prompts, steps, folder))
            trainer, _ = build_trainer(algorithm, settings, [])
            refuse_what_the_run_lacks(chain, trainer.model, config)
        except (ValueError, OSError, ImportError) as error:
            return unusable(error)
        mistakes += memory_mistakes(trainer.model, config)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "entropy" in entry]
        width = getattr(trainer.model, "config").get_text_config().hidden_size  # noqa: B009 (typed as a module)
        torch.cuda.empty_cache() if torch.cuda.is_available() else None
    found = read_from(log, recipe, chain, config, width)
    return replace(found, mistakes=mistakes + found.mistakes, seconds=time.perf_counter() - start)


def read_from(log: Sequence[dict], recipe: str, chain: Chain, config: GRPOConfig | RLOOConfig, width: int) -> Diagnosis:
    """What the dry steps show; the mistakes are those that it takes a response's length and the entropy to see."""
    coefs, _, notes = strengths_of(chain)
    forces = [force_of(name, log, coefs.get(name)) for name in SURROGATES]
    entropy, length = (statistics.fmean(entry[key] for entry in log) for key in ("entropy", "completions/mean_length"))
    mistakes, more_notes = cut_off(log, config)
    notes += more_notes
    rows_at_once = config.per_device_train_batch_size * max(config.world_size, 1)
    rollout = rows_at_once * (config.steps_per_generation or 1)  # over which terms take their statistics
    if all(entry.get("reward_std", 0) == 0 for entry in log):
        notes.append("no group of the dry run had different rewards, so there was no policy gradient to compare with")
    notes += [
        f"{name}: the states have no spread" for name, force in zip(SURROGATES, forces, strict=True) if force is None
    ]
    return Diagnosis(
        recipe=recipe,
        entropy=entropy,
        tokens_per_step=round(length * rows_at_once * config.gradient_accumulation_steps),
        width=width,
        forces=[force for force in forces if force is not None],
        mistakes=[
            *mistakes,
            *token_mistakes(chain, round(length * rollout), rollout, width),
            *target_mistakes(chain, entropy),
        ],
        notes=notes,
    )


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """As on the command line."""
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where the recipe has a mistake, one of its forces is not healthy, or none could be measured."""
    parser = argparse.ArgumentParser(
        prog="hclm-rl doctor",
        allow_abbrev=False,  # a shortened flag of the recipe's would be taken for one of these
        description="Forces, regimes and mistakes of a recipe before training. Further flags override the recipe.",
    )
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--prompts", type=int, default=8, help="of a dry step")
    parser.add_argument("--steps", type=int, default=4, help="dry steps; more of them narrow the critical coefficient")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    options, line = parser.parse_known_args(arguments)
    if options.prompts < 1 or options.steps < 1:
        raise ValueError(f"--prompts and --steps must be at least 1, got {options.prompts} and {options.steps}")
    line = with_recipe_apart(line)
    if recipe_of(line) is None:
        line = [*as_flags(DEFAULT), *line]
    found = examine(line, options.algorithm, options.prompts, options.steps)
    if options.json:
        print(json.dumps(asdict(found) | {"verdict": found.verdict}, indent=1))
    else:
        show(Console(), found)
    is_sick = any(force.is_in_recipe and force.regime != "healthy" for force in found.forces)
    return 1 if found.mistakes or is_sick or not found.forces else 0
