"""Trains every method of the library on a task over several seeds: see leaderboard/run.py, or `--help`."""

from many_runs import as_script


def main() -> int | None:
    from leaderboard.run import main  # the folder beside this file; imports torch

    return main()


if __name__ == "__main__":
    as_script(main)
