"""Every method of the library on the same tasks against plain GRPO: eval/leaderboard.py runs it."""
