"""Reads the curve of a variant from its run folder: losses, tokens and seconds at each measured step."""

import json
from pathlib import Path
from typing import Any

from lmfusion.experiments.ablation.measure import MEASURED
from lmfusion.training.config import RunConfig

Line = dict[str, Any]


def read_curve(run: RunConfig) -> list[Line]:
    """A line for each measured step of a run, from 0 on: step, tokens, seconds, and the metrics.

    tokens: text and image tokens trained on so far. seconds: of training steps, without measurements, checkpoints and
    the time before the first step.
    """
    folder = Path(run.output)
    measured = {line["step"]: line for line in _lines(folder / MEASURED)}
    validated = {line["step"]: line for line in _lines(folder / "validation.jsonl")}
    totals = _totals(_lines(folder / "metrics.jsonl"), run.train.batch_tokens)
    curve = []
    for step in sorted(measured.keys() | validated.keys()):
        tokens, seconds = totals[step]
        line: Line = {"step": step, "tokens": tokens, "seconds": round(seconds, 2)}
        if step in validated:
            losses = validated[step]
            line |= {"diffusion_loss": losses["diffusion_loss"], "caption_loss": losses["lm_loss"]}
        line |= {name: value for name, value in measured.get(step, {}).items() if name != "step"}
        curve.append(line)
    return curve


def _totals(metrics: list[Line], batch_tokens: int) -> dict[int, tuple[int, float]]:
    """Tokens and seconds up to each step that has a line in metrics.jsonl."""
    step, tokens, seconds = 0, 0, 0.0
    totals = {0: (0, 0.0)}
    for line in metrics:
        num_tokens = round(line["packing"] * batch_tokens * (line["step"] - step))
        step, tokens, seconds = line["step"], tokens + num_tokens, seconds + num_tokens / line["tokens_per_second"]
        totals[step] = (tokens, seconds)
    return totals


def _lines(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
