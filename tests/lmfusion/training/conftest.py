"""Runs that the tests of training start from."""

import pytest

from lmfusion.training.config import RunConfig
from lmfusion.training.trainer import Trainer
from lmfusion.utils.config_values import from_values


@pytest.fixture
def config(tiny_llama, tmp_path):
    """A run of 12 steps on the digits, with a checkpoint every 4."""

    def make(output="run", **overrides) -> RunConfig:
        values = {
            "output": str(tmp_path / output),
            "model": {
                "base": str(tiny_llama),
                "image": {"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 4}},
                "codec": {"kind": "pixels", "channels": 1, "image_size": 8},
                "diffusion": {"prediction_type": "v_prediction"},
            },
            "data": {"sources": [{"kind": "digits"}], "seq_len": 128},
            "train": {"num_steps": 12, "batch_tokens": 256, "warmup_steps": 2, "learning_rate": 1e-3, "log_every": 1},
            "checkpoint": {"every": 4},
        }
        for key, value in overrides.items():
            *parents, last = key.split("__")
            section = values
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return from_values(RunConfig, values)

    return make


@pytest.fixture
def unbroken(config):
    run = config("unbroken")
    assert Trainer(run).run()
    return run
