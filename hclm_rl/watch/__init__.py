"""What looks at a run; imports nothing of the rest."""
