"""Evaluation suites, one file each: a configuration, a check, and a run."""
