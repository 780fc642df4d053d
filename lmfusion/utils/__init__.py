"""Helpers that know nothing of the model: files, configuration values, logs, devices."""
