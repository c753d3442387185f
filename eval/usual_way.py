"""Functionals of the next-token distribution, by chunks as here and the usual way: `eval/overhead.py --only usual`.

The usual way, in public code of these methods: the logits of all tokens at once, log_softmax, the functional, and
autograd. Each is a process of its own, whose peak memory counts beyond that of the states and the head.

    python eval/usual_way.py --width 64 --vocab 512 --tokens 256
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hclm_rl.equations.flow import mean_discriminator
from hclm_rl.equations.vocab import Head, entropy_by_head, over_rows
from hclm_rl.terms.siren import nucleus_entropy

LEAST_MEMORY, MOST_TIME = 5.0, 1.0  # what must hold at V = 151,936: times less memory, and no slower


def shannon(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)


def nucleus(logps: Tensor) -> Tensor:
    return nucleus_entropy(logps, 0.8)


def usual_nucleus(logps: Tensor) -> Tensor:
    """As written where the method is published: sort, cumulate, mask, renormalise."""
    p, _ = logps.exp().sort(dim=-1, descending=True)
    outside = p.cumsum(dim=-1) - p >= 0.8
    p = p.masked_fill(outside, 0.0)
    p = p / p.sum(dim=-1, keepdim=True)
    return -(p * (p + 1e-12).log()).sum(dim=-1)


def usual_discriminator(logps: Tensor) -> Tensor:
    p = logps.exp()
    entropy = -(p * logps).sum(dim=-1, keepdim=True)
    s = p * (logps + entropy)
    return (p * s).sum(dim=-1)


def trained_by(functional: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Head, bool], Tensor]:
    """The gradient at the states of the functional's mean: what an added loss takes."""

    def make(rows: Tensor, head: Head, ours: bool) -> Tensor:
        rows = rows.requires_grad_()
        own = usual_nucleus if functional is nucleus else functional
        values = over_rows(functional, rows, head) if ours else own((rows @ head.weight.T).log_softmax(dim=-1))
        values.mean().backward()
        assert rows.grad is not None
        return rows.grad

    return make


def discriminator(rows: Tensor, head: Head, ours: bool) -> Tensor:
    """sum_v p_v S_v, no gradient: what `discriminator_clip` and `entropy_flow` take."""
    with torch.no_grad():
        if ours:
            return over_rows(mean_discriminator, rows, head)
        return usual_discriminator((rows @ head.weight.T).log_softmax(dim=-1))


def entropy_change(rows: Tensor, head: Head, ours: bool) -> Tensor:
    """The gradient of the entropy at the head's weight: what `entropy_flow` with `through: head` takes."""
    if ours:
        return entropy_by_head(rows, head)
    weight = head.weight.detach().requires_grad_()
    shannon((rows @ weight.T).log_softmax(dim=-1)).sum().backward()
    assert weight.grad is not None
    return weight.grad


WAYS: dict[str, Callable[[Tensor, Head, bool], Tensor]] = {
    "entropy": trained_by(shannon),
    "discriminator": discriminator,
    "nucleus entropy": trained_by(nucleus),
    "entropy change": entropy_change,
}


def measure(name: str, ours: bool, width: int, vocab: int, tokens: int, device: str) -> dict[str, Any]:
    """Seconds, peak MiB beyond what is given, and the result's sum and largest number, to compare both by."""
    torch.manual_seed(0)
    rows = torch.randn(tokens, width, device=device)
    head = Head(weight=torch.randn(vocab, width, device=device).mul_(width**-0.5))  # no copy, which could be the peak
    WAYS[name](rows[:2].clone(), head, ours)  # what libraries load at their first use
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = psutil.Process().memory_info().rss / 2**20  # now: the most so far holds what was drawn and tried
    start = time.perf_counter(), time.process_time()
    found = WAYS[name](rows, head, ours).detach()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    after = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0
    after = after or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "cpu": cpu, "peak": after - before, "norm": found.norm().item()}


def beside_the_usual_way(width: int, vocab: int, tokens: int, device: str, console: Console) -> dict[str, dict]:
    """{functional: {"ours": ..., "usual": ..., "memory": times less, "time": ours / usual}}; prints a table."""
    table = Table(title=f"{tokens} tokens, D = {width}, V = {vocab:,}: by chunks, and all logits at once")
    for column in ("", "MiB", "usual MiB", "times less", "CPU s", "usual CPU s", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    found = {}
    for name in WAYS:
        both = {}
        for way in ("ours", "usual"):
            command = [sys.executable, "-W", "ignore", __file__, "--name", name, "--way", way, "--device", device]
            command += ["--width", str(width), "--vocab", str(vocab), "--tokens", str(tokens)]
            both[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ours, usual = both["ours"], both["usual"]
        if abs(ours["norm"] - usual["norm"]) > 1e-3 * usual["norm"]:
            raise AssertionError(f"{name}: the two ways disagree: norms {ours['norm']:.6g} and {usual['norm']:.6g}")
        clock = "seconds" if device == "cuda" else "cpu"
        less, ratio = usual["peak"] / max(ours["peak"], 1.0), ours[clock] / usual[clock]
        found[name] = both | {"memory": less, "time": ratio}
        table.add_row(name, f"{ours['peak']:.0f}", f"{usual['peak']:.0f}", f"{less:.1f}", f"{ours[clock]:.2f}",
                      f"{usual[clock]:.2f}", f"{ratio:.2f}")  # fmt: skip
    console.print(table)
    console.print(f"What must hold at V = 151,936: {LEAST_MEMORY:g} times less, ratio at most {MOST_TIME:g}.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=list(WAYS), help="one functional, as JSON; by default all, as a table")
    parser.add_argument("--way", choices=["ours", "usual"], default="ours")
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.name is None:
        beside_the_usual_way(
            args.width, args.vocab, args.tokens, args.device, Console(width=None if sys.stdout.isatty() else 140)
        )
        return
    print(json.dumps(measure(args.name, args.way == "ours", args.width, args.vocab, args.tokens, args.device)))


if __name__ == "__main__":
    main()
