"""Runs an evaluation: checks first, then one suite after the other. Each result is saved as soon as it is there.

<output>/eval.json is replaced as a whole after every suite, and index.html with it. A suite is not run again if the
file already has its result for the same settings, model and version of lmfusion, so a killed run continues with the
rest.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lmfusion import __version__
from lmfusion.evaluation.config import EvalConfig
from lmfusion.evaluation.identity import commit, model_digest, values_digest, versions
from lmfusion.evaluation.report import render_report
from lmfusion.evaluation.results import SuiteResult
from lmfusion.evaluation.suites import Suite, load_suite
from lmfusion.model.modeling import LMFusion
from lmfusion.utils.config_values import to_values
from lmfusion.utils.devices import choose_device, device_name
from lmfusion.utils.files import full_path, locked, replace_text
from lmfusion.utils.folders import current_folder
from lmfusion.utils.json_files import parse_json_object

RESULTS, PAGE = "eval.json", "index.html"
SCHEMA = 1
"""Version of the layout of eval.json."""
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "lm-eval", "torchmetrics", "efficientnet-lite-pytorch")


def run_evaluation(
    config: EvalConfig, command: str = "", log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run the suites of `config` that are not finished yet, and return the content of eval.json.

    command: the shell command shown in the report. log: called with progress messages.

    Raises ValueError or OSError for missing data, weights or packages, before anything slow runs, and what suites
    raise. Results of suites that finished before an error are kept.
    """
    device = choose_device(config.device, "device")
    folder = Path(config.output)
    _check_output(folder)
    suites = {name: load_suite(name)(settings) for name, settings in config.suites.items()}
    for suite in suites.values():
        suite.check()
    model = _load(config, device)
    folder.mkdir(parents=True, exist_ok=True)
    digest = model_digest(model)
    head = _head(config, model, digest, command)
    keys = {name: values_digest([to_values(s), digest, __version__]) for name, s in config.suites.items()}
    with locked(folder):
        # Drop scores of another model or other settings at once: the file must not mix them with this run's scores,
        # not even until their suites have run again
        finished = {name: s for name, s in _finished(folder / RESULTS).items() if s["key"] == keys.get(name)}
        results: dict[str, Any] = {}
        for name, suite in suites.items():
            if name in finished:
                log(f"{name}: already in {folder / RESULTS}")
                results[name] = finished[name]
            else:
                log(f"{name}: running")
                made = {key: head[key] for key in ("commit", "device", "date")}
                results[name] = {"key": keys[name], "made": made, **_run(suite, model, folder / name).to_json()}
                log(f"{name}: {results[name]['seconds']:.0f} s")
            later = {other: finished[other] for other in config.suites if other in finished and other not in results}
            values = {**head, "suites": {**results, **later}}
            _write(folder, values)
    return values


def _check_output(folder: Path) -> None:
    """Raise ValueError, before a model is loaded, if `folder` is a file or cannot be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written to" if nearest.is_dir() else "is a file"
        raise ValueError(f"output must be a folder that can be written, got {folder}: {nearest} {reason}")


def _run(suite: Suite, model: LMFusion, folder: Path) -> SuiteResult:
    start = time.perf_counter()
    result = suite.run(model, folder)
    return replace(result, seconds=time.perf_counter() - start)


def _load(config: EvalConfig, device: torch.device) -> LMFusion:
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    if not current_folder(full_path(config.model)).is_dir():
        raise ValueError(
            f"model must be the folder of a trained model, got {config.model}, which does not exist; train one, "
            "or give its path (model=PATH)"
        )
    model = LMFusion.from_pretrained(config.model, base=config.base, dtype=dtype, codec_path=config.codec_path)
    return model.to(device).eval()  # type: ignore[arg-type]


def _head(config: EvalConfig, model: LMFusion, digest: str, command: str) -> dict[str, Any]:
    """What identifies the scores: the model, the settings, the device and the versions of packages."""
    base = model.base
    return {
        "schema": SCHEMA,
        "lmfusion": __version__,
        "commit": commit(),
        "command": command,
        "config": to_values(config),
        "config_sha256": values_digest(to_values(config)),
        "model": {
            "path": str(config.model),
            "sha256": digest,
            "base": None if base is None else {"name": base.name, "sha256": base.digest, "dtype": base.dtype},
            "text_parameters": sum(p.numel() for p in model.text.parameters()),
            "image_parameters": sum(p.numel() for p in model.image.parameters()),
            "dtype": str(model.text.norm.weight.dtype).removeprefix("torch."),
        },
        "device": device_name(model.device),
        "versions": versions(PACKAGES),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _finished(file: Path) -> dict[str, dict[str, Any]]:
    """The suites in `file` whose images exist. None if the file is missing, damaged or of another SCHEMA."""
    try:
        values = parse_json_object(file.read_bytes())
        if values["schema"] != SCHEMA:
            return {}
        found = {}
        for name, suite in values["suites"].items():
            files = [file.parent / name / picture.file for picture in SuiteResult.from_json(suite).pictures]
            if suite["key"] and suite["made"] and all(path.is_file() for path in files):
                found[name] = suite
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(folder: Path, values: dict[str, Any]) -> None:
    replace_text(folder / RESULTS, json.dumps(values, indent=1) + "\n")
    results = [SuiteResult.from_json(suite) for suite in values["suites"].values()]
    replace_text(folder / PAGE, render_report(values, results, folder))
