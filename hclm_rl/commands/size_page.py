"""`hclm-rl doctor --gpus 8 --model-size 7b --responses 512 --length 16384`: does it fit, and what does each term cost

The formulas are those of sizes.py. Without --config each term of the library stands for itself.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..chain.chain import Link
from ..recipe.arguments import parse, recipe_of, with_recipe_apart
from ..recipe.config import build_chain, known_terms
from .sizes import ASKED, MODELS, Cost, Run, cost_of, model_of, needed, what_would_fit


def table_of(costs: Sequence[Cost], run: Run, tflops: float | None) -> Table:
    """A row a term."""
    table = Table(
        title="What each term adds on one GPU and optimiser step: keeps and peak in GiB,\nTFLOP and their share of the "
        "step's, sends in MiB" + (", seconds by --tflops" if tflops else ""),
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    for column in ("term", "keeps", "peak", "TFLOP", "of step", "sends", "pass"):
        table.add_column(column, justify="left" if column == "term" else "right", no_wrap=True)
    if tflops:
        table.add_column("s", justify="right", no_wrap=True)
    for cost in costs:
        operations = cost.flops + cost.head_flops
        teras = operations / 1e12
        cells = [cost.name, f"{cost.kept:.1f}", f"{cost.peak:.2f}", f"{teras:.{1 if teras < 100 else 0}f}"]
        cells += [f"{100 * operations / run.flops:.1f} %", f"{cost.sent:.0f}", "yes" if cost.pass_flops else ""]
        table.add_row(*cells, *([f"{operations / tflops / 1e12:.2f}"] if tflops else []))
    return table


def show(console: Console, run: Run, links: Sequence[Link], tflops: float | None, is_each_alone: bool) -> bool:
    """The page; whether it fits."""
    costs = [cost_of(link, run) for link in links]
    console.print(
        f"{run.responses} responses of at most {run.length} tokens on {run.gpus} GPUs of {run.memory:g} GiB: "
        f"{run.tokens / 1e6:.2f} million tokens a GPU; D = {run.model.width}, V = {run.model.vocabulary}"
    )
    console.print(table_of(costs, run, tflops))
    if scoring := max((cost.pass_flops for cost in costs), default=0.0):
        seconds = f", {scoring / tflops / 1e12:.1f} s" if tflops else ""
        console.print(
            f"pass: one forward pass more over the batch, {scoring / 1e12:.0f} TFLOP or "
            f"{100 * scoring / run.flops:.0f} % of the step{seconds}; once for all terms that say yes, and none where "
            "TRL makes it anyway (several updates a rollout, vLLM)"
        )
    for cost in costs:
        if cost.note:
            console.print(f"{cost.name}: {cost.note}")
    total = needed(costs, run, is_each_alone)
    without = f"{run.base:.1f} GiB of it without terms" + (", with the greatest term alone" if is_each_alone else "")
    if total <= run.memory:
        console.print(f"fits: {total:.1f} of {run.memory:g} GiB, {without}")
        return True
    console.print(f"will not fit: {total:.1f} of {run.memory:g} GiB, {without}; what would, each by itself:")
    for sentence in what_would_fit(links, run, is_each_alone) or [
        "none of: bfloat16, a smaller micro-batch or batch, more GPUs"
    ]:
        console.print(f"- {sentence}", highlight=False)
    return False


def flags() -> argparse.ArgumentParser:
    """What the page takes; further flags are the recipe's."""
    parser = argparse.ArgumentParser(
        prog="hclm-rl doctor",
        allow_abbrev=False,
        description="Memory, operations and communication of each term by formula. With --config those of a recipe.",
    )
    parser.add_argument(ASKED, required=True, help=f"{', '.join(MODELS)}, or a config.json")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--responses", type=int, default=512, help="of a generation batch, on all GPUs")
    parser.add_argument("--length", type=int, default=16_384, help="tokens of a response at most")
    parser.add_argument("--micro-batch", type=int, default=None, help="responses on a GPU at once; the recipe's")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB")
    parser.add_argument("--states", choices=("float32", "bfloat16"), default="float32", help="dtype of the model")
    parser.add_argument("--tflops", type=float, help="of the GPU, by which operations become seconds")
    parser.add_argument("--replicated", action="store_true", help="each GPU holds the whole model: DDP")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the page")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Exit code 1 where the run does not fit."""
    options, line = flags().parse_known_args(arguments)
    for name in ("gpus", "responses", "length", "gpu_memory"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    line, links, size = with_recipe_apart(line), [build_chain([name]).links[0] for name in known_terms()], 1
    is_each_alone = recipe_of(line) is None
    if not is_each_alone:
        config = parse("grpo", line)[1]
        links, size = list(build_chain(config.entropy_terms).links), config.per_device_train_batch_size
    run = Run(
        model=model_of(options.model_size),
        gpus=options.gpus,
        responses=options.responses,
        length=options.length,
        micro_batch=options.micro_batch or size,
        state_bytes=2 if options.states == "bfloat16" else 4,
        memory=options.gpu_memory,
        is_sharded=not options.replicated,
    )
    if not options.json:
        return 0 if show(Console(), run, links, options.tflops, is_each_alone) else 1
    costs = [cost_of(link, run) for link in links]
    total = needed(costs, run, is_each_alone)
    print(json.dumps({"base": run.base, "needed": total, "terms": [asdict(each) for each in costs]}))
    return 0 if total <= run.memory else 1
