"""Which score knows the tokens that move the entropy: one Adam step, taken without parts of its tokens, on three seeds.

    python eval/ablation.py --out runs/ablation --seeds 1 2 3     # a file a seed; finished ones are not repeated
    python eval/ablation.py --out runs/ablation --table

Two truths for every score, both on responses to other prompts than the step's: what each tenth of the step's tokens,
sorted by that score, does to the entropy, and what single tokens do, drawn by chance, the same for all scores. For each
the rank correlation with the score, over all single tokens and over those of the upper half by what they do.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from many_runs import QUIET, TESTBED, flags, write
from rich.console import Console
from rich.table import Table
from scipy import stats

from hclm_rl.commands.ablation import SCORES, Step, ablated, prepared


def single_tokens(step: Step, count: int, seed: int) -> dict:
    """What each of `count` tokens does to the entropy held out, and what the scores say of it."""
    places = step.trained.nonzero()
    chosen = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]]
    parts = []
    for row, column in chosen.tolist():
        part = torch.zeros_like(step.trained)
        part[row, column] = True
        parts.append(part)
    said = {name: [step.batch.scores[name][part].item() for part in parts] for name in SCORES}
    return {"did": step.moved_by(parts), "said": said}


def measured(seed: int, tokens: int, prompts: int, batches: int, line: Sequence[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        own = [*flags(TESTBED | QUIET | {"seed": seed}), *line]
        step = prepared(own, folder, prompts=prompts, batches=batches).in_float64()
        deciles = {name: ablated(step, name, "coins") for name in SCORES}
        return {
            "seed": seed,
            "tokens": next(iter(deciles.values())).tokens,
            "held_out": next(iter(deciles.values())).held_out,
            "deciles": {name: {"said": of.said, "did": of.did} for name, of in deciles.items()},
            "single": single_tokens(step, tokens, seed),
        }


def rank_correlation(said: Sequence[float], did: Sequence[float]) -> float:
    return float(stats.spearmanr(said, did)[0])  # type: ignore[arg-type]


def tabulate(runs: Sequence[dict]) -> Table:
    """Mean and each seed's."""
    table = Table(title=f"Rank correlation with what the tokens did, {len(runs)} seeds: mean (each)")
    for column in ("score", "tenths by the score", "single tokens", "the half of them that does most"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name in SCORES:
        tenths, single, large = [], [], []
        for run in runs:
            tenths.append(rank_correlation(run["deciles"][name]["said"], run["deciles"][name]["did"]))
            said, did = run["single"]["said"][name], run["single"]["did"]
            single.append(rank_correlation(said, did))
            least = statistics.median(map(abs, did))
            pairs = [(a, b) for a, b in zip(said, did, strict=True) if abs(b) >= least]
            large.append(rank_correlation(*zip(*pairs, strict=True)))
        cells = (
            f"{statistics.fmean(each):+.2f} ({', '.join(f'{value:+.2f}' for value in each)})"
            for each in (tenths, single, large)
        )
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=300, help="single ones")
    parser.add_argument("--prompts", type=int, default=8, help="of the step, 16 responses each")
    parser.add_argument("--batches", type=int, default=4, help="of which the last is the step, the others held out")
    parser.add_argument("--table", action="store_true", help="of what is there; measures nothing")
    options, line = parser.parse_known_args()
    for seed in [] if options.table else options.seeds:
        file = options.out / f"seed_{seed}.json"
        if not file.exists():
            write(file, measured(seed, options.tokens, options.prompts, options.batches, line))
    runs = [json.loads(file.read_text()) for file in sorted(options.out.glob("seed_*.json"))]
    Console(width=130).print(tabulate(runs))


if __name__ == "__main__":
    main()
