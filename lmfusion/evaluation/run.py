"""How does an evaluation run? Checks first, then one suite after the other, each kept as soon as it is finished.

<output>/eval.json is written whole after every suite, and index.html from it. A suite whose settings, model and version
of lmfusion are those of the file is not run again, so that a killed run goes on with what is left.
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

RESULTS, PAGE = "eval.json", "index.html"
SCHEMA = 1
"""Of eval.json; another number is another layout."""
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "lm-eval", "torchmetrics", "efficientnet-lite-pytorch")


def run_evaluation(
    config: EvalConfig, command: str = "", log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run the suites of `config` that are not finished yet; answer with what eval.json holds.

    command: what to type for the same, for the page. say: is told what happens.

    Raises ValueError or OSError for what is missing before anything slow runs, and what suites raise; those that are
    finished by then are kept.
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
        # Scores of another model or other settings must not stand beside those of this run, even for a while
        finished = {name: s for name, s in _finished(folder / RESULTS).items() if s["key"] == keys.get(name)}
        results: dict[str, Any] = {}
        for name, suite in suites.items():
            if name in finished:
                log(f"{name}: finished already, in {folder / RESULTS}")
                results[name] = finished[name]
            else:
                log(f"{name}: running")
                made = {key: head[key] for key in ("commit", "device", "date")}
                results[name] = {"key": keys[name], "made": made, **_run(suite, model, folder / name).to_json()}
                log(f"{name}: {results[name]['seconds']:.0f} s")
            waiting = {other: finished[other] for other in config.suites if other in finished and other not in results}
            values = {**head, "suites": {**results, **waiting}}
            _write(folder, values)
    return values


def _check_output(folder: Path) -> None:
    """Raise ValueError, before a model is loaded, where `folder` is a file or cannot be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "cannot be written to" if nearest.is_dir() else "is a file"
        raise ValueError(f"output is {folder}, but {nearest} {what}; set output elsewhere")


def _run(suite: Suite, model: LMFusion, folder: Path) -> SuiteResult:
    start = time.perf_counter()
    result = suite.run(model, folder)
    return replace(result, seconds=time.perf_counter() - start)


def _load(config: EvalConfig, device: torch.device) -> LMFusion:
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    if not current_folder(full_path(config.model)).is_dir():
        raise ValueError(
            f"model is {config.model}, and there is no such folder; train one, or give the folder of one (model=PATH)"
        )
    model = LMFusion.from_pretrained(config.model, base=config.base, dtype=dtype, codec_path=config.codec_path)
    return model.to(device).eval()  # type: ignore[arg-type]


def _head(config: EvalConfig, model: LMFusion, digest: str, command: str) -> dict[str, Any]:
    """What stands with every score: which model, which settings, where and with what."""
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
    """The suites that `file` holds and whose pictures are there; none if it is damaged or of another layout."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            return {}
        found = {}
        for name, suite in values["suites"].items():
            pictures = SuiteResult.from_json(suite).pictures
            if (
                suite["key"]
                and suite["made"]
                and all((file.parent / name / picture.file).is_file() for picture in pictures)
            ):
                found[name] = suite
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(folder: Path, values: dict[str, Any]) -> None:
    replace_text(folder / RESULTS, json.dumps(values, indent=1) + "\n")
    results = [SuiteResult.from_json(suite) for suite in values["suites"].values()]
    replace_text(folder / PAGE, render_report(values, results, folder))
