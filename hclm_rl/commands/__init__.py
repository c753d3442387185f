"""`hclm-rl`: the command line, the job behind it, what is said before it."""
