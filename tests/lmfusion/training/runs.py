"""Reads what a run wrote, and compares runs."""

import json
from pathlib import Path

import torch

from lmfusion.training import checkpoint
from lmfusion.training.metrics import TIMINGS


def read_metrics(run_config):
    lines = (Path(run_config.output) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def final_tensors(run_config, step=12):
    return checkpoint.load_checkpoint(Path(run_config.output) / "checkpoints" / f"step-{step:08d}")[0]


def set_format(path, number):
    """Make the checkpoint at `path` one of another format."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": number}))


def assert_same_run(one, other, step=12):
    assert read_metrics(one) == read_metrics(other)
    for part, tensors in final_tensors(one, step).items():
        for name, tensor in final_tensors(other, step)[part].items():
            assert torch.equal(tensors[name], tensor), f"{part}/{name}"
