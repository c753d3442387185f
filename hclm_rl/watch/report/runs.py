"""What a run folder holds, read without torch: the log, the summary, the recipe; whole or cut off in the middle."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import yaml

from ..logs import read_entries

LOG_NAME, SUMMARY_NAME, RECIPE_NAME = "log.jsonl", "summary.json", "recipe.yaml"
RUN_NAME, REPORT_NAME = "run.json", "report.html"
STATE = "collapse/state"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as far as it can be read; `problems` says in sentences what cannot."""

    name: str
    folder: Path
    log: list[dict] = field(default_factory=list)  # one entry a logged step
    summary: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)  # what a trainer of ours wrote when it began
    recipe: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The optimiser step last logged; 0 where none was."""
        return self.log[-1]["step"] if self.log else 0

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged quantity, where it was logged and is finite."""
        points = [(entry["step"], entry[name]) for entry in self.log if is_number(entry.get(name))]
        return [step for step, _ in points], [value for _, value in points]

    def pairs(self, left: str, right: str) -> list[tuple[float, float]]:
        """The values of two quantities where both were logged."""
        both = [(entry.get(left), entry.get(right)) for entry in self.log]
        return [(a, b) for a, b in both if is_number(a) and is_number(b)]


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_log(path: Path) -> tuple[list[dict], str | None]:
    """The entries up to the first line that cannot be read, and a sentence if there is one."""
    entries: list[dict] = []
    if not path.is_file():
        return entries, f"{path.name} is missing: the run has not logged a step."
    strange = 0
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            after = f"after step {entries[-1]['step']}" if entries else "before the first step"
            return entries, f"{path.name} breaks off {after}: line {number} is incomplete."
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
        else:
            strange += 1
    if strange:
        return entries, f"{path.name} is of another version: {strange} of its lines name no step and are left out."
    return entries, None if entries else f"{path.name} is empty: the run has not logged a step."


def is_measurement(value: object) -> bool:
    """What `hclm-rl` writes as `before` and `after`: None, or means with their errors."""
    if value is None:
        return True
    if not (isinstance(value, dict) and all(isinstance(value.get(key), int) for key in ("prompts", "samples"))):
        return False
    means, errors = value.get("means"), value.get("standard_errors")
    if not (isinstance(means, dict) and isinstance(errors, dict)):
        return False
    # of a single prompt there is no error: NaN
    return all(is_number(mean) and isinstance(errors.get(name), int | float) for name, mean in means.items())


IS_READABLE: dict[str, Callable[[object], bool]] = {
    "algorithm": lambda value: isinstance(value, str),
    "model": lambda value: isinstance(value, str),
    "terms": lambda value: isinstance(value, list | None),
    "overrides": lambda value: isinstance(value, str),
    "seed": lambda value: isinstance(value, int),
    "steps": lambda value: isinstance(value, int),
    "before": is_measurement,
    "after": is_measurement,
    "seconds": lambda value: isinstance(value, dict) and is_number(value.get("training")),
    "versions": lambda value: isinstance(value, dict),
}


def read_summary(path: Path) -> tuple[dict, str | None]:
    """What of the summary can be read, and a sentence if that is not all."""
    try:
        summary = json.loads(path.read_text(errors="replace"))
    except json.JSONDecodeError:
        return {}, f"{path.name} is incomplete."
    if not isinstance(summary, dict):
        return {}, f"{path.name} is not a summary of a run."
    strange = [key for key, is_readable in IS_READABLE.items() if key in summary and not is_readable(summary[key])]
    readable = {key: value for key, value in summary.items() if key not in strange}
    if strange:
        return readable, f"{path.name} is of another version: {', '.join(strange)} cannot be read and are left out."
    return readable, None


def read_about(path: Path) -> dict:
    """What was run; empty where it cannot be read."""
    try:
        found = json.loads(path.read_text(errors="replace"))
    except (OSError, json.JSONDecodeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if IS_READABLE.get(key, lambda _: True)(value)}


def how_it_ended(about: dict, log: list[dict]) -> str | None:
    """A sentence on a run that has no summary; None for one that went to its end."""
    if not about:
        return f"{SUMMARY_NAME} is missing: the run has not ended."
    if about.get("ended"):
        return None
    last = f"step {log[-1]['step']} of {log[-1].get('max_steps', '?')}" if log else "no step"
    return f"The run began at {about.get('started')} and has not ended: it is at work or broke off. It logged {last}."


def as_recipe(about: dict) -> str:
    """The settings of a run that had no recipe, in a recipe's form."""
    terms = {"entropy_terms": about["terms"]} if about.get("terms") else {}
    model = {"model_name_or_path": about["model"]} if about.get("model") else {}
    return yaml.safe_dump({**model, **terms, **(about.get("settings") or {})}, sort_keys=False)


def read_others_log(folder: Path) -> list[dict]:
    """The log of a trainer that is not ours: transformers' trainer_state.json, or TensorBoard's events."""
    try:
        entries = read_entries(folder)
    except (ValueError, OSError):
        return []
    return [entry for entry in entries if isinstance(entry.get("step"), int)]


def read_run(name: str, folder: Path) -> Run:
    """The run in `folder`; what is missing or broken becomes a sentence, not an error."""
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "is empty" if folder.is_dir() else "does not exist"
        return Run(name=name, folder=folder, problems=[f"The folder {folder} {state}: there is nothing to show."])
    log, log_problem = read_log(folder / LOG_NAME)
    about = read_about(folder / RUN_NAME)
    recipe_path = folder / RECIPE_NAME
    recipe = recipe_path.read_text(errors="replace") if recipe_path.is_file() else as_recipe(about) if about else ""
    if not (folder / LOG_NAME).is_file() and not about and (others := read_others_log(folder)):
        return Run(name=name, folder=folder, log=others, recipe=recipe)
    if (folder / SUMMARY_NAME).is_file():
        summary, problem = read_summary(folder / SUMMARY_NAME)
    else:
        summary, problem = {}, how_it_ended(about, log)
    problems = [each for each in (log_problem, problem) if each]
    return Run(name=name, folder=folder, log=log, summary=summary, about=about, recipe=recipe, problems=problems)
