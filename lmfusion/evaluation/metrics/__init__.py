"""Metrics of images and captions, and confidence intervals."""
