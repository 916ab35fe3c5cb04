"""What everything else stands on: errors, files, checkpoints, locks, and processes that work together."""
