"""Estimators of the entropy change of an optimiser step, side by side: predicted against realised.

    python eval/entropy_change.py --out runs/entropy_change/seed-1.jsonl --seed 1
    python eval/entropy_change.py --config recipes/real_model.yaml --steps 20 --every 1 --out runs/real.jsonl
    python eval/entropy_change.py --table runs/entropy_change/seed-*.jsonl

Plain GRPO. Before each measured step two sets of held-out prompts, A and B, are sampled from the policy as it is. What
a step does to the mean token entropy of A's tokens (the same tokens before and after) is the truth. Predictions, from
the step's own batch (per token, means over tokens; A advantage, r ratio, S_v = p_v (log p_v + H)):

    covariance      -Cov(log p, A)               natural gradient   Cui et al., 2025, arXiv:2505.22617, theorem 2
    covariance_p    -Cov(log p, p A)             policy gradient    the same, theorem 1
    steer           -A r (1 - p) (log p + H)                        arXiv:2510.10150, the code's form
    discriminator   -A r (S_a - mean of S)                          arXiv:2602.03392, centred over the batch
    first_order     -A r (S_a - sum_v p_v S_v)                      the same, centred over the vocabulary: exact for a
                                                                    token's own logits
    hidden          <dH/dz, A r d log p/dz>                         through the output head, z the last hidden state
    gradient        -<grad H, grad L>                               in parameters, as if the step were a gradient step

and from the step that the optimiser really made, x its change of the parameters (Adam, clipping and all):

    update_own      <grad H, x>, grad H on the step's own tokens
    update          <grad H, x>, grad H on B
    probe           H(B) after - H(B) before: the step tried out on other rollouts, no gradient needed

`<name>, with memory` is the running mean of `name` that Adam's first moment would make of it (beta1 0.9).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from many_runs import QUIET, TESTBED, flags
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainerCallback

from hclm_rl import GRPOTrainer
from hclm_rl.commands import launch
from hclm_rl.equations.flow import discriminator, mean_discriminator
from hclm_rl.equations.functional import covariance_contributions, masked_mean
from hclm_rl.recipe.arguments import parse
from hclm_rl.testbed.sampling import plain_generation, sample_completions

OF_BATCH = ("covariance", "covariance_p", "steer", "discriminator", "first_order", "hidden", "gradient")
OF_UPDATE = ("update_own", "update", "probe")
MEMORY = 0.9
FEWEST = 2  # steps for a line
HELD_OUT = {"task_kwargs": {"prompts": 256, "eval_prompts": 384}}

Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # ids, attention (rows, P + T), completion ids, mask (rows, T)


def distributions(model: Any, rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs (rows, T, V), hidden states (rows, T, D)), with gradient."""
    ids, attention, completion, _ = rows
    states = model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state
    hidden = states[:, -completion.size(1) - 1 : -1]
    logits = model.get_output_embeddings()(hidden).float() / temperature
    return logits.log_softmax(dim=-1), hidden


def mean_entropy(model: Any, rows: Rows, temperature: float) -> Tensor:
    """Nats, over the tokens under the mask, with gradient."""
    logps, _ = distributions(model, rows, temperature)
    return masked_mean(-(logps.exp() * logps).sum(dim=-1), rows[3])


def from_batch(
    logps: Tensor, hidden: Tensor, head: Tensor, ids: Tensor, mask: Tensor, advantages: Tensor, old: Tensor | None
) -> dict[str, float]:
    """The per-token estimators; logps (B, T, V) without gradient."""
    own = logps.gather(2, ids.unsqueeze(2)).squeeze(2)
    p, entropy = logps.exp(), -(logps.exp() * logps).sum(dim=-1)
    weight = advantages if old is None else advantages * (own - old).exp()
    s = discriminator(own, entropy)
    centre = mean_discriminator(logps.flatten(0, 1)).view(ids.shape)
    all_s = p * (logps + entropy.unsqueeze(2))
    pull = -p
    pull.scatter_add_(2, ids.unsqueeze(2), torch.ones_like(own).unsqueeze(2))  # onehot(a) - p
    along_hidden = -((all_s @ head) * (pull @ head)).sum(dim=-1)
    per_token = {
        "covariance": -covariance_contributions(own, advantages, mask),
        "covariance_p": -covariance_contributions(own, own.exp() * advantages, mask),
        "steer": -weight * (1 - own.exp()) * (own + entropy),
        "discriminator": -weight * (s - masked_mean(s, mask)),
        "first_order": -weight * (s - centre),
        "hidden": weight * along_hidden,
    }
    return {name: masked_mean(value, mask).item() for name, value in per_token.items()}


class Watched(GRPOTrainer):
    """Keeps the batch of the step."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.batches_of_step = [*getattr(self, "batches_of_step", []), inputs]
        return super().compute_loss(model, inputs, *args, **kwargs)


class Probe(TrainerCallback):
    """Predictions before the optimiser's step, the truth after it; a line of JSON a measured step."""

    def __init__(self, out: Path, every: int, samples: int) -> None:
        self.out, self.every, self.samples = out, every, samples
        self.means: dict[str, float] = {}
        self.trainer: Any = None
        self.task: Any = None

    def sampled(self, which: int) -> Rows:
        """Held-out rollouts A (0) or B (1), of different prompts."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        prompts = [row["prompt"] for row in list(self.task.eval_dataset)[which::2] for _ in range(self.samples)]
        with torch.random.fork_rng(), plain_generation(trainer.model):
            torch.default_generator.manual_seed(7919 * (trainer.state.global_step + 1) + which)
            completion, _, mask = sample_completions(
                trainer.model, tokenizer, prompts, self.task.max_completion_length, trainer.temperature
            )
        encoded = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        ids = torch.cat([encoded["input_ids"], completion], dim=1)
        return ids, torch.cat([encoded["attention_mask"], mask.long()], dim=1), completion, mask

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        batches, trainer.batches_of_step = trainer.batches_of_step, []
        model, temperature = trainer.model, trainer.temperature
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients, totals, tokens = [torch.zeros_like(p) for p in parameters], {}, 0
        for batch in batches:
            ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
            attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            rows = torch.cat([batch["prompt_ids"], ids], dim=1), attention, ids, mask
            logps, hidden = distributions(model, rows, temperature)
            entropy = masked_mean(-(logps.exp() * logps).sum(dim=-1), mask)
            count = int(mask.sum())
            for total, own in zip(gradients, torch.autograd.grad(entropy, parameters), strict=True):
                total.add_(own, alpha=count)
            with torch.no_grad():
                head = model.get_output_embeddings().weight.float()
                advantages = batch["advantages"].unsqueeze(1).expand(ids.shape)
                old = batch.get("old_per_token_logps")
                for name, value in from_batch(logps, hidden, head, ids, mask, advantages, old).items():
                    totals[name] = totals.get(name, 0.0) + count * value
            tokens += count
        self.gradients = [g / tokens for g in gradients]
        found = {name: value / tokens for name, value in totals.items()}
        found["gradient"] = -inner(self.gradients, [p.grad for p in parameters])
        for name, value in found.items():
            self.means[name] = MEMORY * self.means.get(name, 0.0) + (1 - MEMORY) * value
        self.entry = found | {f"{name}, with memory": self.means[name] for name in found}
        self.is_measured = state.global_step % self.every == 0
        if self.is_measured:
            self.parameters, self.before = parameters, [p.detach().clone() for p in parameters]
            self.a, self.b = self.sampled(0), self.sampled(1)
            entropy_b = mean_entropy(model, self.b, temperature)
            self.gradients_b = torch.autograd.grad(entropy_b, parameters)
            with torch.no_grad():
                self.entropies = mean_entropy(model, self.a, temperature).item(), entropy_b.item()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_measured:
            return
        model, temperature = self.trainer.model, self.trainer.temperature
        with torch.no_grad():
            moved = [p - old for p, old in zip(self.parameters, self.before, strict=True)]
            after = mean_entropy(model, self.a, temperature).item(), mean_entropy(model, self.b, temperature).item()
            self.entry |= {
                "update_own": inner(self.gradients, moved),
                "update": inner(self.gradients_b, moved),
                "probe": after[1] - self.entropies[1],
                "realised": after[0] - self.entropies[0],
                "entropy": self.entropies[0],
                "step": state.global_step,
            }
        with self.out.open("a") as file:
            file.write(json.dumps(self.entry) + "\n")


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """<left, right> over all parameters."""
    return sum((a.double() * b.double()).sum().item() for a, b in zip(left, right, strict=True))


def judged(entries: Sequence[dict], name: str) -> dict[str, float]:
    """R^2 of the fitted line, its slope (realised per predicted), sign agreement, R^2 of the prediction as it is."""
    x, y = [entry[name] for entry in entries], [entry["realised"] for entry in entries]
    mean = statistics.fmean(y)
    missed = sum((b - a) ** 2 for a, b in zip(x, y, strict=True))
    return {
        "r2": statistics.correlation(x, y) ** 2,
        "slope": statistics.linear_regression(x, y).slope,
        "sign": statistics.fmean((a > 0) == (b > 0) for a, b in zip(x, y, strict=True)),
        "r2 as it is": 1 - missed / sum((b - mean) ** 2 for b in y),
    }


def tabulate(files: Sequence[Path]) -> Table:
    """Mean and range over the runs."""
    runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    runs = [[entry for entry in run if entry["step"] > 1] for run in runs]  # Adam has no memory before
    if min(map(len, runs)) < FEWEST:
        raise SystemExit(
            f"too few measured steps for a line: at least {FEWEST} after the first, got {min(map(len, runs))}"
        )
    table = Table(title=f"{len(runs)} runs, {', '.join(str(len(run)) for run in runs)} steps; mean (least to greatest)")
    for column in ("estimator", "R2", "slope", "sign agreement", "R2 as it is"):
        table.add_column(column)
    for name in (*OF_BATCH, *(f"{name}, with memory" for name in OF_BATCH), *OF_UPDATE):
        found = [judged(run, name) for run in runs]
        cells = []
        for what in ("r2", "slope", "sign", "r2 as it is"):
            values = [each[what] for each in found]
            cells.append(f"{statistics.fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})")
        table.add_row(name, *(cells if name in OF_UPDATE else [*cells[:3], "-"]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", help="a recipe; default: the testbed")
    parser.add_argument("--out", type=Path, default=Path("runs/entropy_change/run.jsonl"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=4, help="measured steps")
    parser.add_argument("--samples", type=int, default=4, help="responses per held-out prompt")
    parser.add_argument("--table", nargs="+", type=Path, help="print the table of these files, train nothing")
    options, rest = parser.parse_known_args()
    if options.table:
        Console(width=150).print(tabulate(options.table))
        return
    line = ["--config", options.config] if options.config else flags(TESTBED | HELD_OUT)
    own = {"max_steps": options.steps, "seed": options.seed, "entropy_terms": [], "output_dir": options.out.parent}
    settings = parse("grpo", [*line, *flags(QUIET | own | {"logging_steps": 20}), *rest])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.unlink(missing_ok=True)
    probe = Probe(options.out, options.every, options.samples)
    trainer, probe.task = launch.build_trainer("grpo", settings, [probe, *launch.resets_of(*settings[:2])])
    object.__setattr__(trainer, "__class__", Watched)  # the launcher makes the trainer
    probe.trainer = trainer
    launch.train(trainer, settings[0])
    Console(width=150).print(tabulate([options.out]))


if __name__ == "__main__":
    main()
