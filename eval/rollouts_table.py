"""Ways to make responses (hclm_rl/rollouts), each trained on as many drawn tokens as plain sampling.

    python eval/rollouts_table.py --jobs 2                                     # coins, 3 seeds, those without tools
    python eval/rollouts_table.py --rollouts cure --seeds 1 --max_steps 100
    python eval/rollouts_table.py --task hidden_number --rollouts arpo entropy_balanced --temperatures
    python eval/rollouts_table.py --table                                      # trains nothing

Plain GRPO is trained as on the board (eval/leaderboard.yaml, its first setting), and the tokens that it draws are
counted. A rollout then trains until it has drawn as many on the same seed, at most --most_steps times plain's steps:
one that branches off from what is there draws fewer tokens a response and so makes more steps. The other way, more
responses a step, would change the group's baseline and the batch, and so compare two settings of GRPO instead of two
rollouts; the price is that the branching one also makes more updates, which the table shows. Tokens and steps are
counted where they are drawn; seconds are those of training, MiB the process's highest resident memory in a run.
A rollout's values are those of its recipe. A cell is one file in --out and never repeated.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from many_runs import Job, as_script, run_all

HERE = Path(__file__).parent
PLAIN = "plain"
WITHOUT_TOOLS = ("cure", "entropy_fork", "arbitrary_entropy", "prompt_augmentation")
PEAK, FORGET = "VmHWM:", "5"  # of Linux: the highest resident memory, and how it is set back


def rollout_of(name: str) -> dict | None:
    """As its recipe has it, else at its defaults."""
    from hclm_rl.recipe.shipped import shipped_recipes

    if name == PLAIN:
        return None
    for file in shipped_recipes().values():
        written = yaml.safe_load(file.read_text()).get("rollout")
        if written and name in written:
            return written
    return {name: {}}


def job_of(name: str, seed: int, board: Any, budget: int | None, most_steps: int) -> Job:
    from cells import settings_of

    rl = settings_of(board) | {"logging_steps": 1}
    if name != PLAIN:
        rl |= {"rollout": rollout_of(name), "max_steps": most_steps * rl["max_steps"]}
    settings = {"rl": rl, "budget": budget, "temperatures": list(board.temperatures)}
    return Job(name=name, seed=seed, settings=settings)


def counter(responses: int, budget: int | None) -> Any:
    """A callback that counts the tokens drawn in training and ends it once there are `budget` of them.

    `responses` of a generation batch: plain sampling logs their mean length alone. Needs a log of every step.
    """
    from transformers import TrainerCallback

    class Counter(TrainerCallback):
        def __init__(self) -> None:
            self.drawn = self.reused = self.returned = 0

        def on_log(self, args, state, control, logs=None, **_) -> None:
            if logs is None or "completions/mean_length" not in logs or "loss" not in logs:
                return
            # TRL's length leaves out what is not in the loss, which in plain sampling is nothing
            returned = round(logs.get("rollout/tokens_returned", logs["completions/mean_length"] * responses))
            self.returned += returned
            self.drawn += round(logs.get("rollout/tokens_drawn", returned))
            self.reused += round(logs.get("rollout/tokens_reused", 0))
            if budget is not None and self.drawn >= budget:
                control.should_training_stop = True

    return Counter()


def highest_memory() -> float | None:
    """MiB, since it was last forgotten; None where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(PEAK)), None)


def make(job: Job, folder: Path) -> dict:
    """A cell: the run's summary and what it drew."""
    from cells import measured

    rl = {**job.settings["rl"], "seed": job.seed}
    count = counter(rl["per_device_train_batch_size"] * rl.get("steps_per_generation", 1), job.settings["budget"])
    if (forget := Path("/proc/self/clear_refs")).is_file():
        forget.write_text(FORGET)
    summary = measured(folder / "runs" / f"{job.name}_{job.seed}", rl, job.settings["temperatures"], count)
    tokens = {"drawn": count.drawn, "reused": count.reused, "returned": count.returned}
    return {"after": summary, "tokens": tokens, "mib": highest_memory()}


def table_of(jobs: Sequence[Job], folder: Path, board: Any) -> list[str]:
    """In Markdown, plain sampling first."""
    from cells import COMPARED, cells_of, compared, table

    def mean(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.0f}"

    cells = cells_of(jobs, folder)
    found, rows = compared(cells, PLAIN, board), []
    for name, of in cells.items():
        tokens = [cell["tokens"] for cell in of.values()]
        memory = [cell["mib"] for cell in of.values() if cell["mib"] is not None]
        own = [mean([cell["after"]["steps"] for cell in of.values()])]
        own += [mean([each[key] / 1000 for each in tokens]) for key in ("drawn", "reused", "returned")]
        own += [
            mean([cell["after"]["seconds"]["training_cpu"] for cell in of.values()]),
            mean(memory) if memory else "-",
        ]
        rows.append([f"`{name}`", *own, *found[name]])
    costs = ("rollout", "steps", "drawn, k", "reused, k", "returned, k", "CPU s", "MiB")
    return table((*costs, *COMPARED), rows, board)


def main(arguments: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--rollouts", nargs="+", default=WITHOUT_TOOLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--task", default="coins", help="of eval/leaderboard.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/rollouts"), help="folder of the cells and table.md")
    parser.add_argument("--config", type=Path, default=HERE / "leaderboard.yaml", help="how RL is run and measured")
    parser.add_argument("--temperatures", type=float, nargs="*", default=(0.6, 0.8, 1.2), help="beside training's")
    parser.add_argument("--max_steps", type=int, help="of plain sampling, in place of the board's")
    parser.add_argument("--most_steps", type=int, default=3, help="times plain's, of a rollout")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table")
    options = parser.parse_args(arguments)
    from cells import board_of, cells_of

    from hclm_rl.recipe.rollout import build_rollout

    for name in options.rollouts:
        build_rollout(rollout_of(name))  # says what is wrong
    board = board_of(options.config, options.task, options.max_steps, options.temperatures)
    plain = [job_of(PLAIN, seed, board, None, 1) for seed in options.seeds]
    failed = [] if options.table else run_all(make, plain, options.out, options.jobs)
    budgets = {seed: cell["tokens"]["drawn"] for seed, cell in cells_of(plain, options.out).get(PLAIN, {}).items()}
    jobs = [
        job_of(name, seed, board, budgets[seed], options.most_steps)
        for seed in options.seeds
        for name in options.rollouts
        if seed in budgets
    ]
    failed += [] if options.table else run_all(make, jobs, options.out, options.jobs)
    lines = [f"{options.task}, as many tokens as plain sampling draws in {board.layers['max_steps']} steps:", ""]
    lines += table_of([*plain, *jobs], options.out, board)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if failed else 0


if __name__ == "__main__":
    as_script(main)
