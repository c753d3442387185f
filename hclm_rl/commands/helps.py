"""What `hclm-rl VERB --help` says, without torch: a screen. Every key of a verb that trains: `--help_all`."""

import argparse
from collections.abc import Callable
from typing import Final

ALL = "--help_all"
SCORES: Final = ("logits", "head", "steer", "log_det")


def trains(verb: str, about: str) -> argparse.ArgumentParser:
    """The keys most used, of some hundred that a recipe may have."""
    parser = argparse.ArgumentParser(
        prog=f"hclm-rl {verb}",
        usage=f"hclm-rl {verb} --config RECIPE [--KEY VALUE ...]",
        description=f"{about} A recipe is a YAML file of keys; every key is a flag too, and a flag wins.",
        epilog="`hclm-rl recipes` lists the recipes that come along. docs/recipe_keys.md explains the keys.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RECIPE", help="the recipe, a YAML file")
    return parser


def ends(parser: argparse.ArgumentParser, keys: dict[str, str]) -> argparse.ArgumentParser:
    for key, meaning in keys.items():
        parser.add_argument(f"--{key}", help=meaning, metavar="VALUE")
    parser.add_argument("--allow_custom_code", action="store_true", help="trust the code that the recipe names")
    parser.add_argument("--quiet", action="store_true", help="no progress, no log lines, no warnings")
    parser.add_argument(ALL, action="store_true", help="every key, TRL's and transformers' too: some hundred")
    return parser


COMMON = {
    "model_name_or_path": "a folder or a hub name; `testbed` for the task's own policy",
    "dataset_name": "problems.jsonl, a folder or a hub name (docs/data.md)",
    "output_dir": "the run's folder",
    "max_steps": "optimiser steps",
    "learning_rate": "of the optimiser",
    "seed": "of data order and sampling",
}


def of_rl(verb: str) -> argparse.ArgumentParser:
    own = {
        "entropy_terms": "JSON, as in '[\"hold_coverage\"]'; `hclm-rl methods` lists them",
        "task": "coins, arithmetic, products, ... or the dotted path of a function of yours",
        **COMMON,
        "reward_funcs": "a reward's name, or the dotted path of a function of yours",
        "num_generations": "responses to a prompt",
        "max_completion_length": "tokens of a response",
        "eval_samples": "responses per held-out prompt, before and after training; 0: none",
        "watch_collapse": "warn, stop or off: what to do when the entropy collapses",
        "accelerate_config": "NAME or FILE: how several processes are started",
        "num_processes": "how many of them",
    }
    return ends(trains(verb, f"Trains with {verb.upper()}."), own)


def of_sft() -> argparse.ArgumentParser:
    own = {"sft_method": "a method's name or JSON, in place of plain cross-entropy (docs/sft.md)", **COMMON}
    return ends(trains("sft", "Supervised fine-tuning."), own)


def of_generate() -> argparse.ArgumentParser:
    own = {
        "decoding": "a method's name or JSON (docs/decoding.md)",
        "model_name_or_path": "a folder or a hub name",
        "task": "as of `hclm-rl eval`",
        "samples": "responses per problem",
        "temperature": "of sampling",
        "max_new_tokens": "of a response",
        "seed": "of sampling",
        "output_dir": "gets responses.jsonl and summary.json",
    }
    return ends(trains("generate", "Responses with a method of decoding, and what they cost."), own)


def of_doctor() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hclm-rl doctor",
        allow_abbrev=False,  # a shortened flag of the recipe's would be taken for one of these
        description="Forces, regimes and mistakes of a recipe before training. Further flags override the recipe.",
        epilog="Needs --config RECIPE. With --model-size 7B it tells what a recipe holds and takes at that size.",
    )
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--prompts", type=int, default=8, help="most of a dry step, where the recipe's has more")
    parser.add_argument("--steps", type=int, default=8, help="dry steps; more of them narrow what is told")
    parser.add_argument("--try", dest="tries", action="store_true", help="in a copy: first order, realised, bend")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    return parser


def of_ablate() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hclm-rl ablate",
        allow_abbrev=False,  # a shortened flag of the recipe's would be taken for one of these
        description="One step of the recipe, without its terms, taken without each tenth of its tokens. Further flags "
        "override the recipe.",
        epilog="Needs --config RECIPE.",
    )
    parser.add_argument("--algorithm", choices=("grpo", "rloo"), default="grpo")
    parser.add_argument("--score", choices=SCORES, default="logits", help="by which tokens are sorted (logits)")
    parser.add_argument("--parts", type=int, default=10, help="of equally many tokens (10)")
    parser.add_argument("--prompts", type=int, default=16, help="of the step (16)")
    parser.add_argument("--batches", type=int, default=4, help="the last is the step, the others are held out (4)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


# the verbs whose own modules import torch
HELPS: Final[dict[str, Callable[[], argparse.ArgumentParser]]] = {
    "grpo": lambda: of_rl("grpo"),
    "rloo": lambda: of_rl("rloo"),
    "sft": of_sft,
    "generate": of_generate,
    "doctor": of_doctor,
    "ablate": of_ablate,
}
