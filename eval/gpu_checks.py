"""The checks of check_gpu.py, one function each: it returns what was found, and raises where something is wrong.

python eval/gpu_checks.py lora --device cuda --folder runs/check_gpu/lora
"""

import argparse
import importlib.util
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hclm_rl
from hclm_rl import known_terms
from hclm_rl.commands.launch import main as launch
from hclm_rl.recipe.config import find_term
from hclm_rl.testbed.coins import make_task
from hclm_rl.testbed.policy import load_policy, new_tokenizer, policy_path, save_policy

ROOT = Path(__file__).parent.parent
TERMS = ["clip_cov", "force_reweight", {"log_det": {"coef": 0.1}}]  # scores, the whole distribution, hidden states
ALONE = {"rep_exp": {"features": "policy"}}  # what it must be told in a run without a KL
FEW = ["clip_cov", "log_det", "siren", "group_log_det"]  # of all terms, for the toy size
WORDS = 46
Weights = dict[str, torch.Tensor]


class Skip(Exception):
    """Says why this machine cannot answer."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a check runs, and how large it may be."""

    device: str  # "cuda" or "cpu"
    folder: Path
    model: Path  # of the 200 steps, if it is there
    is_toy: bool  # the smallest sizes: to test this script

    @property
    def count(self) -> int:
        return torch.cuda.device_count() if self.device == "cuda" else 0


def needs_gpu(machine: Machine, why: str) -> None:
    if machine.device == "cpu":
        raise Skip(f"{why}: not on a CPU")


def needs_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise Skip(f"{name} is not installed: pip install 'hclm-rl[{name}]'")


# ---- short trainings on fixed responses


def fixed_responses(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Responses that depend on prompt, place in the group and step alone: the same on any device and any processes."""
    tokenizer, first = trainer.processing_class, trainer.accelerator.process_index * len(prompts)
    responses = []
    for i, text in enumerate(prompts):
        key = f"{text}/{(first + i) % trainer.num_generations}/{trainer.state.global_step}"
        draws = random.Random(zlib.crc32(key.encode()))
        responses.append([draws.randrange(2, WORDS) for _ in range(draws.randint(2, 8))] + [tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": responses, "logprobs": None}


def low_words(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with grades, unequal within most groups."""
    return [round(4 * sum(word < WORDS // 2 for word in ids) / len(ids)) / 4 for ids in completion_ids]


def trained(
    machine: Machine, terms: list | None, *, trainer: dict | None = None, **changes: Any
) -> tuple[Weights, Any]:
    """(weights after two steps of SGD on 8 fixed responses, the trainer); terms None is TRL's own trainer."""
    kind: Any = trl.GRPOTrainer if terms is None else hclm_rl.GRPOTrainer
    config: Any = trl.GRPOConfig if terms is None else hclm_rl.GRPOConfig
    settings: dict[str, Any] = {
        "output_dir": str(machine.folder / "run"), "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 9, "max_steps": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant",
        "optim": "sgd", "bf16": False, "gradient_checkpointing": False, "use_cpu": machine.device == "cpu",
        "model_init_kwargs": {"attn_implementation": "eager"}, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "seed": 7, "loss_type": "dapo", **changes,
    }  # fmt: skip
    if terms is not None:
        settings["entropy_terms"] = terms
    made = kind(
        model=policy_path(), reward_funcs=low_words, args=config(**settings), train_dataset=make_task(16).train_dataset,
        **{"rollout_func": fixed_responses} | (trainer or {}),
    )  # fmt: skip
    made.train()
    model = made.accelerator.unwrap_model(made.model)
    weights = {
        name: each.detach().float().cpu().clone() for name, each in model.named_parameters() if each.requires_grad
    }
    if broken := [name for name, each in weights.items() if not each.isfinite().all()]:
        raise AssertionError(f"not finite after training: {', '.join(broken[:3])}")
    return weights, made


def largest(a: Weights, b: Weights) -> float:
    """max |a - b| over all weights."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


def at_start() -> Weights:
    return {name: each.detach().clone() for name, each in load_policy()[0].named_parameters()}


def every_update(machine: Machine, file: Path) -> None:
    """The weights that each term leads to, into a file."""
    found = {}
    for name in FEW if machine.is_toy else known_terms():
        term = find_term(name)()  # some forms of a term need a reference
        beta = 0.04 if term.needs_reference or term.needs_reference_model else 0.0
        weights, _ = trained(machine, [{name: ALONE.get(name, {})}], beta=beta)
        found |= {f"{name}/{key}": value for key, value in weights.items()}
    save_file(found, file)


def apart(*command: str, **environment: str) -> str:
    """Runs to its end and gives what it printed; an AssertionError has the end of it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise AssertionError(" / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-2:]))
    return done.stdout


def again(machine: Machine, what: str, device: str) -> list[str]:
    line = [__file__, what, "--device", device, "--folder", str(machine.folder), "--model", str(machine.model)]
    return [*line, "--toy"] if machine.is_toy else line


# ---- the checks


def device(machine: Machine) -> str:
    torch.manual_seed(0)
    rows = torch.randn(256, 64, dtype=torch.float64)
    matrix = rows.T @ rows / 256 + 0.1 * torch.eye(64, dtype=torch.float64)
    here = matrix.to(machine.device)
    single = (rows.float().to(machine.device).T @ rows.float().to(machine.device)).double().cpu() / 256
    half = (rows.bfloat16().to(machine.device).T @ rows.bfloat16().to(machine.device)).double().cpu() / 256
    errors = {
        "float32 product": ((single - rows.T @ rows / 256).abs().max().item(), 1e-5),
        "bf16 product": ((half - rows.T @ rows / 256).abs().max().item(), 2e-2),
        "factor": ((torch.linalg.cholesky(here).cpu() - torch.linalg.cholesky(matrix)).abs().max().item(), 1e-10),
        "eigenvalues": ((torch.linalg.eigvalsh(here).cpu() - torch.linalg.eigvalsh(matrix)).abs().max().item(), 1e-10),
    }
    if wrong := {name: error for name, (error, most) in errors.items() if not error < most}:
        raise AssertionError(f"further from the CPU's float64 than rounding: {wrong}")
    name = "CPU" if machine.device == "cpu" else f"{machine.count} x {torch.cuda.get_device_name()}"
    return f"{name}, CUDA {torch.version.cuda}; " + ", ".join(
        f"{key} {error:.0e}" for key, (error, _) in errors.items()
    )


def empty(machine: Machine) -> str:
    torch.use_deterministic_algorithms(True, warn_only=True)
    for bf16 in (False, True):
        stock, ours = (trained(machine, terms, bf16=bf16)[0] for terms in (None, []))
        if difference := largest(stock, ours):
            raise AssertionError(f"bf16 {bf16}: an empty chain differs from TRL by {difference:.1e}")
        assert largest(stock, at_start()) > 1e-4, "nothing moved"
    return "an empty chain is TRL bit for bit, in float32 and under bf16 autocast"


def terms(machine: Machine) -> str:
    file = machine.folder / "here.safetensors"
    every_update(machine, file)
    apart(*again(machine, "every update", "cpu"))
    here, cpu = load_file(file), load_file(machine.folder / "cpu.safetensors")
    apart_by: dict[str, float] = {}
    for key in here:
        name = key.partition("/")[0]
        apart_by[name] = max(apart_by.get(name, 0.0), (here[key] - cpu[key]).abs().max().item())
    far = {name: round(value, 6) for name, value in apart_by.items() if not value < 1e-4}
    worst = max(apart_by, key=lambda name: apart_by[name])
    if far:
        raise AssertionError(f"{len(far)} of {len(apart_by)} terms differ from the CPU's update: {far}")
    return f"{len(apart_by)} terms; furthest from the CPU's update: {worst}, {apart_by[worst]:.0e}"


def bf16(machine: Machine) -> str:
    half, single, start = trained(machine, TERMS, bf16=True)[0], trained(machine, TERMS)[0], at_start()
    moved, apart_by = largest(single, start), largest(half, single)
    # bf16 keeps 8 bits: an update is known to a few in a hundred, and a token may be selected otherwise
    if not apart_by < 0.3 * moved:
        raise AssertionError(
            f"the update under bf16 is {apart_by:.1e} from that in float32, which is {moved:.1e} large"
        )
    return f"{apart_by / moved:.3f} of the update from that in float32"


def lora(machine: Machine) -> str:
    needs_package("peft")
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    weights, made = trained(machine, TERMS, trainer={"peft_config": adapter}, beta=0.04)
    assert weights and all("lora_" in name for name in weights), "weights outside the adapter are trained"
    moved = max(each.abs().max().item() for name, each in weights.items() if "lora_B" in name)  # 0 at the start
    assert moved > 1e-4, "the adapter did not move"
    assert made.ref_model is None, "a second copy of the model is loaded"
    return f"{len(weights)} matrices of the adapter, moved by up to {moved:.1e}; the reference is the model without it"


def compiled(machine: Machine) -> str:
    plain, _ = trained(machine, TERMS)
    began = time.monotonic()
    inductor, _ = trained(machine, TERMS, torch_compile=True, torch_compile_backend="inductor")
    seconds = time.monotonic() - began
    from torch._dynamo.utils import counters

    frames = counters["stats"].get("unique_graphs", 0)
    assert frames, "nothing was compiled"
    if not (difference := largest(plain, inductor)) < 1e-4:
        raise AssertionError(f"the compiled run's update differs by {difference:.1e}")
    return f"{frames} graphs in {seconds:.0f} s; the update of the run without it to {difference:.0e}"


def processes(machine: Machine) -> str:
    if machine.device == "cuda" and machine.count < 2:
        raise Skip(f"needs two GPUs, and {machine.count} is in sight")
    one, _ = trained(machine, TERMS)
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"ACCELERATE_USE_CPU": "true"} if machine.device == "cpu" else {"CUDA_VISIBLE_DEVICES": "0,1"}
    apart(*run, *again(machine, "half", machine.device), **environment)
    backend = json.loads((machine.folder / "half.json").read_text())["backend"]
    if not (difference := largest(one, load_file(machine.folder / "half.safetensors"))) < 1e-5:
        raise AssertionError(f"{backend}: two processes' update differs from one's by {difference:.1e}")
    return f"{backend}: two processes' update is one's to {difference:.0e}"


def half(machine: Machine) -> None:
    """Run by each of two processes: half of the responses."""
    weights, made = trained(machine, TERMS, per_device_train_batch_size=4)
    assert made.accelerator.num_processes == 2, "two processes were started, and each is alone"
    if made.accelerator.is_main_process:
        save_file(weights, machine.folder / "half.safetensors")
        (machine.folder / "half.json").write_text(json.dumps({"backend": torch.distributed.get_backend()}))
    made.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


RECIPE = """\
task: coins
task_kwargs: {prompts: 32}
model_name_or_path: testbed
eval_samples: 0
entropy_terms: [clip_cov, force_reweight, {log_det: {coef: 0.1}}]
max_steps: 4
num_generations: 8
per_device_train_batch_size: 16
learning_rate: 1.0e-4
logging_steps: 1
save_strategy: "no"
gradient_checkpointing: false
"""


def logged(folder: Path) -> list[dict]:
    """The entries of a run's optimiser steps; an AssertionError where a number is not finite."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    entries = [each for each in entries if "entropy" in each]
    for each in entries:
        for name, value in each.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise AssertionError(f"{name} is {value} at step {each['step']}")
    return entries


def fsdp2(machine: Machine) -> str:
    needs_gpu(machine, "accelerate shards on accelerators alone")
    (recipe := machine.folder / "recipe.yaml").write_text(RECIPE)
    out, count = machine.folder / "sharded", min(machine.count, 2)
    apart("-m", "hclm_rl", "grpo", "--config", str(recipe), "--output_dir", str(out),
          "--accelerate_config", "fsdp2", "--num_processes", str(count))  # fmt: skip
    entries = logged(out)
    assert len(entries) == 4, f"{len(entries)} of 4 steps were logged"
    return f"{count} GPU(s), 4 steps, entropy {entries[0]['entropy']:.3f} to {entries[-1]['entropy']:.3f}"


def small_model(machine: Machine) -> str:
    """A model that vLLM takes: heads of 64, and a tokenizer of the testbed; not trained."""
    folder = machine.folder / "small_model"
    tokenizer: Any = new_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    save_policy(LlamaForCausalLM(config), tokenizer, str(folder))
    return str(folder)


def with_vllm(machine: Machine, *, branches: bool = False, **changes: Any) -> str:
    settings = [f"--{key}={value}" for key, value in changes.items()]
    (recipe := machine.folder / "recipe.yaml").write_text(RECIPE)
    out = machine.folder / "with_vllm"
    launch("grpo", ["--config", str(recipe), "--output_dir", str(out), "--model_name_or_path", small_model(machine),
                    "--use_vllm", "true", "--vllm_max_model_length", "64", *settings])  # fmt: skip
    entries = logged(out)
    assert len(entries) == 4, f"{len(entries)} of 4 steps were logged"
    apart_by = [each["sampling/sampling_logp_difference/mean"] for each in entries]
    assert max(apart_by) < 0.1, f"log-probs of the engine are {max(apart_by):.2f} nats from the trainer's"
    ratio = entries[-1]["sampling/importance_sampling_ratio/mean"]
    said = f"4 steps, log-probs within {max(apart_by):.4f} nats a token of the trainer's, mean ratio {ratio:.3f}"
    if not branches:
        return said
    drawn, returned, reused = (
        sum(each[f"rollout/tokens_{name}"] for each in entries) for name in ("drawn", "returned", "reused")
    )
    assert drawn < returned, f"{drawn:.0f} tokens were drawn for {returned:.0f}: no branch took a prefix over"
    return f"{said}; {drawn:.0f} tokens drawn of {returned:.0f}, {reused:.0f} found in vLLM's cache"


def vllm_colocate(machine: Machine) -> str:
    needs_gpu(machine, "vLLM needs an accelerator")
    needs_package("vllm")
    return with_vllm(machine, vllm_mode="colocate", vllm_gpu_memory_utilization=0.2)


def vllm_cure(machine: Machine) -> str:
    needs_gpu(machine, "vLLM needs an accelerator")
    needs_package("vllm")
    rollout = json.dumps({"cure": {"branches": 3, "top": 5, "least_characters": 1}})
    return with_vllm(machine, branches=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.2, rollout=rollout)


def vllm_server(machine: Machine) -> str:
    needs_gpu(machine, "vLLM needs an accelerator")
    needs_package("vllm")
    if machine.count < 2:
        raise Skip("a server needs a GPU beside the trainer's, and one is in sight")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-c", "from trl.cli import main; main()", "vllm-serve", "--model", small_model(machine)]
    serve += ["--port", str(port), "--max_model_len", "64", "--gpu_memory_utilization", "0.3"]
    with (machine.folder / "server.txt").open("w") as out:
        server = subprocess.Popen(serve, stdout=out, stderr=out, env=os.environ | {"CUDA_VISIBLE_DEVICES": "1"})
    try:
        while not answers(port):
            assert server.poll() is None, f"the server ended: see {machine.folder / 'server.txt'}"
            time.sleep(1)
        return with_vllm(machine, vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{port}")
    finally:
        server.terminate()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def real(machine: Machine, *, with_terms: bool) -> str:
    """200 steps of recipes/real_model.yaml, or of the quickstart's where that model is not there."""
    is_real = (machine.model / "config.json").exists() and not machine.is_toy
    recipe = ROOT / "recipes" / ("real_model.yaml" if is_real else "quickstart.yaml")
    out = machine.folder.parent / f"real_{'terms' if with_terms else 'plain'}" / "run"
    steps = 4 if machine.is_toy else 200
    line = ["--config", str(recipe), "--output_dir", str(out), "--max_steps", str(steps), "--eval_samples", "0",
            "--logging_steps", "1", "--save_strategy", "no"]  # fmt: skip
    line += ["--model_name_or_path", str(machine.model)] if is_real else []
    line += ["--use_cpu", "true", "--per_device_train_batch_size", "16"] if machine.is_toy else ["--bf16", "true"]
    began = time.monotonic()
    launch("grpo", line if with_terms else [*line, "--entropy_terms", "[]"])
    entries = logged(out)
    assert len(entries) == steps, f"{len(entries)} of {steps} steps were logged"
    ends = {}
    for name in ("entropy", "reward"):  # steps without a new rollout log no reward
        told = [each[name] for each in entries if name in each]
        ends[name] = (told[0], statistics.mean(told[-max(1, len(told) // 10) :]))
    entropy = ends["entropy"][1]
    said = f"{'SmolLM2-135M' if is_real else 'the testbed policy'}, {steps} steps in {time.monotonic() - began:.0f} s: "
    said += ", ".join(f"{name} {first:.3f} to {last:.3f}" for name, (first, last) in ends.items())
    (out / "end.json").write_text(json.dumps({"entropy": entropy}))
    plain = machine.folder.parent / "real_plain" / "run" / "end.json"
    if with_terms and plain.exists():
        without = json.loads(plain.read_text())["entropy"]
        assert machine.is_toy or entropy > without, f"{said}; without terms {without:.3f} is left"
        said += f" (without terms {without:.3f})"
    return said


def overhead(machine: Machine) -> str:
    toy = ["--shape", "toy", "--rounds", "4"] if machine.is_toy else ["--shape", "half_b", "--rounds", "8"]
    rows = ["--only", "on-policy", "--rows", "empty chain", "clip_cov", "log_det", "information_force"]
    told = apart(str(ROOT / "eval" / "overhead.py"), *toy, *rows, "--device", machine.device, "--out",
                 str(machine.folder), "--json", str(machine.folder / "overhead.json"))  # fmt: skip
    print(told)
    found = json.loads((machine.folder / "overhead.json").read_text())["on-policy"]
    return "; ".join(f"{name} {each['wall_ratio']:.2f} of stock TRL's step" for name, each in found.items())


CHECKS: dict[str, Callable[[Machine], str]] = {
    "device": device,
    "empty": empty,
    "terms": terms,
    "bf16": bf16,
    "lora": lora,
    "compile": compiled,
    "processes": processes,
    "fsdp2": fsdp2,
    "vllm colocate": vllm_colocate,
    "vllm cure": vllm_cure,
    "vllm server": vllm_server,
    "real plain": lambda machine: real(machine, with_terms=False),
    "real terms": lambda machine: real(machine, with_terms=True),
    "overhead": overhead,
}
# what a check starts in a process of its own
PARTS: dict[str, Callable[[Machine], None]] = {
    "half": half,
    "every update": lambda machine: every_update(machine, machine.folder / "cpu.safetensors"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*CHECKS, *PARTS])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, to test this script")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    machine = Machine(device=options.device, folder=options.folder, model=options.model, is_toy=options.toy)
    if options.device == "cuda" and options.name in CHECKS and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: give --device cpu, or install torch's CUDA build")
    if options.name in PARTS:
        return PARTS[options.name](machine)
    try:
        print("PASS", CHECKS[options.name](machine), flush=True)
    except Skip as reason:
        print("SKIP", reason, flush=True)


if __name__ == "__main__":
    main()
