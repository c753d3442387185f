"""What a run folder holds, read without torch: the log, the summary, the recipe; whole or cut off in the middle."""

import json
from dataclasses import dataclass, field
from pathlib import Path

LOG_NAME, SUMMARY_NAME, RECIPE_NAME = "log.jsonl", "summary.json", "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as far as it can be read; `problems` says in sentences what cannot."""

    name: str
    folder: Path
    log: list[dict] = field(default_factory=list)  # one entry a logged step
    summary: dict = field(default_factory=dict)
    recipe: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return self.log[-1]["step"] if self.log else 0

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged quantity."""
        points = [(entry["step"], entry[name]) for entry in self.log if isinstance(entry.get(name), int | float)]
        return [step for step, _ in points], [value for _, value in points]


def read_log(path: Path) -> tuple[list[dict], str | None]:
    """The entries up to the first line that cannot be read, and a sentence if there is one."""
    entries: list[dict] = []
    if not path.is_file():
        return entries, f"{path.name} is missing: the run has not logged a step."
    text = path.read_text(errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            after = f"after step {entries[-1]['step']}" if entries else "before the first step"
            return entries, f"{path.name} breaks off {after}: line {number} is incomplete."
        entries.append(entry)
    return entries, None if entries else f"{path.name} is empty: the run has not logged a step."


def read_run(name: str, folder: Path) -> Run:
    """The run in `folder`; what is missing or broken becomes a sentence, not an error."""
    if not folder.is_dir() or not any(folder.iterdir()):
        state = "is empty" if folder.is_dir() else "does not exist"
        return Run(name=name, folder=folder, problems=[f"The folder {folder} {state}: there is nothing to show."])
    log, problem = read_log(folder / LOG_NAME)
    problems = [problem] if problem else []
    summary, summary_path = {}, folder / SUMMARY_NAME
    if not summary_path.is_file():
        problems.append(f"{SUMMARY_NAME} is missing: the run has not ended.")
    else:
        try:
            summary = json.loads(summary_path.read_text())
        except json.JSONDecodeError:
            problems.append(f"{SUMMARY_NAME} is incomplete.")
    recipe_path = folder / RECIPE_NAME
    recipe = recipe_path.read_text() if recipe_path.is_file() else ""
    return Run(name=name, folder=folder, log=log, summary=summary, recipe=recipe, problems=problems)
