"""Synthetic and bundled data sets, each with a renderer and a reader that checks generated images."""
