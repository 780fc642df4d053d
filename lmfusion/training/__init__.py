"""Training: configuration, the loop, checkpoints and metrics."""
