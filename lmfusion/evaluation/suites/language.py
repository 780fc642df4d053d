"""The suite `language`: tasks of lm-evaluation-harness for a model and its base LLM.

The harness is https://github.com/EleutherAI/lm-evaluation-harness. The base LLM is read again from where the model was
made from, and runs through the same code, so differences come from the weights. The suite also compares every text
tensor and some logits with those of the base. See docs/evaluation.md.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmfusion.conversion import open_base
from lmfusion.evaluation.results import Score, SuiteResult, Table
from lmfusion.evaluation.scoring import BATCH_TOKENS
from lmfusion.utils.config_values import check_least, to_values
from lmfusion.utils.packages import require

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


@dataclass
class LanguageConfig:
    """Which tasks, and whether to compare with the base. Raises ValueError for no tasks and bad numbers."""

    tasks: list[str] = field(default_factory=lambda: ["everyday"])
    """Names of lm-evaluation-harness's tasks, YAML files of tasks, or "everyday", which comes with lmfusion."""
    data: dict[str, str] = field(default_factory=dict)
    """Path of the data of a task: a folder as on the hub, or a json, jsonl, csv or parquet file. Other data come from
    where the task says, which is mostly the hub."""
    include_path: str | None = None
    """A folder with YAML files of tasks. They replace lm-evaluation-harness's tasks of the same names."""
    num_fewshot: int | None = None
    """Examples before each question; None: as the task says, which is mostly none."""
    limit: int | None = None
    """Number of questions per task, the first ones; None: all."""
    batch_tokens: int = BATCH_TOKENS
    """Tokens of a forward pass; changes speed and memory only."""
    compare_with_base: bool = True
    """Run the same tasks for the base LLM."""
    verify: bool = True
    """Compare the sha256 of each text tensor, and the logits of some prompts, with the base LLM's."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"language.tasks must name at least one task, and each once, got {self.tasks}")
        check_least(self, "language", num_fewshot=0, limit=1, batch_tokens=1)
        unknown = sorted(set(self.data) - set(self.tasks))
        if unknown:
            raise ValueError(f"keys of language.data must be in language.tasks {self.tasks}, got {unknown[0]!r}")


@dataclass(frozen=True)
class LanguageSuite:
    """Language tasks, for a model and for its base LLM."""

    config_type: ClassVar[type] = LanguageConfig
    config: LanguageConfig

    def check(self) -> None:
        """Read the tasks and their data. Raises ValueError, with the way out, if something is missing."""
        require("lm_eval", "the suite language", "lm-eval")

        from lmfusion.evaluation.suites.lm_harness import load_tasks

        load_tasks(self.config.tasks, self.config.data, self.config.include_path)

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Run all tasks for `model` and its base LLM. Nothing is written into `folder`.

        Raises ValueError for a model without a base LLM if the configuration compares with it, and what
        `lmfusion.conversion.open_base` raises if the base is missing.
        """
        config = self.config
        if model.base is None and (config.compare_with_base or config.verify):
            raise ValueError(
                "the model must have a base LLM to compare with, but was made without one; set "
                "language.compare_with_base and language.verify to false"
            )
        if model.base is not None and (config.compare_with_base or config.verify):
            open_base(model.base.name)  # raises for a missing base before any task runs

        from lmfusion.evaluation.suites.lm_harness import LMFusionLM, load_tasks, run_tasks

        tasks = load_tasks(config.tasks, config.data, config.include_path)
        adapted = run_tasks(LMFusionLM(model, config.batch_tokens), tasks, config.num_fewshot, config.limit)
        scores = _scores(adapted)
        columns: tuple[str, ...] = ("task and metric", "adapted", "95 % interval", "questions")
        rows = [(score.name, f"{score.value:.4f}", _interval(score), str(score.count)) for score in scores]
        table = Table("Language", columns, tuple(rows))
        if config.compare_with_base:
            base = LMFusionLM(base_model(model), config.batch_tokens)
            base_results = run_tasks(base, tasks, config.num_fewshot, config.limit)
            del base  # frees its weights
            of_base, differences = _scores(base_results), _differences(base_results, adapted)
            table = _compared(scores, of_base, differences)
            scores += [Score(f"{score.name}, base LLM", *_numbers(score), score.details) for score in of_base]
            scores += differences
        tables = [table]
        if config.verify:
            comparison, comparison_table = _compare_tensors(model)
            scores += comparison
            tables.append(comparison_table)
        return SuiteResult("language", tuple(scores), to_values(config), tables=tuple(tables))


def base_model(model: "LMFusion") -> "LMFusion":
    """The base LLM of `model`, read again from its folder, in the same dtypes and on the same device.

    It is an `LMFusion` with the smallest possible image tower, so that its text runs through the same code. Raises
    ValueError for a model without a base, and what `LMFusion.from_llm` raises if the base is missing.
    """
    from lmfusion.model.modeling import LMFusion

    if model.base is None:
        raise ValueError("the model must have a base LLM to compare with, but was made without one")
    make = LMFusion.from_llm if model.vision is None else LMFusion.from_vlm
    base = make(
        model.base.name,
        image={"separation": "none", "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "image_size": 8},
        dtype=model.base.torch_dtype,
    )
    weight = model.text.norm.weight
    base.to(weight.device, weight.dtype)  # type: ignore[arg-type]
    base.compute_dtype = model.compute_dtype
    base.tokenizer = model.tokenizer
    return base


def _scores(results: Mapping[str, Any]) -> list[Score]:
    """A score for each metric of each task."""
    return [score for score, _ in _measured(results)]


def _measured(results: Mapping[str, Any]) -> list[tuple[Score, np.ndarray | None]]:
    """A score for each metric of each task, with the values whose mean it is; None if it is not a mean."""
    from lmfusion.evaluation.metrics.bootstrap import bootstrap

    found = []
    for task, metrics in results["results"].items():
        details = {
            "task version": results.get("versions", {}).get(task),
            "few-shot examples": results.get("n-shot", {}).get(task),
            "data": _data_of(results, task),
            "lm-eval": importlib.metadata.version("lm-eval"),
        }
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            # A task with several filters for its answers has every question once per filter
            samples = [s for s in results.get("samples", {}).get(task, []) if s["filter"] == filter_name]
            values = _values_of(samples, metric, float(value))
            low, high = bootstrap(values) if values is not None and len(values) > 1 else (None, None)
            name = f"{task} {metric}" + ("" if filter_name == "none" else f" ({filter_name})")
            found.append((Score(name, float(value), low, high, len(samples), details), values))
    return found


def _values_of(samples: Sequence[Mapping[str, Any]], metric: str, mean: float) -> np.ndarray | None:
    """The metric of each sample if the score is their mean, else None."""
    values = [sample.get(metric) for sample in samples]
    if not values or not all(isinstance(value, (bool, int, float)) for value in values):
        return None
    array = np.asarray(values, np.float64)
    return array if abs(array.mean() - mean) < 1e-9 else None


def _differences(base: Mapping[str, Any], adapted: Mapping[str, Any]) -> list[Score]:
    """Adapted minus base of each score, with a paired bootstrap: both answered the same questions."""
    from lmfusion.evaluation.metrics.bootstrap import bootstrap

    found = []
    for (ours, values), (theirs, of_base) in zip(_measured(adapted), _measured(base), strict=True):
        low, high = (None, None) if values is None or of_base is None else bootstrap(values - of_base)
        name = f"{ours.name}, adapted minus base"
        found.append(Score(name, ours.value - theirs.value, low, high, ours.count, ours.details))
    return found


def _compared(adapted: Sequence[Score], base: Sequence[Score], differences: Sequence[Score]) -> Table:
    columns = ("task and metric", "base LLM", "adapted", "difference", "95 % interval of adapted", "questions")
    rows = [
        (ours.name, f"{theirs.value:.4f}", f"{ours.value:.4f}", f"{difference.value:+.4f}", _interval(ours),
         str(ours.count))
        for ours, theirs, difference in zip(adapted, base, differences, strict=True)
    ]  # fmt: skip
    return Table("Language", columns, tuple(rows))


def _compare_tensors(model: "LMFusion") -> tuple[list[Score], Table]:
    """Whether tensors and logits are those of the base LLM, as scores and a table."""
    from lmfusion.model.verification import verify

    verification = verify(model)
    num_same = verification.num_tensors - len(verification.changed)
    num_identical = sum(check.identical for check in verification.prompts)
    base = {"base LLM": verification.base}
    scores = [
        Score("share of tensors with the base's sha256", num_same / verification.num_tensors,
              count=verification.num_tensors, details=base),
        Score("share of prompts with the base's logits, bit for bit", num_identical / len(verification.prompts),
              count=len(verification.prompts), details=base),
    ]  # fmt: skip
    rows = [("tensors with the base's sha256", f"{num_same} of {verification.num_tensors}", "")]
    rows += [
        (
            f"logits of {check.prompt.splitlines()[0]!r}, {check.num_tokens} tokens",
            "identical" if check.identical else "CHANGED",
            f"{check.max_difference:.2g} from transformers' implementation; rounding allows {check.tolerance:.2g}",
        )
        for check in verification.prompts
    ]
    return scores, Table("Is the text tower unchanged?", ("check", "result", "detail"), tuple(rows))


def _data_of(results: Mapping[str, Any], task: str) -> str | None:
    config = results.get("configs", {}).get(task, {})
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    return str(config.get("dataset_path")) if files is None else f"{config.get('dataset_path')}: {files}"


def _numbers(score: Score) -> tuple[float, float | None, float | None, int]:
    return score.value, score.low, score.high, score.count


def _interval(score: Score) -> str:
    return "" if score.low is None else f"{score.low:.4f} to {score.high:.4f}"
