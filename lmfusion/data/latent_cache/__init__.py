"""Latent caches: images encoded once, before training."""
