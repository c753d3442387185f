"""How well the first part of each run forecasts the rest by the entropy-performance law: one Markdown row a run.

    python eval/law.py runs/plain runs/controlled --share 0.15

`ceiling, early` and `ceiling, all` are b - a by the first part and by all points, with 95 % intervals; `end` is the
mean reward of the last tenth of the points, `end, forecast` the early law at their observed entropies.
"""

import argparse
import statistics
from pathlib import Path

from hclm_rl.evaluation.forecast import curve_of
from hclm_rl.evaluation.law import SHARE, Law, forecast
from hclm_rl.watch.report.runs import read_run

COLUMNS = (
    "run", "a, early", "ceiling, early", "ceiling, all", "error", "later RMSE", "end", "end, forecast", "verdict"
)  # fmt: skip


def ceiling_of(law: Law) -> str:
    low, high = law.interval()
    return f"{law.ceiling:.3f} [{low:.3f}, {high:.3f}]"


def row_of(folder: Path, share: float, entropy: str, reward: str) -> list[str]:
    curve = curve_of(read_run(folder.name, folder), entropy, reward)
    found = forecast(curve.steps, curve.entropy, curve.reward, last_step=share * curve.last_step)
    name = "/".join(folder.parts[-2:])
    if found.law is None or found.whole is None:
        return [name, *[""] * (len(COLUMNS) - 2), found.objection or "nothing to compare with"]
    tenth = max(len(curve.steps) // 10, 1)
    return [
        name,
        f"{found.law.a:.2f}",
        ceiling_of(found.law),
        ceiling_of(found.whole),
        f"{found.law.ceiling - found.whole.ceiling:+.3f}",
        f"{found.later_rmse:.3f}",
        f"{statistics.mean(curve.reward[-tenth:]):.3f}",
        f"{statistics.mean(map(found.law.reward_at, curve.entropy[-tenth:])):.3f}",
        found.objection or "applies",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--entropy", default="entropy")
    parser.add_argument("--reward", default="reward")
    options = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for folder in options.runs:
        print("| " + " | ".join(row_of(folder, options.share, options.entropy, options.reward)) + " |")


if __name__ == "__main__":
    main()
