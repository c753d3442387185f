"""Runs that are killed at random moments, also while they save: each resumes and ends bit for bit as one left alone."""

import json
import multiprocessing
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hclm_rl.chain.state import FILE_NAME

KILLS = int(os.environ.get("HCLM_RL_KILLS", 30))
STEPS = 8
# 6 prompts, two in a rollout, two updates each: 6 steps an epoch, and half of the checkpoints lie within a rollout
RECIPE = f"""\
task: coins
task_kwargs: {{prompts: 6, eval_prompts: 2}}
entropy_terms:
  - tests.own_terms.Remembers
  - epo
  - force_reweight: {{floor: 1.5}}
  - entropy_bonus: {{coef: {{kind: step_to_target, target: 5.0, delta: 0.1}}}}
max_steps: {STEPS}
num_generations: 4
per_device_train_batch_size: 8
num_iterations: 2
learning_rate: 1e-3
optim: adamw_torch
bf16: false
gradient_checkpointing: false
use_cpu: true
logging_steps: 1
trace_every: 1
save_strategy: steps
save_steps: 1
save_total_limit: 1
disable_tqdm: true
"""
SECONDS = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def job(line: list[str], said: Path) -> None:
    """What the command line does, in a process of its own."""
    from hclm_rl.commands.launch import main

    sys.stdout = sys.stderr = said.open("a")
    torch.set_num_threads(1)
    sys.exit(main("grpo", line))


def started(recipe: Path, out: Path, *more: str) -> BaseProcess:
    # its server has imported the library once, and has trained nothing: a fork of it starts in no time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hclm_rl.commands.launch"])
    line = ["--config", str(recipe), "--output_dir", str(out), "--allow_custom_code", *more]
    process = context.Process(target=job, args=(line, out.with_suffix(".txt")))
    process.start()
    return process


def finished(recipe: Path, out: Path) -> None:
    """Resumes the run, or starts it where it was killed before its first checkpoint was whole."""
    process = started(recipe, out, "--resume_from_checkpoint", "true")
    process.join()
    if process.exitcode == 2:
        said = out.with_suffix(".txt").read_text().splitlines()[-1]
        assert "no checkpoint at" in said or "no complete checkpoint in" in said, said
        process = started(recipe, out)
        process.join()
    assert process.exitcode == 0, out.with_suffix(".txt").read_text()[-3000:]


def kill(process: BaseProcess, out: Path, chance: random.Random, seconds: float, is_saving: bool) -> str:
    """At any moment of a run, or within a tenth of a second of the first file of a checkpoint."""
    if is_saving:
        wanted = out / f"checkpoint-{chance.randint(1, STEPS)}"
        while process.is_alive() and not wanted.exists():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.1))
    else:
        time.sleep(chance.uniform(0.0, seconds))
    process.kill()
    process.join()
    return ", ".join(sorted(each.name for each in out.glob("checkpoint-*"))) or "no checkpoint"


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(out: Path) -> list[dict]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in SECONDS} for entry in entries]


def what_differs(whole: Path, killed: Path) -> list[str]:
    """Names of what two runs left that is not the same bit for bit."""
    last = f"checkpoint-{STEPS}"
    files = ["model.safetensors", f"{last}/model.safetensors", f"{last}/{FILE_NAME}", "recipe.yaml"]
    differs = [name for name in files if (whole / name).read_bytes() != (killed / name).read_bytes()]
    for name in (f"{last}/optimizer.pt", f"{last}/scheduler.pt", f"{last}/rng_state.pth"):
        if not same(*(torch.load(out / name, weights_only=False) for out in (whole, killed))):
            differs.append(name)
    if logged(whole) != logged(killed):
        differs.append("log.jsonl")
    for step in range(1, STEPS + 1):
        name = f"trace/step-{step:05d}.parquet"
        if not pq.read_table(whole / name).equals(pq.read_table(killed / name)):
            differs.append(name)
    return differs


@pytest.mark.slow
def test_killed_runs_end_as_the_one_that_was_not(tmp_path: Path):
    recipe, whole = tmp_path / "recipe.yaml", tmp_path / "whole"
    recipe.write_text(RECIPE)
    finished(recipe, whole)  # the server starts
    start = time.perf_counter()
    again = tmp_path / "again"
    started(recipe, again).join()
    seconds = time.perf_counter() - start
    assert what_differs(whole, again) == []
    chance = random.Random(0)
    for number in range(KILLS):
        out = tmp_path / f"killed-{number}"
        out.mkdir()
        left = kill(started(recipe, out), out, chance, seconds, is_saving=number % 2 == 1)
        assert not (out / "run.lock").exists() or not (out / "summary.json").exists()
        finished(recipe, out)
        differs = what_differs(whole, out)
        print(f"kill {number}: there were {left}; what differs: {differs or 'nothing'}", flush=True)
        assert not differs and not (out / "run.lock").exists()
