"""What the terms cost: the time of one optimiser step and the peak memory, against stock TRL and the usual way.

    python eval/overhead.py                                             # all parts, on SmolLM2-135M
    python eval/overhead.py --shape half_b --only on-policy --alone --rounds 3  # D = 896, V = 151,936, 16 x 512 tokens
    python eval/overhead.py --only usual --tokens 4096                  # usual_way.py: the whole logits, by autograd
    python eval/overhead.py --only phases                               # the quickstart: generation, scoring, training
    python eval/overhead.py --shape toy --only on-policy --rounds 4     # the script itself

`make bench` runs the first two, the second for some rows: a step takes minutes on a CPU. In on-policy, off-policy and
accumulated all trainers live in one process and take turns, one optimiser step each in a random order, so that the
machine's ups and downs hit all alike. The ratio is of the medians; beside it stand the quartiles of the ratios to stock
TRL's step of the same round; CPU seconds are steadier on a shared machine. Completions are fixed (no generation), so
the step is shorter and the ratios stricter than in a real run. Where the step is cut into micro-batches, statistics of
the whole step take a scoring pass first: the row "scoring pass" has that pass and nothing else ("with states": the
hidden states kept), and "own" is what a term takes beyond its row, in units of stock TRL's step. Peak memory is that of
a process of its own per row; `--alone` takes the time from there too, where all rows at once do not fit into memory.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import trl
from phases import shares_of_the_quickstart
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from usual_way import beside_the_usual_way

import hclm_rl
from hclm_rl import Rollout, RolloutEffect, Term
from hclm_rl.testbed.policy import new_tokenizer
from hclm_rl.testbed.task import find_task


@dataclass(frozen=True, kw_only=True)
class ScoringPass(Term):
    """A chain that reads what stage 1 may read and does nothing with it."""

    needs_scores: ClassVar[bool] = True
    with_states: bool = False

    @property
    def needs_hidden(self) -> bool:
        return self.with_states

    def on_rollout(self, rollout: Rollout, memory: dict) -> RolloutEffect:
        return RolloutEffect()


CHAINS: dict[str, list | None] = {
    "stock TRL": None,
    "empty chain": [],
    "scoring pass": [ScoringPass()],
    "scoring pass with states": [ScoringPass(with_states=True)],
    "clip_cov": ["clip_cov"],
    "entropy_bonus": ["entropy_bonus"],
    "log_det": ["log_det"],
    "information_force": ["information_force"],
    "force_reweight": ["force_reweight"],
    "entropy_flow": ["entropy_flow"],
    "entropy_flow, head": [{"entropy_flow": {"through": "head"}}],
    "hold_coverage": ["hold_coverage"],
    "right_anchor, share .5": [{"right_anchor": {"share": 0.5, "source": "any"}}],
}
# whose scoring pass keeps the hidden states: they read them, or the next-token distribution
WITH_STATES = ("log_det", "information_force", "force_reweight", "entropy_flow", "entropy_flow, head")
REPLAYS = ("hold_coverage", "right_anchor, share .5")
LIMITS = {
    "empty chain": 1.01,
    "clip_cov": 1.03,
    "entropy_bonus": 1.03,
    "log_det": 1.06,
    "information_force": 1.10,
    "force_reweight": 1.10,
    "entropy_flow, head": 1.15,
}
RESPONSES = 16  # per optimiser step
SETTINGS = {
    "on-policy": {"per_device_train_batch_size": RESPONSES},
    # TRL makes the pass for old log-probs itself
    "off-policy": {"per_device_train_batch_size": RESPONSES, "num_iterations": 2},
    # on-policy in two halves: the statistics of the step need a pass before the first half's backward
    "accumulated": {"per_device_train_batch_size": RESPONSES // 2, "gradient_accumulation_steps": 2},
}
PARTS = (*SETTINGS, "usual", "phases")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model made on the spot, and the tokens of its completions."""

    width: int
    vocab: int
    layers: int
    heads: int
    mlp: int
    tokens: int

    def model(self) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=self.width, vocab_size=self.vocab, num_hidden_layers=self.layers,
                intermediate_size=self.mlp, num_attention_heads=self.heads, num_key_value_heads=2,
                max_position_embeddings=2048, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                tie_word_embeddings=True,
            )
        )  # fmt: skip


SHAPES = {
    # Qwen2.5-0.5B with 2 of its 24 layers: terms add to what comes after the last, so its own are lower
    "half_b": Shape(width=896, vocab=151_936, layers=2, heads=14, mlp=4864, tokens=512),
    "toy": Shape(width=64, vocab=512, layers=2, heads=2, mlp=128, tokens=8),
}
SMOLLM2_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Which model trains, where."""

    shape: str  # "smollm2", or one of SHAPES
    folder: str  # of SmolLM2
    device: str

    @property
    def tokens(self) -> int:
        return SHAPES[self.shape].tokens if self.shape in SHAPES else SMOLLM2_TOKENS

    def model(self) -> Any:
        if self.shape in SHAPES:
            return SHAPES[self.shape].model()
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def tokenizer(self) -> Any:
        return new_tokenizer() if self.shape in SHAPES else AutoTokenizer.from_pretrained(self.folder)

    def prompts(self) -> Any:
        """Four, so that each comes back every other step: what once was right is replayed from then on."""
        task = (
            find_task("coins", prompts=4)
            if self.shape in SHAPES
            else find_task("arithmetic", problem="sums", prompts=4)
        )
        return task.train_dataset

    def responses(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Fixed tokens after each prompt, the same for every trainer and step: nothing is generated."""
        tokenizer = trainer.processing_class
        words = min(trainer.model.config.vocab_size, 40_000)
        draws = random.Random(0)
        made = [[draws.randrange(2, words) for _ in range(self.tokens - 1)] for _ in prompts]
        completion_ids = [[*each, tokenizer.eos_token_id] for each in made]
        return {"prompt_ids": tokenizer(prompts)["input_ids"], "completion_ids": completion_ids, "logprobs": None}


class TakesTurns(TrainerCallback):
    """Lets one trainer at a time take one optimiser step, and times it."""

    def __init__(self, turn: threading.Semaphore, done: threading.Semaphore) -> None:
        self.turn, self.done = turn, done
        self.seconds: list[tuple[float, float]] = []  # wall, CPU of the process

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turn.acquire()
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append((time.perf_counter() - self.start[0], time.process_time() - self.start[1]))
        self.done.release()


def every_other(completions: list[str], **_: Any) -> list[float | None]:
    """A reward with spread in every group."""
    return [float(i % 2) for i in range(len(completions))]


def build(name: str, subject: Subject, model: Any, setting: str, steps: int, out: Path) -> Any:
    """The trainer of one row; all rows of a process may share the model, each has its own optimiser."""
    terms = CHAINS[name]
    config = trl.GRPOConfig if terms is None else hclm_rl.GRPOConfig
    changes: dict[str, Any] = dict(SETTINGS[setting])
    if terms is not None:
        changes["entropy_terms"] = terms
    args = config(
        output_dir=str(out),
        num_generations=8,
        max_completion_length=subject.tokens,
        max_steps=steps,
        learning_rate=1e-7,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=subject.device == "cpu",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **changes,
    )
    trainer = trl.GRPOTrainer if terms is None else hclm_rl.GRPOTrainer
    made = trainer(
        model=model,
        reward_funcs=every_other,
        args=args,
        train_dataset=subject.prompts(),
        processing_class=subject.tokenizer(),
        rollout_func=subject.responses,
    )
    made.remove_callback(PrinterCallback)  # the tables are what is printed
    return made


def take_turns(names: list[str], subject: Subject, setting: str, rounds: int, out: Path) -> dict[str, list]:
    """(wall, CPU) seconds of every optimiser step of every row, the first two rounds left out as warm-up."""
    model, done = subject.model(), threading.Semaphore(0)
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
        trainer = build(name, subject, model, setting, rounds, out / name.replace(" ", "_"))
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


def alone(name: str, subject: Subject, setting: str, steps: int, out: Path) -> tuple[float, list]:
    """Of a process that makes some steps of one row: its peak memory in MiB, resident or of the GPU's allocator, and
    (wall, CPU) seconds of every step but the first."""
    command = [sys.executable, "-W", "ignore", __file__, "--out", str(out), "--alone-in", name, "--only", setting]
    command += ["--shape", subject.shape, "--model", subject.folder, "--device", subject.device, "--rounds", str(steps)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(json.loads(said.splitlines()[-1]))


def alone_here(name: str, subject: Subject, setting: str, steps: int, out: Path) -> tuple[float, list]:
    clock = TakesTurns(threading.Semaphore(steps), threading.Semaphore(0))
    trainer = build(name, subject, subject.model(), setting, steps, out)
    trainer.add_callback(clock)
    trainer.train()
    if subject.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20, clock.seconds[1:]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, clock.seconds[1:]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a setting's table."""

    name: str
    wall: float  # seconds, medians
    wall_ratio: float
    quartiles: tuple[float, float]
    cpu: float
    cpu_ratio: float
    own: float | None  # of CPU seconds, beyond the scoring pass, in units of stock TRL's step
    limit: float | None
    peak: float | None = None  # MiB
    peak_ratio: float | None = None

    def cells(self) -> list[str]:
        def text(value: float | None, digits: int = 3) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        quartiles = "-".join(f"{each:.3f}" for each in self.quartiles)
        return [self.name, text(self.wall), text(self.wall_ratio), quartiles, text(self.cpu), text(self.cpu_ratio),
                text(self.own), text(self.limit, 2), text(self.peak, 0), text(self.peak_ratio)]  # fmt: skip


def rows_of(seconds: dict[str, list], peaks: dict[str, float]) -> list[Row]:
    """The table's numbers from those of the steps, a (wall, CPU) each, and from the peaks of memory in MiB."""
    medians = {name: tuple(statistics.median(each) for each in zip(*own, strict=True)) for name, own in seconds.items()}
    stock_wall, stock_cpu = medians["stock TRL"]
    rows = []
    for name, own in seconds.items():
        ratios = [mine[0] / its[0] for mine, its in zip(own, seconds["stock TRL"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        wall, cpu = medians[name]
        below = "scoring pass with states" if name in WITH_STATES else "scoring pass"
        beyond = (
            None
            if name.startswith(("stock", "empty", "scoring")) or below not in medians
            else (cpu - medians[below][1]) / stock_cpu
        )
        rows.append(
            Row(
                name=name, wall=wall, wall_ratio=wall / stock_wall, quartiles=(low, high), cpu=cpu,
                cpu_ratio=cpu / stock_cpu, own=beyond, limit=LIMITS.get(name), peak=peaks.get(name),
                peak_ratio=peaks[name] / peaks["stock TRL"] if name in peaks else None,
            )
        )  # fmt: skip
    return rows


def table_of(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for column in ("chain", "wall s", "ratio", "quartiles", "CPU s", "ratio", "own", "limit", "peak MiB", "ratio"):
        table.add_column(column, justify="left" if column == "chain" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, by default all")
    parser.add_argument("--shape", choices=["smollm2", *SHAPES], default="smollm2", help="the model that trains")
    parser.add_argument("--model", default="models/smollm2-135m", help="folder of the prepared model, of smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=14, help="steps of each row, the first two left out; at least 4")
    parser.add_argument("--rows", nargs="+", choices=list(CHAINS), default=list(CHAINS))
    parser.add_argument("--tokens", type=int, default=2048, help="of the comparison with the usual way")
    parser.add_argument("--steps", type=int, default=40, help="of the quickstart, of the phases")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--json", type=Path, help="also write all numbers there")
    parser.add_argument("--alone", action="store_true", help="time from those processes too: where memory is short")
    parser.add_argument("--alone-in", choices=list(CHAINS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    subject = Subject(shape=args.shape, folder=args.model, device=args.device)
    settings = [each for each in args.only if each in SETTINGS]
    if settings and args.shape == "smollm2" and not (Path(args.model) / "config.json").exists():
        sys.exit(f"no model in {args.model}: make it with `python -m hclm_rl.testbed.smollm2 --out {args.model}`")
    if args.alone_in:
        print(json.dumps(alone_here(args.alone_in, subject, args.only[0], args.rounds, args.out)))
        return
    names = [name for name in CHAINS if name in ("stock TRL", *args.rows)]  # with which the others are compared
    # as wide as the tables where nobody watches
    console, found = Console(width=None if sys.stdout.isatty() else 140), {}
    for setting in settings:
        seconds = {} if args.alone else take_turns(names, subject, setting, args.rounds, args.out)
        peaks = {}
        for name in names if args.alone or not args.no_memory else []:
            # Adam's moments are there from the second step on; what once was right is replayed from the third on
            steps = args.rounds if args.alone else 4 if name in REPLAYS else 2
            peaks[name], own = alone(name, subject, setting, steps, args.out)
            if args.alone:
                seconds[name] = own
        rows = rows_of(seconds, peaks)
        rounds = args.rounds - (1 if args.alone else 2)
        what = f"{RESPONSES} completions of {subject.tokens} tokens, {args.shape}, {rounds} rounds"
        console.print(table_of(rows, f"{setting}: one optimiser step of {what}"))
        found[setting] = {row.name: asdict(row) for row in rows}
    if "usual" in args.only:
        shape = SHAPES.get(args.shape, SHAPES["half_b"])
        found["usual"] = beside_the_usual_way(shape.width, shape.vocab, args.tokens, args.device, console)
    if "phases" in args.only:
        found["phases"] = shares_of_the_quickstart(args.steps, args.out / "phases", console)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
