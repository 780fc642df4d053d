"""In which order does all of it happen? One variant after the other; what is done stays done, and the report grows."""

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
from lmfusion.experiments.ablation.claims import judge
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
"""In the folder of a finished variant."""
MEASURE = "measure.json"
"""In the folder of the ablation: what is measured."""
MAY_CHANGE = (
    "output",
    "checkpoint",
    "data.num_workers",
    "data.cache_megabytes",
    "train.tensorboard",
    "train.wandb",
    "model.codec.sha256",  # filled in when the codec is loaded
)
"""Keys, or sections of keys, that no number depends on."""
PACKAGES = ("lmfusion", "torch", "transformers", "diffusers", "numpy")


def run_ablation(config: AblationConfig) -> dict[str, Any] | None:
    """Train and measure every variant that is not finished yet, and write ablation.json, .md, .svg and .png.

    Answers with what ablation.json holds; None where SIGTERM or SIGINT stopped a variant, which the same call goes on
    with. The files are written anew before each variant, so that they show what there is so far.

    Raises ValueError where a package, text or task is missing, for a recipe that has changed since variants were
    trained, and what a training run raises.
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
    """Train one variant, or go on with it, and write its result; None where a signal stopped it."""
    start, folder = time.perf_counter(), Path(run.output)
    trainer = MeasuredTrainer(run, measurer)
    first_step = trainer.step
    num_trained = sum(weight.numel() for weight in trainer.weights.values())
    print(f"{num_trained / 1e6:.2f} M trained parameters on {trainer.model.device}", flush=True)
    if not trainer.run():
        return None
    del trainer
    gc.collect()  # the next variant needs the memory
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
    _drop_checkpoints(folder)
    return result


def _finished(run: RunConfig) -> dict[str, Any] | None:
    """The result of a variant that is finished."""
    path = Path(run.output) / RESULT
    if not path.is_file():
        return None
    _drop_checkpoints(path.parent)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete {path.parent} to train this variant anew") from error


def _drop_checkpoints(folder: Path) -> None:
    """They are as large as three models each, and the model of a finished run is exported."""
    if (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")


def _write_report(config: AblationConfig, variants: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(config.output)
    variants = {name: variants[name] for name in config.variants if name in variants}
    final = {name: variant["final"] for name, variant in variants.items()}
    start = {name: variant["start"] for name, variant in variants.items()}
    findings = [judge(ordering, final, start) for ordering in config.orderings]
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
    """Raises ValueError where variants have been measured on other things."""
    path, identity = folder / MEASURE, measurer.identity()
    if not path.is_file():
        replace_text(path, json.dumps(identity, indent=2) + "\n")
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    _raise_changes("measure", saved, identity, folder)


def check_unchanged(name: str, run: RunConfig) -> None:
    """Raises ValueError where a variant was begun with other settings."""
    path = Path(run.output) / "config.yaml"  # which a run writes as it begins
    if path.is_file():
        saved = read_yaml(path.read_text(encoding="utf-8"))
        _raise_changes(f"variants.{name}", saved, to_values(run), path.parent)


def _raise_changes(what: str, saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = _flat(saved), _flat(now)
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed = [key for key in changed if not any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)]
    if changed:
        was = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueError(
            f"{what} has changed since {folder} was begun: {was}. Change it back, set output to another folder, or "
            f"delete {folder}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _processor() -> str:
    """Its name as Linux gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
