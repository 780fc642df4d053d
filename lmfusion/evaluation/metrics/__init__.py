"""Metrics of images and captions, and their confidence intervals."""
