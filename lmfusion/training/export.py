"""Exports a checkpoint as a model: the base LLM with the averaged weights, in one process on the CPU."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lmfusion.model.records import TrainingRecord
from lmfusion.training.build import build_model
from lmfusion.training.checkpoint import load_checkpoint, ranges, restore
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World, parallelize
from lmfusion.training.run_identity import is_text_the_bases


def save_model(config: RunConfig, checkpoint: Path, out: Path) -> None:
    """Write the model of a run, with the averaged weights of `checkpoint` (or its weights, without EMA), into `out`.

    The record of its training is saved with it. Nothing is gathered from the ranks or put on the device, and one copy
    of the model is in memory. The text tower is left out if it certainly equals the base LLM's. Raises ValueError for a
    damaged checkpoint or one of another model, and what `LMFusion.save_pretrained` and `from_llm` raise.
    """
    model = build_model(config)
    parallelize(model, World(0, 1, torch.device("cpu")), getattr(torch, config.train.dtype))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    part = "ema" if config.train.ema_decay else "weights"
    parts, state = load_checkpoint(checkpoint, ranges({part: weights}))
    restore(weights, parts[part])
    model.trained = _record(config, state)
    # A run can start from a complete model without its base LLM; then the new model must be complete too
    can_be_part = is_text_the_bases(model) and model.base is not None and model.base.is_available
    model.eval().save_pretrained(out, parts="image" if can_be_part else "all")


def _record(config: RunConfig, state: dict[str, Any]) -> TrainingRecord:
    """The public record of a run whose checkpoint holds `state`. Of paths it holds only the last part."""
    sources = [
        f"{source.kind} {Path(source.path).name if source.path else source.split}, weight {source.weight:g}"
        for source in config.data.sources
    ]
    names = [f.name for f in fields(TrainingRecord) if hasattr(config.train, f.name) and f.name != "num_steps"]
    settings = {name: getattr(config.train, name) for name in names}
    return TrainingRecord(
        num_steps=state["step"], num_samples=state["progress"]["num_samples"], sources=sources, **settings
    )
