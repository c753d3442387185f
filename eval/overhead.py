"""What the terms cost: the time of one optimiser step and the peak memory, against stock TRL.

`make bench` measures on SmolLM2-135M. All trainers live in one process and take turns, one optimiser step each in a
random order, so that the machine's ups and downs hit all alike. The ratio is that of the medians; beside it stand the
quartiles of the ratios to stock TRL's step of the same round; CPU seconds are steadier on a shared machine.
Completions are fixed (no generation), so the step is shorter and the ratios stricter than in a real run. Peak memory is
that of a process of its own per row.
"""

import argparse
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import trl
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hclm_rl
from hclm_rl.testbed.task import find_task

CHAINS: dict[str, list | None] = {
    "stock TRL": None,
    "empty chain": [],
    "clip_cov": ["clip_cov"],
    "log_det": ["log_det"],
    "information_force": ["information_force"],
    "entropy_flow": ["entropy_flow"],
    "entropy_flow, head": [{"entropy_flow": {"through": "head"}}],
}
LIMITS = {"empty chain": 1.01, "clip_cov": 1.03, "log_det": 1.06, "information_force": 1.10, "entropy_flow, head": 1.15}
RESPONSES = 16  # per optimiser step
SETTINGS = {
    "on-policy": {"per_device_train_batch_size": RESPONSES},
    # TRL makes the pass for old log-probs itself
    "off-policy": {"per_device_train_batch_size": RESPONSES, "num_iterations": 2},
    # on-policy in two halves: the statistics of the step need a pass before the first half's backward
    "accumulated": {"per_device_train_batch_size": RESPONSES // 2, "gradient_accumulation_steps": 2},
}


class TakesTurns(TrainerCallback):
    """Lets one trainer at a time take one optimiser step, and times it."""

    def __init__(self, turn: threading.Semaphore, done: threading.Semaphore) -> None:
        self.turn, self.done = turn, done
        self.seconds: list[tuple[float, float]] = []  # wall, CPU of the process

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn.acquire()
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))
        self.done.release()


def same_completions(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Eight fixed tokens after each prompt, the same for every trainer and step: nothing is generated."""
    tokenizer = trainer.processing_class
    prompt_ids = tokenizer(prompts)["input_ids"]
    texts = [f" {17 + 3 * i % 80}\n" for i in range(len(prompts))]
    completion_ids = [(tokenizer(text)["input_ids"] * 4)[:8] for text in texts]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def every_other(completions: list[str], **_: Any) -> list[float | None]:
    """A reward with spread in every group."""
    return [float(i % 2) for i in range(len(completions))]


def build(name: str, model: Any, setting: str, steps: int, out: Path) -> Any:
    """The trainer of one row; all rows of a process may share the model, each has its own optimiser."""
    terms = CHAINS[name]
    config = trl.GRPOConfig if terms is None else hclm_rl.GRPOConfig
    changes: dict[str, Any] = dict(SETTINGS[setting])
    if terms is not None:
        changes["entropy_terms"] = terms
    args = config(
        output_dir=str(out),
        num_generations=8,
        max_completion_length=8,
        max_steps=steps,
        learning_rate=1e-7,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    trainer = trl.GRPOTrainer if terms is None else hclm_rl.GRPOTrainer
    task = find_task("arithmetic", problem="sums", prompts=64)
    return trainer(
        model=model,
        reward_funcs=every_other,
        args=args,
        train_dataset=task.train_dataset,
        processing_class=tokenizer_of(model),
        rollout_func=same_completions,
    )


def tokenizer_of(model: Any) -> Any:
    """The tokenizer beside the model."""
    return AutoTokenizer.from_pretrained(model.config._name_or_path)


def take_turns(names: list[str], model: Any, setting: str, rounds: int, out: Path) -> dict[str, list]:
    """(wall, CPU) seconds of every optimiser step of every row, the first two rounds left out as warm-up."""
    done = threading.Semaphore(0)
    turns = {name: threading.Semaphore(0) for name in names}
    callbacks = {name: TakesTurns(turns[name], done) for name in names}
    threads, broken = [], []

    def run(trainer: Any) -> None:
        try:
            trainer.train()
        except Exception as error:
            broken.append(error)
            done.release()  # whoever waits for a step of it

    for name in names:
        trainer = build(name, model, setting, rounds, out / name.replace(" ", "_"))
        trainer.add_callback(callbacks[name])
        threads.append(threading.Thread(target=run, args=(trainer,), daemon=True))
    for thread in threads:
        thread.start()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            turns[name].release()
            done.acquire()
            if broken:
                raise broken[0]
    for thread in threads:
        thread.join()
    return {name: callbacks[name].seconds[2:] for name in names}


def peak_memory(name: str, model: str, setting: str, out: Path) -> float:
    """Peak resident memory in MiB of a process that makes four steps of one row."""
    command = [sys.executable, __file__, "--model", model, "--out", str(out), "--memory-of", name, "--setting", setting]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of the prepared model")
    parser.add_argument("--rounds", type=int, default=14, help="steps of each row, the first two left out")
    parser.add_argument("--setting", choices=[*SETTINGS, "all"], default="all")
    parser.add_argument("--rows", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--memory-of", choices=list(CHAINS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (Path(args.model) / "config.json").exists():
        sys.exit(f"no model in {args.model}: make it with `python -m hclm_rl.testbed.smollm2 --out {args.model}`")
    if args.memory_of:
        build(args.memory_of, AutoModelForCausalLM.from_pretrained(args.model), args.setting, 4, args.out).train()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if "stock TRL" not in args.rows:  # with which the others are compared
        args.rows.insert(0, "stock TRL")
    console = Console()
    for setting in SETTINGS if args.setting == "all" else [args.setting]:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        seconds = take_turns(args.rows, model, setting, args.rounds, args.out)
        table = Table(title=f"{setting}: one optimiser step of {RESPONSES} completions, {args.rounds - 2} rounds")
        for column in ("chain", "wall s", "ratio", "quartiles", "CPU s", "ratio", "limit", "peak MiB", "ratio"):
            table.add_column(column, justify="left" if column == "chain" else "right", no_wrap=True)
        stock = seconds["stock TRL"]
        memory = (
            {} if args.no_memory else {name: peak_memory(name, args.model, setting, args.out) for name in args.rows}
        )
        for name in args.rows:
            ratios = [mine[0] / its[0] for mine, its in zip(seconds[name], stock, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            wall, cpu = (statistics.median(each) for each in zip(*seconds[name], strict=True))
            stock_wall, stock_cpu = (statistics.median(each) for each in zip(*stock, strict=True))
            cells = [name, f"{wall:.3f}", f"{wall / stock_wall:.3f}", f"{low:.3f}-{high:.3f}"]
            cells += [f"{cpu:.3f}", f"{cpu / stock_cpu:.3f}"]
            cells += [str(LIMITS.get(name, "")), f"{memory[name]:.0f}" if memory else ""]
            table.add_row(*cells, f"{memory[name] / memory['stock TRL']:.3f}" if memory else "")
        console.print(table)


if __name__ == "__main__":
    main()
