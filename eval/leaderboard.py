"""Trains every method of the library on a task over several seeds: see leaderboard/run.py, or `--help`."""

import os
import signal
import sys

if __name__ == "__main__":
    # before the workers start: they inherit them, and read them when they import torch
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are stopped
    from leaderboard.run import main  # the folder beside this file

    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
