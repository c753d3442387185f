"""Supervised warm start of the policy: one random right payment each for 30,000 training problems.

python -m hclm_rl.testbed.warm_start_recipe --out DIR --seed 0
"""

import argparse
import random

import torch
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import get_linear_schedule_with_warmup

from hclm_rl.testbed.coins import make_task, random_problems
from hclm_rl.testbed.policy import EOS, new_policy, new_tokenizer, save_policy
from hclm_rl.testbed.sampling import evaluate

PROBLEMS = 30_000
STEPS = 650
BATCH = 128  # completions
LEARNING_RATE = 4e-3
WARM_UP_STEPS = 30
PROMPT_TOKENS = 10
IGNORED = -100


def warm_start(out: str, seed: int) -> None:
    """Trains and writes the checkpoint into the folder `out`."""
    source = random.Random(seed)
    problems = [problem for problem, _ in zip(random_problems("train", seed), range(PROBLEMS), strict=False)]
    tokenizer = new_tokenizer()
    texts = [f"{problem.prompt} {problem.random_solution(source)} {EOS}" for problem in problems]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = torch.where(ids == tokenizer.pad_token_id, IGNORED, ids)
    labels[:, :PROMPT_TOKENS] = IGNORED
    model = new_policy(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP_STEPS, STEPS)
    generator = torch.Generator().manual_seed(seed)
    progress = trange(STEPS, desc="warm start", unit="step")
    for _ in progress:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        logits = model(input_ids=ids[chosen, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[chosen, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_policy(model.eval(), tokenizer, out)
    task = make_task(eval_prompts=96)
    for name, mean in (result := evaluate(model, tokenizer, task.eval_dataset, task)).means().items():
        print(f"{name:17} {mean:7.3f} +- {result.standard_errors[name]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Supervised warm start of the policy.")
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warm_start(arguments.out, arguments.seed)
