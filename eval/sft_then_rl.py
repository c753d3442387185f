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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from many_runs import Job, as_script, run_all

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes/sft"
PLAIN = "plain_sft"  # what the others are compared with
AFTER_PLAIN = ("em_ft",)  # methods that need a trained policy
TASKS = ("coins", "coins_noisy")
OF_THE_RUN = {"output_dir", "seed"}  # of a recipe: said apart


def methods() -> list[str]:
    """Those with a recipe, the plain one first."""
    return sorted((file.stem for file in RECIPES.glob("*.yaml")), key=lambda name: (name != PLAIN, name))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a trial makes smaller; None: as the recipes and the board have it."""

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


def job_of(method: str, task: str, seed: int, board: Any, sizes: Sizes) -> Job:
    from cells import settings_of

    settings = {"method": method, "sft": sft_recipe(method, task, sizes), "rl": settings_of(board)}
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
    """A cell: what the start is, and what RL makes of it."""
    from cells import measured

    rl = {**job.settings["rl"], "model_name_or_path": str(make_start(job, folder)), "seed": job.seed}
    out = folder / "rl" / f"{job.name}_{job.seed}"
    return {
        "start": measured(out / "start", rl, (), trains=False),
        "after": measured(out / "after", rl, job.settings["temperatures"]),
    }


def table_of(jobs: Sequence[Job], folder: Path, board: Any) -> list[str]:
    """One task's, in Markdown."""
    from cells import COMPARED, cells_of, compared, spread, table

    cells = cells_of(jobs, folder)
    found = compared(cells, next((name for name in cells if name.endswith(PLAIN)), PLAIN), board)
    rows = []
    for name, of in cells.items():
        starts, ends = ([cell[stage]["after"]["means"] for cell in of.values()] for stage in ("start", "after"))
        own = [spread([each[key] for each in starts]) for key in ("token_entropy", "pass@1")]
        after = spread([each["token_entropy"] for each in ends])
        rows.append([f"`{name.partition('-')[2]}`", *own, after, *found[name]])
    return table(("method", "start: entropy", "pass@1", "after RL: entropy", *COMPARED), rows, board)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=methods(), default=methods())
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("runs/sft_then_rl"), help="folder of the cells and table.md")
    parser.add_argument("--config", type=Path, default=HERE / "leaderboard.yaml", help="how RL is run and measured")
    parser.add_argument("--temperatures", type=float, nargs="*", default=(0.6, 0.8, 1.2), help="beside training's")
    parser.add_argument("--max_steps", type=int, help="of RL, in place of the board's")
    parser.add_argument("--sft_steps", type=int, help="of each supervised stage, in place of the recipes'")
    parser.add_argument("--lessons", type=int, help="the first so many; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table")
    options = parser.parse_args(arguments)
    sizes = Sizes(sft_steps=options.sft_steps, lessons=options.lessons)
    from cells import board_of

    names = [PLAIN, *(name for name in options.methods if name != PLAIN)]
    boards = {task: board_of(options.config, task, options.max_steps, options.temperatures) for task in options.tasks}
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
            *table_of(of_task, options.out, board),
        ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines).lstrip() + "\n")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    as_script(main)
