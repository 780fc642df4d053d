"""Runs an ablation: one variant after the other. Finished variants are kept, and the report grows with each."""

import dataclasses
import gc
import json
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmfusion.evaluation.identity import commit, versions
from lmfusion.experiments.ablation.claims import check_claim
from lmfusion.experiments.ablation.config import AblationConfig
from lmfusion.experiments.ablation.curves import read_curve
from lmfusion.experiments.ablation.measure import MeasuredTrainer, Measurer
from lmfusion.experiments.ablation.plot import check_plot, draw_plot
from lmfusion.experiments.ablation.report import markdown
from lmfusion.training.config import RunConfig
from lmfusion.utils.config_values import to_values
from lmfusion.utils.files import locked, replace_text
from lmfusion.utils.yaml_files import read_yaml

RESULT = "result.json"
"""File in the folder of a finished variant."""
MEASURE = "measure.json"
"""File in the folder of the ablation that says what is measured."""
MAY_CHANGE = (
    "output",
    "checkpoint",
    "data.num_workers",
    "data.cache_megabytes",
    "train.tensorboard",
    "train.wandb",
    "model.codec.sha256",  # set when the codec is loaded
)
"""Keys and sections of a recipe that no number depends on."""
PACKAGES = ("lmfusion", "torch", "transformers", "diffusers", "numpy")


def run_ablation(config: AblationConfig) -> dict[str, Any] | None:
    """Train and measure every variant that is not finished yet, and write ablation.json, .md, .svg and .png.

    Returns the content of ablation.json, or None if SIGTERM or SIGINT stopped a variant; the same call continues it.
    The files are written again before each variant, so that they always show the finished ones.

    Raises ValueError if a package, text or task is missing, for a recipe that has changed since variants were trained,
    and what a training run raises.
    """
    check_plot()
    measurer = Measurer(config.measure)
    runs = config.runs()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _check_measure(folder, measurer)
        for name, run in runs.items():
            check_unchanged(name, run)
        variants = {name: result for name, run in runs.items() if (result := _finished(run)) is not None}
        for name, run in runs.items():
            if name in variants:
                continue
            if variants:
                _write_report(config, variants)
            print(f"== {name}", flush=True)
            result = _train(run, measurer)
            if result is None:
                return None
            variants[name] = result
        return _write_report(config, variants)


def _train(run: RunConfig, measurer: Measurer) -> dict[str, Any] | None:
    """Train or continue one variant, and write its result. Returns None if a signal stopped it."""
    start, folder = time.perf_counter(), Path(run.output)
    trainer = MeasuredTrainer(run, measurer)
    first_step = trainer.step
    num_trained = sum(weight.numel() for weight in trainer.weights.values())
    print(f"{num_trained / 1e6:.2f} M trained parameters on {trainer.model.device}", flush=True)
    if not trainer.run():
        return None
    del trainer
    gc.collect()  # frees the model at once, because the next variant needs the memory
    curve = read_curve(run)
    result = {
        "config": to_values(run),
        "trained_parameters": num_trained,
        "start": curve[0],
        "final": curve[-1],
        "curve": curve,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "wall_seconds_are_since_step": first_step,
        "machine": {"processor": _processor(), "num_threads": torch.get_num_threads()},
        "commit": commit(),
        "versions": versions(PACKAGES),
    }
    replace_text(folder / RESULT, json.dumps(result, indent=2) + "\n")
    _delete_checkpoints(folder)
    return result


def _finished(run: RunConfig) -> dict[str, Any] | None:
    """The result of a variant, or None if it is not finished."""
    path = Path(run.output) / RESULT
    if not path.is_file():
        return None
    _delete_checkpoints(path.parent)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be valid JSON, got {error}; delete {path.parent} to train this variant again"
        ) from error


def _delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished run. Each is as large as three models, and the model itself is saved."""
    if (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")


def _write_report(config: AblationConfig, variants: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(config.output)
    variants = {name: variants[name] for name in config.variants if name in variants}
    final = {name: variant["final"] for name, variant in variants.items()}
    start = {name: variant["start"] for name, variant in variants.items()}
    findings = [check_claim(claim, final, start) for claim in config.claims]
    summary = {
        "title": config.title,
        "recipe": to_values(config),
        "variants": variants,
        "claims": [dataclasses.asdict(finding) for finding in findings],
    }
    draw_plot({name: variant["curve"] for name, variant in variants.items()}, config.title, folder)
    replace_text(folder / "ablation.md", markdown(config.title, variants, findings))
    replace_text(folder / "ablation.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _check_measure(folder: Path, measurer: Measurer) -> None:
    """Raise ValueError if variants have been measured on other data or settings."""
    path, identity = folder / MEASURE, measurer.identity()
    if not path.is_file():
        replace_text(path, json.dumps(identity, indent=2) + "\n")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    _raise_changes("measure", saved, identity, folder)


def check_unchanged(name: str, run: RunConfig) -> None:
    """Raise ValueError if a variant was started with other settings."""
    path = Path(run.output) / "config.yaml"  # every run writes it when it starts
    if path.is_file():
        saved = read_yaml(path.read_text(encoding="utf-8"))
        _raise_changes(f"variants.{name}", saved, to_values(run), path.parent)


def _raise_changes(section: str, saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = _flat(saved), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed = [key for key in changed if not any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)]
    if changed:
        changes = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(
            f"{section} must be as when {folder} was started, got changes: {changes}. Change it back, set output to "
            f"another folder, or delete {folder}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _processor() -> str:
    """The name of the processor as Linux gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
