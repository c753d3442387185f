"""`python eval/run.py MODEL --base BASE --task TASK`: the same as `hclm-rl eval`, for a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hclm_rl.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
