"""docs/pass_at_k.svg, the picture of the README: pass@k before training, with plain GRPO and with hold_coverage.

docs/pass_at_k_starts.svg, that of docs/choose.md, has both starts and a KL to the start too.

python eval/leaderboard.py --runs docs/leaderboard_runs.tar.xz --table     # brings the published runs
python eval/front.py --out runs/leaderboard
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from leaderboard.plan import BEFORE, Board
from leaderboard.statistics import pass_curve
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy import ndarray

from hclm_rl.watch.report.figures import BEFORE_COLOUR, COLOURS, STYLE, svg_of

HERE = Path(__file__).parent
PANELS = {"coins_noisy": "a start that has yet to learn", "coins": "a start that has coverage"}
LINES = {
    BEFORE: ("before training", BEFORE_COLOUR),
    "plain": ("plain GRPO", COLOURS[0]),
    "kl_to_start, beta=0.1": ("KL to the start, 0.1", COLOURS[2]),
    "hold_coverage": ("hold_coverage", COLOURS[1]),
}
OF_README = (BEFORE, "plain", "hold_coverage")  # on the first of the panels


def curves(board: Board, name: str) -> ndarray:
    """(seeds, K): the mean pass@k of each seed's held-out prompts."""
    found = {each.name: each for entry in board.entries() for each in entry.shown}
    summaries = found[name].summaries(board.seeds, "report").values()
    correct = np.array([each["per_prompt"]["correct"] for each in summaries])
    return pass_curve(correct, board.samples, board.pass_ks).mean(axis=2).T


def draw(boards: Sequence[Board], names: Sequence[str]) -> Figure:
    """A panel a board, with a curve a name: the mean over seeds, in the band of their range."""
    size = (1.6 + 3.7 * len(boards), 3.4) if len(boards) > 1 else (6.4, 2.1)  # the README is one screen
    figure = Figure(figsize=size, layout="constrained")
    for axes, board in zip(figure.subplots(1, len(boards), sharey=True, squeeze=False)[0], boards, strict=True):
        for name in names:
            label, colour = LINES[name]
            of = curves(board, name)
            axes.plot(
                board.pass_ks, of.mean(axis=0), color=colour, marker="o", markersize=3.5, label=label, clip_on=False
            )
            axes.fill_between(board.pass_ks, of.min(axis=0), of.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(board.pass_ks, list(map(str, board.pass_ks)))
        axes.set(title=PANELS[board.task], xlabel="k", ylim=(0, 1))
    figure.axes[0].set_ylabel("pass@k, held out")
    figure.axes[0].legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="folder of the runs")
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs", help="folder of the pictures")
    parser.add_argument("--seeds", type=int, nargs="+", help="the file's unless given")
    options = parser.parse_args()
    written = yaml.safe_load((HERE / "leaderboard.yaml").read_text())
    with rc_context(STYLE):
        boards = [Board.read(written, task, "off_policy", out=options.out, seeds=options.seeds) for task in PANELS]
        (options.to / "pass_at_k.svg").write_text(svg_of(draw(boards[:1], OF_README)))
        (options.to / "pass_at_k_starts.svg").write_text(svg_of(draw(boards, tuple(LINES))))


if __name__ == "__main__":
    main()
