"""What terms read in responses."""
