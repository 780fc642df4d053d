"""Runs of a tiny autoencoder, and what they wrote."""

import json
from pathlib import Path

import torch

from lmfusion.training import checkpoint
from lmfusion.training.metrics import TIMINGS


def values_of_a_run(output, **overrides):
    """A recipe of 12 steps on the digits with a checkpoint every 4, changed by `section__key=value`."""
    values = {
        "output": str(output),
        "autoencoder": {
            "channels": 1,
            "image_size": 8,
            "latent_channels": 4,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        "data": {
            "sources": [{"kind": "digits", "split": "test"}]
        },  # the smaller split, since the scale of its latents is measured at the end
        "train": {"num_steps": 12, "batch_size": 8, "warmup_steps": 2, "learning_rate": 3e-3, "log_every": 1},
        "validation": {"sources": [{"kind": "digits"}], "every": 6, "num_samples": 16},
        "checkpoint": {"every": 4},
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return values


def read_metrics(output):
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def assert_same_run(one, other, step=12):
    """To the bit: every number of the metrics, and every tensor of the last checkpoint."""
    assert read_metrics(one) == read_metrics(other)
    parts = [checkpoint.load_checkpoint(Path(run) / "checkpoints" / f"step-{step:08d}")[0] for run in (one, other)]
    assert parts[0].keys() == parts[1].keys()
    for part, tensors in parts[0].items():
        assert tensors.keys() == parts[1][part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts[1][part][name]), f"{part}/{name}"
