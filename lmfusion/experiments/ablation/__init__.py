"""Ablations: variants of one training run, trained and measured in the same way, and compared."""
