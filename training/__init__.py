"""From text to a run directory: tokens, rows, the one training loop."""
