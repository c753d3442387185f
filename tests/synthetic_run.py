"""A run folder with every quantity that the report knows, written without training: `python -m tests.synthetic_run`."""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hclm_rl.watch.trace import file_of

HOSTILE = ["<script>alert(1)</script>", '" onmouseover="x', "&amp;", "\n", " b", "'"]


def entry(step: int, steps: int, rng: random.Random) -> dict:
    """One logged step of a policy that collapses: entropy falls from 0.5 nats, the force dies."""
    part = step / steps
    entropy = 0.5 * math.exp(-3 * part)
    change = -0.5 * 3 / steps * math.exp(-3 * part)
    logged = {
        "step": step,
        "max_steps": steps,
        "entropy": entropy + rng.gauss(0, 0.01),
        "reward": 0.4 + 0.4 * part + rng.gauss(0, 0.05),
        "completions/mean_length": 12.0 - 4 * part,
        "bonus/coef": 0.1 * part,
        "bonus/affected": 1.0,
        "information_force/affected": 0.0,
        "information_force/coef": 1.0,
        "information_force/force_norm": 1 - 0.5 * part,
        "information_force/rho": 0.2 - 0.1 * part,
        "information_force/dof": 60.0 - 20 * part,
        "information_force/alignment_at_states": rng.gauss(-0.01, 0.01),
        "information_force/critical_coef_at_states": rng.gauss(1e-4, 1e-4) if step % 40 else 0.1,
        "entropy_flow/predicted_change": change + rng.gauss(0, 0.001),
        "entropy_flow/realised_change": change + rng.gauss(0, 0.002),
        "collapse/state": float(part > 0.4) + float(part > 0.7),
        "collapse/entropy_slope": change,
    }
    if step % 50 == 1:
        logged |= {"spectrum/effective_rank": 14.0 - 5 * part, "spectrum/alpha": 1 + part}
    return logged


def write_trace(
    folder: Path,
    step: int,
    rng: random.Random,
    responses: int = 8,
    tokens: int = 20,
    said: Sequence[str] = tuple(HOSTILE),
) -> None:
    rows = [(r, t) for r in range(responses) for t in range(tokens)]
    columns = {
        "prompt": [r // 4 for r, _ in rows],
        "response": [r for r, _ in rows],
        "position": [t for _, t in rows],
        "id": [t for _, t in rows],
        "token": [said[t // 3 % len(said)] if t % 3 == 0 else f" w{t}" for _, t in rows],
        "prompt_text": ["What is <b>it</b>?" for _ in rows],
        "reward": [float(r % 2) for r, _ in rows],
        "entropy": [rng.random() for _ in rows],
        "weight": [None if t == 1 else 1 - 0.1 * (t % 5) for _, t in rows],
        "information_force/influence": [rng.gauss(0, 1e-3) for _ in rows],
    }
    file = file_of(folder, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def write_full_run(folder: Path, steps: int = 500, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    log = [entry(step, steps, rng) for step in range(1, steps + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
    for step in (1, steps // 2, steps):
        write_trace(folder, step, rng)
    return folder


if __name__ == "__main__":
    print(write_full_run(Path(sys.argv[1])))
