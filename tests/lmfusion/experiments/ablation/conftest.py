"""An ablation on a tiny random LLM, in a few steps."""

import copy

import pytest

VALUES = {
    "title": "Tiny ablation",
    "base": {
        "model": {
            "image": {"patch_coder": {"kind": "linear", "patch_size": 4}},
            "codec": {"kind": "pixels", "channels": 3, "image_size": 16},
            "diffusion": {"prediction_type": "v_prediction"},
        },
        "data": {"sources": [{"kind": "shapes"}], "seq_len": 128, "pack_window": 32},
        "train": {
            "num_steps": 4,
            "batch_tokens": 128,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "ema_decay": 0,
            "log_every": 1,
            "device": "cpu",
        },
        "validation": {"sources": [{"kind": "shapes", "split": "test"}], "num_samples": 4},
        "checkpoint": {"every": 1},
    },
    "variants": {
        "none-0": {"model.image.separation": "none"},
        "deep-0": {"model.image.separation": "deep"},
        "none-1": {"model.image.separation": "none", "train.text_learning_rate_ratio": 1},
    },
    "measure": {"every": 2, "task": None, "images": {"num_images": 2, "num_steps": 2}},
    "claims": [
        {"claim": "frozen text stays", "metric": "text_loss", "keeps": ["none-0", "deep-0"]},
        {"claim": "a trained LLM moves", "metric": "text_loss", "keeps": ["none-1"]},
        {"claim": "deeper is better", "metric": "diffusion_loss", "order": ["deep-0", "none-0"]},
    ],
}


@pytest.fixture
def values(tiny_llama, tmp_path):
    """Keys of a recipe, to be changed."""
    changed = copy.deepcopy(VALUES)
    changed["output"] = str(tmp_path / "ablation")
    changed["base"]["model"]["base"] = str(tiny_llama)
    changed["measure"]["texts"] = str(tmp_path / "texts.txt")
    (tmp_path / "texts.txt").write_text("The cat sat on the mat.\n\nIt rains today.\n")
    return changed
