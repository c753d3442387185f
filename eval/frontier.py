"""Reward against KL: how far policies lie from the best that their base allows (`hclm_rl/evaluation/frontier.py`).

    python eval/frontier.py --task coins --reference testbed --policy runs/plain --policy runs/controlled
    python eval/frontier.py --task coins --reference testbed --run runs/with_kl     # from the log: needs beta > 0
    python eval/frontier.py --table responses.jsonl                                 # known distributions: exact

The base is sampled for the frontier; a policy is sampled for its reward and its KL(policy || base), the mean over its
own responses of the sum of log-ratios over their tokens, at temperature 1. A run's log holds the per-token mean of
TRL's estimator: times the mean length it is the KL of a response up to the spread of lengths, so read it as rough.
A table has one prompt a line: {"rewards": [...], "reference": [...], "policy": [...]}, distributions over responses.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hclm_rl.evaluation.forecast import curve_of
from hclm_rl.evaluation.frontier import Point, distance, exact, frontier, reliable_kl, reward_at
from hclm_rl.testbed.policy import policy_path
from hclm_rl.testbed.sampling import plain_generation, sample_completions
from hclm_rl.testbed.task import Row, Task, find_task
from hclm_rl.watch.report.runs import read_run


def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = policy_path() if path == "testbed" else path
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer


@torch.no_grad()
def sums_of_logps(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    prompt_mask: torch.Tensor,
    responses: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """log pi(response | prompt), (N,): prompts padded on the left, `mask` of the responses' tokens."""
    ids = torch.cat([prompts, responses], dim=1)
    attention = torch.cat([prompt_mask, mask.long()], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits
    logps = logits[:, -responses.shape[1] - 1 : -1].float().log_softmax(dim=-1)
    chosen = logps.gather(2, responses.unsqueeze(2)).squeeze(2)
    return torch.where(mask, chosen, 0).sum(dim=1)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    task: Task,
    samples: int,
    seed: int,
    reference: PreTrainedModel | None = None,
    batch: int = 1024,
) -> tuple[list[list[float]], list[float], float]:
    """By prompt the rewards (1 for a right answer, else 0) and KL(model || reference); the mean token entropy."""
    texts = [row["prompt"] for row in rows for _ in range(samples)]
    rewards: list[float] = []
    ratios: list[float] = []
    entropy = tokens = 0.0
    with torch.random.fork_rng(), plain_generation(model):
        torch.manual_seed(seed)
        for start in range(0, len(texts), batch):
            prompts = texts[start : start + batch]
            responses, entropies, mask = sample_completions(
                model, tokenizer, prompts, task.max_completion_length, temperature=1.0
            )
            entropy += torch.where(mask, entropies, 0).sum().item()
            tokens += mask.sum().item()
            kept = [ids[:length] for ids, length in zip(responses.tolist(), mask.sum(dim=1).tolist(), strict=True)]
            answers = tokenizer.batch_decode(kept, skip_special_tokens=True)
            of = [rows[(start + i) // samples] for i in range(len(prompts))]
            rewards += [float(task.is_correct(row, answer)) for row, answer in zip(of, answers, strict=True)]
            if reference is not None:
                encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
                inputs = (encoded["input_ids"], encoded["attention_mask"], responses, mask)
                ratios += (sums_of_logps(model, *inputs) - sums_of_logps(reference, *inputs)).tolist()
    groups = [slice(i * samples, (i + 1) * samples) for i in range(len(rows))]
    kls = [sum(ratios[group]) / samples for group in groups if ratios]
    return [rewards[group] for group in groups], kls, entropy / tokens


def points_of(folder: Path) -> list[tuple[int, Point]]:
    """(step, KL of a response and reward) of a run's log."""
    run = read_run(folder.name, folder)
    kls = curve_of(run, entropy="kl")  # each reward with its KL of a token
    lengths = curve_of(run, entropy="completions/mean_length")
    columns = zip(kls.steps, kls.entropy, lengths.entropy, kls.reward, strict=True)
    return [(step, Point(kl=kl * length, reward=reward)) for step, kl, length, reward in columns]


def read_table(path: Path) -> tuple[list[Point], Point | None]:
    """The exact frontier of known distributions, and the policy's point where the table has one."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path} has no line")
    curve = frontier([row["rewards"] for row in rows], probabilities=[row["reference"] for row in rows])
    if not all("policy" in row for row in rows):
        return curve, None
    points = [exact(row["rewards"], row["reference"], row["policy"]) for row in rows]
    mean = Point(kl=sum(p.kl for p in points) / len(rows), reward=sum(p.reward for p in points) / len(rows))
    return curve, mean


COLUMNS = ("policy", "KL, nats a response", "reward", "best at that KL", "gap", "efficiency", "token entropy")


def show(title: str, lines: list[tuple[str, float, float, float, float, float]]) -> None:
    """Each line: policy, KL, reward, best reward at that KL, efficiency, token entropy."""
    table = Table(*COLUMNS, title=title, title_justify="left")
    for name, kl, reward, best, share, entropy in lines:
        numbers = (kl, reward, best, best - reward, share, entropy)
        table.add_row("/".join(Path(name).parts[-2:]), *("-" if math.isnan(x) else f"{x:.3f}" for x in numbers))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", help="a testbed task or the dotted path of a function that returns a Task")
    parser.add_argument("--task_kwargs", type=json.loads, default={}, help="JSON")
    parser.add_argument("--reference", default="testbed", help="the base: a folder, or `testbed`")
    parser.add_argument("--policy", action="append", default=[], help="a checkpoint; may be repeated")
    parser.add_argument("--run", action="append", type=Path, default=[], help="a run folder whose log has `kl`")
    parser.add_argument("--table", type=Path, help="known distributions, one JSON object a prompt")
    parser.add_argument("--samples", type=int, default=256, help="a prompt; default 256, at least 64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="curve and points as JSON")
    options = parser.parse_args(arguments)
    if bool(options.task) == bool(options.table):
        parser.error("give either --task, whose prompts are sampled, or --table")
    result: dict = {}
    if options.table:
        curve, policy = read_table(options.table)
        if policy:
            result[str(options.table)] = asdict(policy)
            best = reward_at(curve, policy.kl)
            show("Exact", [(str(options.table), policy.kl, policy.reward, best, math.nan, math.nan)])
    else:
        if options.samples < 64:
            parser.error(f"--samples must be at least 64, got {options.samples}")
        task = find_task(options.task, **options.task_kwargs)
        rows = [dict(row) for row in task.eval_dataset]
        reference, tokenizer = load(options.reference)
        base, _, entropy = sample(reference, tokenizer, rows, task, options.samples, options.seed)
        curve = frontier(base)
        start = curve[0].reward
        lines = [(options.reference, 0.0, start, start, math.nan, entropy)]
        for path in options.policy:
            policy, own = load(path)
            rewards, kls, entropy = sample(policy, own, rows, task, options.samples, options.seed + 1, reference.eval())
            found = distance(base, rewards, kls)
            lines.append((path, found.kl, found.reward, found.best_reward, found.efficiency, entropy))
            result[path] = {**asdict(found), "token_entropy": entropy}
        for folder in options.run:
            points = points_of(folder)
            for step, point in points[:: max(len(points) // 10, 1)]:
                best = reward_at(curve, point.kl)
                lines.append((f"{folder}, step {step}", point.kl, point.reward, best, math.nan, math.nan))
            result[str(folder)] = [{"step": step, **asdict(point)} for step, point in points]
        show(f"{len(rows)} prompts, {options.samples} samples each", lines)
        never, always = (sum(np.mean(of) == share for of in base) for share in (0, 1))
        print(
            f"The frontier is to be trusted up to a KL of {reliable_kl(options.samples):.2f}. The base solved {never} "
            f"prompts never and {always} always; the efficiency leaves them out."
        )
    if options.out:
        result["frontier"] = [asdict(point) for point in curve]
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
