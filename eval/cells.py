"""What the scripts share that train as the board does: one run measured, many compared at plain GRPO's pass@1."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from leaderboard.plan import BEFORE, Board, Run
from leaderboard.run import SUMMARY_NAME, train
from leaderboard.temperatures import curve_of, difference, matched, written
from many_runs import MADE_WITH, Job
from transformers import TrainerCallback

Cells = Mapping[str, Mapping[int, dict]]  # what is compared -> seed -> what its file holds


def board_of(config: Path, task: str, steps: int | None, temperatures: Sequence[float]) -> Board:
    """The board's first setting of a task."""
    return Board.read(
        yaml.safe_load(config.read_text()), task, out=Path("unused"), steps=steps, temperatures=temperatures
    )


def settings_of(board: Board) -> dict[str, Any]:
    """Plain GRPO on the board and how it is measured, as a recipe."""
    kwargs = {**board.layers["task_kwargs"], **board.splits["report"]}
    return {**board.layers, "task_kwargs": kwargs, "eval_samples": board.samples}


def measured(
    out: Path,
    settings: Mapping[str, Any],
    temperatures: Sequence[float],
    *callbacks: TrainerCallback,
    trains: bool = True,
) -> dict:
    """The summary of a run in the folder `out`, of the policy it starts from where it does not train."""
    quiet = {"output_dir": str(out), "save_final": False, "save_strategy": "no", "disable_tqdm": True}
    own = dict(settings)
    recipe = {**own, **quiet}
    entry = out.name if trains else BEFORE
    train(Run(folder=out, entry=entry, settings=own, recipe=recipe, temperatures=tuple(temperatures)), callbacks)
    return json.loads((out / SUMMARY_NAME).read_text())


def cells_of(jobs: Sequence[Job], folder: Path) -> dict[str, dict[int, dict]]:
    """Those that are there, by the job's name; a sentence where one was made with other settings."""
    found: dict[str, dict[int, dict]] = {}
    for job in jobs:
        if (file := job.file(folder)).is_file():
            cell = json.loads(file.read_text())
            if cell[MADE_WITH] != json.loads(json.dumps(job.settings)):
                raise SystemExit(f"{file} was made with other settings: remove it, or name another folder")
            found.setdefault(job.name, {})[job.seed] = cell
    return found


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± deviation over seeds."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def compared(cells: Cells, reference: str, board: Board) -> dict[str, list[str]]:
    """By name what COMPARED names of the runs' ends; all are compared with the reference on the same seeds."""
    summaries = {name: {seed: cell["after"] for seed, cell in of.items()} for name, of in cells.items()}
    curves = {name: {seed: curve_of(each, board) for seed, each in of.items()} for name, of in summaries.items()}
    points = {seed: curve[board.trained_at] for seed, curve in curves.get(reference, {}).items()}
    areas = {name: matched(of, points) for name, of in curves.items()}
    areas[reference] = {seed: point.areas for seed, point in points.items()}
    most = f"pass@{max(board.pass_ks)}"
    found = {}
    for name, of in summaries.items():
        means = [each["after"]["means"] for each in of.values()]
        found[name] = [
            spread([each["pass@1"] for each in means]),
            spread([each[most] for each in means if most in each]),
            spread([curve[board.trained_at].area for curve in curves[name].values()]),
            spread([float(area.mean()) for area in areas[name].values()]),
            written(difference(areas[name], areas[reference])),
            ", ".join(map(str, sorted(of))),
        ]
    return found


COMPARED = ("pass@1", "pass@{most}", "AUC", "AUC at plain's pass@1", "Δ plain", "seeds")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], board: Board) -> list[str]:
    """In Markdown."""
    head = [each.format(most=max(board.pass_ks)) for each in columns]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
