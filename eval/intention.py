"""What models know before the first token: entropy, dimension and recoverability (`hclm_rl/evaluation/intention.py`).

    python eval/intention.py --task coins --model testbed --model runs/plain --model runs/controlled
    python eval/intention.py --prompts questions.jsonl --model FOLDER

A task gives prompts and, by sampling, the label of the probe: at least half of `--samples` responses are right. A file
has one prompt a line, {"prompt": "..."}, with "right": true or false if a probe is wanted. Compare models on the same
prompts and template only.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from hclm_rl.evaluation.intention import effective_dimension, intention_entropy, intentions, recoverability
from hclm_rl.testbed.policy import policy_path
from hclm_rl.testbed.sampling import evaluate
from hclm_rl.testbed.task import Task, find_task

COLUMNS = ("model", "H_int, bits", "d_eff", "d_eff of each layer", "right", "Recov (AUROC) [95 %]", "shuffled")


def read_prompts(path: Path) -> tuple[list[str], torch.Tensor | None]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    given = [row["right"] for row in rows if "right" in row]
    if given and (len(given) < len(rows) or not all(isinstance(right, bool) for right in given)):
        raise SystemExit(f'{path}: "right" must be true or false, in every line or in none')
    return [row["prompt"] for row in rows], torch.tensor(given) if given else None


def measure(
    path: str, task: Task | None, prompts: list[str], labels: torch.Tensor | None, options: argparse.Namespace
) -> dict:
    folder = policy_path() if path == "testbed" else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    found = intentions(model, tokenizer, prompts, options.layers, options.batch)
    overall, each = effective_dimension(found.states)
    result: dict = {"entropy": intention_entropy(found.logits).mean().item(), "dimension": overall, "layers": each}
    if task and options.samples:
        sampled = evaluate(
            model, tokenizer, task.eval_dataset, task, samples=options.samples, seed=options.seed, batch=1024
        )
        labels = torch.tensor(sampled.per_prompt["pass@1"]) >= 0.5
    if labels is not None:
        result["right"] = labels.double().mean().item()
        result["recoverability"] = asdict(recoverability(found.states, labels, options.seed))
    return result


def row_of(name: str, found: dict) -> list[str]:
    layers = ", ".join(f"{layer}: {value:.2f}" for layer, value in found["layers"].items())
    row = [name, f"{found['entropy']:.3f}", f"{found['dimension']:.2f}", layers]
    probe = found.get("recoverability")
    if not probe:
        return [*row, "-", "-", "-"]
    interval = f"{probe['auroc']:.3f} [{probe['low']:.3f}, {probe['high']:.3f}]"
    return [*row, f"{found['right']:.3f}", interval, f"{probe['shuffled']:.3f}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="a folder, or `testbed`; may be repeated")
    parser.add_argument("--task", help="a testbed task or the dotted path of a function that returns a Task")
    parser.add_argument("--task_kwargs", type=json.loads, default={}, help="JSON; 512 prompts or more are advised")
    parser.add_argument("--prompts", type=Path, help="a file of prompts instead of a task")
    parser.add_argument("--layers", type=int, nargs="+", help="default: the last, and the one at 2/3 of the depth")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt for the labels; 0: no probe")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the numbers as JSON")
    options = parser.parse_args(arguments)
    if bool(options.task) == bool(options.prompts):
        parser.error("give either --task or --prompts")
    task, labels = None, None
    if options.task:
        task = find_task(options.task, **options.task_kwargs)
        prompts = list(task.eval_dataset["prompt"])
    else:
        prompts, labels = read_prompts(options.prompts)
    table = Table(*COLUMNS, title=f"{len(prompts)} prompts", title_justify="left")
    result = {}
    for path in options.model or ["testbed"]:
        result[path] = measure(path, task, prompts, labels, options)
        table.add_row(*row_of(path, result[path]))
    Console().print(table)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
