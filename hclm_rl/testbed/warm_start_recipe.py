"""Supervised warm start of a task's policy on problems of its own: coins, one random right payment for each of 30,000.

python -m hclm_rl.testbed.warm_start_recipe --out DIR --seed 0
python -m hclm_rl.testbed.warm_start_recipe --task coins_noisy --out DIR --seed 0   # half of the examples wrong
python -m hclm_rl.testbed.warm_start_recipe --task products --out DIR --seed 0
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm, trange
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from hclm_rl.testbed import coins, coins_noisy, products
from hclm_rl.testbed.policy import EOS, new_policy, new_tokenizer, save_policy
from hclm_rl.testbed.sampling import evaluate
from hclm_rl.testbed.task import find_task

WARM_UP_STEPS = 30
COINS_PROBLEMS = 30_000
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a warm start learns from, and for how long."""

    # seed, the first so many (None: all) -> prompts with right completions, separated by spaces
    texts: Callable[[int, int | None], list[str]]
    prompt_tokens: int
    steps: int
    batch: int  # completions
    learning_rate: float


def coins_texts(seed: int, count: int | None = None) -> list[str]:
    """Problems of coins with a solution each, `count` of them or as many as the recipe has."""
    source, wanted = random.Random(seed), min(count or COINS_PROBLEMS, COINS_PROBLEMS)
    problems = [problem for problem, _ in zip(coins.random_problems("train", seed), range(wanted), strict=False)]
    return [f"{problem.prompt} {problem.random_solution(source)}" for problem in problems]


def coins_noisy_texts(seed: int, count: int | None = None) -> list[str]:
    """Those of coins, in every second of them a random walk for the payment."""
    source = random.Random(f"noisy {seed}")
    texts, problems = coins_texts(seed, count), coins.random_problems("train", seed)
    return [
        f"{problem.prompt} {coins_noisy.random_walk(problem, source)}" if i % 2 else text
        for i, (text, problem) in enumerate(zip(texts, problems, strict=False))
    ]


def products_texts(seed: int, count: int | None = None) -> list[str]:
    """Every question of the split, whatever the seed."""
    questions = products.questions_of("warm_start")[:count]
    return [f"{products.spelt(a)} * {products.spelt(b)} = {products.spelt(a * b)}" for a, b in questions]


LESSONS = {
    "coins": Lesson(texts=coins_texts, prompt_tokens=10, steps=650, batch=128, learning_rate=4e-3),
    "coins_noisy": Lesson(texts=coins_noisy_texts, prompt_tokens=10, steps=650, batch=128, learning_rate=4e-3),
    "products": Lesson(texts=products_texts, prompt_tokens=6, steps=300, batch=256, learning_rate=3e-3),
}


def teach(
    model: PreTrainedModel,
    ids: Int[Tensor, "M L"],
    labels: Int[Tensor, "M L"],
    progress: tqdm,
    *,
    batch: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Cross-entropy on the labels that are not IGNORED, over random batches, one a step of `progress`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP_STEPS, int(progress.total))
    generator = torch.Generator().manual_seed(seed)
    for _ in progress:
        chosen = torch.randint(len(ids), (batch,), generator=generator)
        logits = model(input_ids=ids[chosen, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[chosen, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def warm_start(out: str, seed: int, task: str = "coins") -> None:
    """Trains and writes the checkpoint into the folder `out`."""
    lesson, tokenizer = LESSONS[task], new_tokenizer(task)
    texts = [f"{text} {EOS}" for text in lesson.texts(seed, None)]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    labels = torch.where(ids == tokenizer.pad_token_id, IGNORED, ids)
    labels[:, : lesson.prompt_tokens] = IGNORED
    model = new_policy(seed, task)
    progress = trange(lesson.steps, desc="warm start", unit="step")
    teach(model, ids, labels, progress, batch=lesson.batch, learning_rate=lesson.learning_rate, seed=seed)
    save_policy(model.eval(), tokenizer, out)
    held_out = find_task(task, eval_prompts=96)
    for name, mean in (result := evaluate(model, tokenizer, held_out.eval_dataset, held_out)).means().items():
        print(f"{name:17} {mean:7.3f} +- {result.standard_errors[name]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Supervised warm start of a task's policy.")
    parser.add_argument("--task", choices=LESSONS, default="coins")
    parser.add_argument("--out", required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warm_start(arguments.out, arguments.seed, arguments.task)
