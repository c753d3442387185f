"""`hclm-rl ablate`: does a score know which tokens of a step move the entropy?

One optimiser step of the recipe is taken whole and then once more without each tenth of its tokens, sorted by the
score; the entropy is measured on rollouts of other prompts. The model and the optimiser are put back each time.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from ..recipe.arguments import recipe_of, with_recipe_apart
from .ablation import Ablation, ablated, prepared
from .doctor import DEFAULT, as_flags
from .helps import of_ablate


def show(console: Console, of: Ablation) -> None:
    """The claim beside what was measured."""
    console.print(
        f"[bold]{of.recipe}[/bold]: one step of {of.tokens} tokens moves the entropy by {of.step:+.2e} nats, from "
        f"{of.entropy:.4f}, on {of.held_out} responses to other prompts",
        highlight=False,
    )
    table = Table(title=f"The step's tokens by the score '{of.score}', least first", title_justify="left")
    for column in ("part", "the score says", "the entropy moved by (nats)"):
        table.add_column(column, justify="right")
    for i, (said, did) in enumerate(zip(of.said, of.did, strict=True), start=1):
        table.add_row(str(i), f"{said:+.2e}", f"{did:+.2e}")
    console.print(table)
    console.print(
        f"Claim: tokens with a lower score burn more entropy. Rank correlation of score and change over "
        f"{len(of.said)} parts: {of.correlation:+.2f} (1: the same order, 0: none). The score has no unit.",
        highlight=False,
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code 0; a recipe that cannot run is a sentence."""
    options, line = of_ablate().parse_known_args(arguments)
    if options.parts < 2 or options.prompts < 2 or options.batches < 2:
        raise ValueError(
            f"--parts, --prompts and --batches must be at least 2, got {options.parts}, {options.prompts} and "
            f"{options.batches}"
        )
    try:
        import scipy  # noqa: F401 (a sentence before minutes of work)
    except ModuleNotFoundError as error:
        raise ValueError("hclm-rl ablate needs scipy: pip install 'hclm-rl[eval]'") from error
    line = with_recipe_apart(line)
    if recipe_of(line) is None:
        line = [*as_flags(DEFAULT), *line]
    recipe = str(recipe_of(line) or "the embedded default")
    with tempfile.TemporaryDirectory() as folder:
        step = prepared(line, folder, options.algorithm, options.prompts, options.batches)
        found = ablated(step, options.score, recipe, options.parts)
    if options.json:
        print(json.dumps(asdict(found) | {"correlation": found.correlation}, indent=1))
    else:
        show(Console(), found)
    return 0
