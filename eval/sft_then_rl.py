"""Does entropy that is kept in supervised fine-tuning help the reinforcement learning after it?

    python eval/sft_then_rl.py --jobs 2                                              # all methods, both starts, 3 seeds
    python eval/sft_then_rl.py --methods curio_sft --tasks coins --seeds 1 2
    python eval/sft_then_rl.py --table                                               # trains nothing

The warm start of a task is made anew with each method of hclm_rl/sft (recipes/sft/<method>.yaml: 650 steps from an
untrained policy; `em_ft`, which sharpens what is there, 40 steps more from the plain start of the same seed), and then
trained as the board trains plain GRPO (eval/leaderboard.yaml, its first setting). The seed is that of both stages, and
`plain_sft` is always among them: the others are compared with it. A cell is one file in --out and never repeated; start
the same command again after an interruption. About three to four CPU minutes each on one core.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from many_runs import MADE_WITH, Job, run_all

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes/sft"
PLAIN = "plain_sft"  # what the others are compared with
AFTER_PLAIN = ("em_ft",)  # methods that need a trained policy
TASKS = ("coins", "coins_noisy")
TEMPERATURES = (0.6, 0.8, 1.2)  # beside the one of training
OF_THE_RUN = {"output_dir", "seed"}  # of a recipe: said apart


def methods() -> list[str]:
    """Those with a recipe, the plain one first."""
    return sorted((file.stem for file in RECIPES.glob("*.yaml")), key=lambda name: (name != PLAIN, name))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a trial makes smaller; None: as the recipes and the board have it."""

    max_steps: int | None = None  # of RL
    sft_steps: int | None = None
    lessons: int | None = None


def sft_recipe(method: str, task: str, sizes: Sizes) -> dict[str, Any]:
    """The method's recipe for a task; a model that stands for the plain start is named so."""
    written = yaml.safe_load((RECIPES / f"{method}.yaml").read_text())
    own = {"task": task, "model_name_or_path": PLAIN if method in AFTER_PLAIN else written["model_name_or_path"]}
    own |= {"max_steps": sizes.sft_steps or written["max_steps"]} | (
        {"lessons": sizes.lessons} if sizes.lessons else {}
    )
    return {key: value for key, value in {**written, **own}.items() if key not in OF_THE_RUN}


def board_of(config: Path, task: str, sizes: Sizes, temperatures: Sequence[float]) -> Any:
    from leaderboard.plan import Board

    written = yaml.safe_load(config.read_text())
    return Board.read(written, task, out=Path("unused"), steps=sizes.max_steps, temperatures=temperatures)


def job_of(method: str, task: str, seed: int, board: Any, sizes: Sizes) -> Job:
    rl = {**board.layers, "task_kwargs": {**board.layers["task_kwargs"], **board.splits["report"]}}
    settings = {"method": method, "sft": sft_recipe(method, task, sizes), "rl": {**rl, "eval_samples": board.samples}}
    return Job(name=f"{task}-{method}", seed=seed, settings={**settings, "temperatures": list(board.temperatures)})


def start_of(job: Job, folder: Path, method: str) -> Path:
    return folder / "starts" / f"{job.settings['sft']['task']}-{method}_{job.seed}"


def make_start(job: Job, folder: Path) -> Path:
    """The supervised stage, unless it is there; the folder of the model."""
    from hclm_rl.commands import sft
    from hclm_rl.watch.report.runs import SUMMARY_NAME

    out, recipe = start_of(job, folder, job.settings["method"]), dict(job.settings["sft"])
    file = out.with_suffix(".yaml")
    if recipe["model_name_or_path"] == PLAIN:
        recipe["model_name_or_path"] = str(start_of(job, folder, PLAIN))
    text = yaml.safe_dump({**recipe, "seed": job.seed, "output_dir": str(out)}, sort_keys=False)
    if (out / SUMMARY_NAME).is_file() and file.is_file() and file.read_text() == text:
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    sft.run(sft.parse(["--config", str(file)]))
    return out


def make(job: Job, folder: Path) -> dict:
    """A cell: the start, what it is, and what RL makes of it."""
    from leaderboard.plan import BEFORE, Run
    from leaderboard.run import SUMMARY_NAME, train

    start = make_start(job, folder)
    rl = {**job.settings["rl"], "model_name_or_path": str(start), "seed": job.seed}
    found = {}
    for stage, entry, temperatures in (("start", BEFORE, ()), ("after", PLAIN, job.settings["temperatures"])):
        out = folder / "rl" / f"{job.name}_{job.seed}" / stage
        quiet = {"output_dir": str(out), "save_final": False, "save_strategy": "no", "disable_tqdm": True}
        train(Run(folder=out, entry=entry, settings=rl, recipe={**rl, **quiet}, temperatures=tuple(temperatures)))
        found[stage] = json.loads((out / SUMMARY_NAME).read_text())
    return found


def cells_of(jobs: Sequence[Job], folder: Path) -> dict[str, dict[int, dict]]:
    """Method -> seed -> what its file holds, of those that are there and were made with these settings."""
    found: dict[str, dict[int, dict]] = {}
    for job in jobs:
        if (file := job.file(folder)).is_file():
            cell = json.loads(file.read_text())
            if cell[MADE_WITH] == json.loads(json.dumps(job.settings)):
                found.setdefault(job.settings["method"], {})[job.seed] = cell
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}" if values else "-"


COLUMNS = ("method", "start: entropy", "pass@1", "pass@32", "after RL: entropy", "pass@1", "pass@32", "AUC")
MATCHED = ("AUC at plain's pass@1", "Δ plain", "seeds")


def table(cells: Mapping[str, Mapping[int, dict]], board: Any) -> list[str]:
    """One task's, in Markdown."""
    from leaderboard.temperatures import curve_of, difference, matched, written

    curves = {name: {seed: curve_of(cell["after"], board) for seed, cell in of.items()} for name, of in cells.items()}
    reference = {seed: curve[board.trained_at] for seed, curve in curves.get(PLAIN, {}).items()}
    areas = {name: matched(of, reference) for name, of in curves.items()}
    areas[PLAIN] = {seed: point.areas for seed, point in reference.items()}
    most = f"pass@{max(board.pass_ks)}"
    lines = ["| " + " | ".join((*COLUMNS, *MATCHED)).replace("pass@32", most) + " |"]
    lines += ["|" + "---|" * len((*COLUMNS, *MATCHED))]
    for name, of in cells.items():
        means = {stage: [cell[stage]["after"]["means"] for cell in of.values()] for stage in ("start", "after")}
        row = [f"`{name}`"]
        for stage in ("start", "after"):
            row += [
                spread([each[key] for each in means[stage] if key in each]) for key in ("token_entropy", "pass@1", most)
            ]
        row += [spread([curve[board.trained_at].area for curve in curves[name].values()])]
        row += [spread([float(area.mean()) for area in areas[name].values()])]
        row += [written(difference(areas[name], areas[PLAIN])), ", ".join(map(str, sorted(of)))]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/sft_then_rl"), help="folder of the cells and table.md")
    parser.add_argument("--config", type=Path, default=HERE / "leaderboard.yaml", help="how RL is run and measured")
    parser.add_argument("--temperatures", type=float, nargs="*", default=TEMPERATURES, help="beside that of training")
    parser.add_argument("--max_steps", type=int, help="of RL, in place of the board's")
    parser.add_argument("--sft_steps", type=int, help="of each supervised stage, in place of the recipes'")
    parser.add_argument("--lessons", type=int, help="the first so many; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table")
    options = parser.parse_args(arguments)
    sizes = Sizes(max_steps=options.max_steps, sft_steps=options.sft_steps, lessons=options.lessons)
    names = [PLAIN, *(name for name in options.methods if name != PLAIN)]
    boards = {task: board_of(options.config, task, sizes, options.temperatures) for task in options.tasks}
    jobs = [
        job_of(name, task, seed, board, sizes)
        for seed in options.seeds
        for task, board in boards.items()
        for name in names
    ]
    failed = []
    for is_second in (False, True):  # what starts from the plain start waits for it
        wave = [job for job in jobs if (job.settings["method"] in AFTER_PLAIN) == is_second]
        failed += [] if options.table else run_all(make, wave, options.out, options.jobs)
    lines = []
    for task, board in boards.items():
        of_task = [job for job in jobs if job.settings["sft"]["task"] == task]
        lines += [
            "",
            f"{task}, {board.layers['max_steps']} steps of RL:",
            "",
            *table(cells_of(of_task, options.out), board),
        ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines).lstrip() + "\n")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are stopped
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
