"""The training loop: the one Trainer, what it calls back, and how it evaluates."""
