"""Run by torch.distributed.run in trainer/test_invariance.py: trains every case on two processes, writes weights."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from hclm_rl import NotFinite
from hclm_rl.commands.launch import run as launch
from hclm_rl.recipe.arguments import parse
from hclm_rl.trainer.head import output_head

from .cpu_processes import leave, start, whole_weights
from .tiny import LOSSES, WITH_TOOLS, beta_of, make, prompts

# the second process has no token that counts; its collective calls must be those of the first all the same
NOTHING_ON_ONE = {"fixed": "truncated", "mask_truncated_completions": True, "loss_type": "dapo"}

# draws by streams that know the prompt's place among those of all processes
ROLLOUT = {"cure": {"branches": 3, "top": 2, "least_characters": 1}}


def evaluated(policy: str, out: Path, responses_at_once: int) -> dict[str, float]:
    """The metrics of five prompts, four responses each: no whole number of batches on two processes."""
    trainer = make(
        policy,
        out,
        fixed=True,
        trainer={"eval_dataset": prompts(5)},
        per_device_eval_batch_size=responses_at_once,
        eval_pass_at_k=True,
        eval_pass_threshold=0.5,
    )
    return trainer.evaluate()


def main(policy: str, out: Path, cases: dict[str, dict], kind: str) -> None:
    given = start("terms" if kind == "cut" else kind, out)
    half = {"per_device_train_batch_size": 8 // PartialState().num_processes, **given}
    runs = {
        term: {"terms": [{term: given}], "loss_type": "dapo", "beta": beta_of(term)} for term, given in cases.items()
    }
    runs = {term: run | {"fixed": "turns" if term in WITH_TOOLS else True} for term, run in runs.items()}
    if kind in ("terms", "cut"):
        cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        return train_each(runs, policy, out, half | cut if kind == "cut" else half)
    runs["remembers"] = {"terms": ["tests.own_terms.Remembers"], "fixed": True, "loss_type": "dapo"}
    without_kl = [{term: given} for term, given in cases.items() if not beta_of(term)]
    runs["nothing on one"] = {"terms": without_kl, **NOTHING_ON_ONE}
    for loss in LOSSES if kind == "ddp" else ["dapo"]:  # sampled, each process with its own seed
        off_policy = {"num_iterations": 2, "beta": 0.04, "loss_type": loss}
        runs[f"stock {loss}"] = {"ours": False, **off_policy}
        runs[f"empty {loss}"] = off_policy
        runs[f"zero {loss}"] = {"terms": [{term: {"coef": 0.0}} for term in cases], **off_policy}
    if kind == "ddp":
        runs["traced"] = {"terms": ["information_force"], "fixed": True, "loss_type": "dapo", "trace_steps": [1]}
        runs["rolled grpo"] = {"rollout": ROLLOUT, "loss_type": "dapo"}
        runs["rolled rloo"] = {"rollout": ROLLOUT, "algorithm": "rloo"}
    else:
        adam = {"terms": ["force_reweight", {"log_det": {"coef": 0.1}}], "optim": "adamw_torch", "max_steps": 4}
        runs["through"] = adam | {"save_strategy": "steps", "save_steps": 2}
        runs["resumed"] = adam
    if kind == "fsdp2":
        runs |= {"stock bf16": {"ours": False, "bf16": True}, "empty bf16": {"bf16": True}}
        runs["terms bf16"] = {"bf16": True, "terms": ["force_reweight", "siren", {"log_det": {"coef": 0.1}}]}
    try:
        make(policy, out / "stopped", terms=["tests.own_terms.TrapOnOne", "qae"], fixed=True, **half).train()
    except NotFinite as error:
        (out / f"stopped_{PartialState().process_index}.txt").write_text(str(error))
    for name, run in runs.items():
        trainer: Any = make(policy, out / name, **half, **run)
        trainer.train(resume_from_checkpoint=str(out / "through" / "checkpoint-2") if name == "resumed" else None)
        weights = whole_weights(trainer, kind)
        if PartialState().is_main_process:
            save_file(weights, out / f"{name}.safetensors")
            if name == "information_force":
                (out / "metrics.json").write_text(json.dumps(trainer.state.log_history[0]))
    if kind == "ddp":
        found = evaluated(policy, out / "evaluated", 4)
        if PartialState().is_main_process:
            (out / "evaluated.json").write_text(json.dumps(found))
    if kind == "fsdp2":
        trainer.model.reshard()  # as a forward pass leaves it where the head's group is sharded again
        read_head(trainer, weights)
    if kind in ("fsdp2", "zero3"):
        line = ["--config", str(out / "launched.yaml"), "--output_dir", str(out / "launched")]
        launch("grpo", parse("grpo", [*line, "--use_cpu", str(kind == "fsdp2")]))  # it takes the group down
    else:
        leave()


def train_each(runs: dict[str, dict], policy: str, out: Path, half: dict[str, Any]) -> None:
    """The terms' cases alone, by any number of processes; "cut" has two micro-batches on each of two."""
    for name, run in runs.items():
        trainer: Any = make(policy, out / name, **half, **run)
        trainer.train()
        weights = whole_weights(trainer, "ddp")
        if PartialState().is_main_process:
            save_file(weights, out / f"{name}.safetensors")
    leave()


def read_head(trainer: Any, weights: dict[str, torch.Tensor]) -> None:
    """A sharded head is gathered where there is no gradient, and refused where there is."""
    with torch.no_grad(), output_head(trainer) as head:
        assert torch.equal(head.weight, weights["lm_head.weight"])
    try:
        with output_head(trainer):
            raise AssertionError("a sharded head was read with gradient")
    except ValueError as error:
        assert "shards the output head again" in str(error)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4])
