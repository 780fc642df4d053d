"""Connects models to lm-evaluation-harness: its `LM` interface for a model's text tower, and its tasks.

This module imports lm_eval, an optional package: `lmfusion.evaluation.suites.language` imports it only when it runs.
"""

import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from lmfusion.evaluation.scoring import (
    BATCH_TOKENS,
    Window,
    max_length,
    prefix_token_id,
    rolling_windows,
    score_windows,
)
from lmfusion.generation.options import MAX_STOP_STRINGS
from lmfusion.generation.prompt import require_tokenizer
from lmfusion.text.chat_template import TODAY, render
from lmfusion.text.tokenization import control_tokens, token_ids

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

PACKAGED = Path(__file__).parents[1] / "tasks"
"""Tasks that come with lmfusion."""
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""The loader of `datasets` for a file, by suffix."""
_GENERATION_KEYS = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
}
"""Settings of transformers' `generate` that are not supported here, and the values with which they have no effect."""
_IGNORED = {"use_cache", "early_stopping", "length_penalty"}
"""Settings without effect as long as there are no beams."""
_TODAY = "2024-07-26"
"""The date for chat templates: the one that Llama 3's template uses if it gets none."""
_END_MARK = "\ue000\ue001"
"""Marks the end of the last message, which the model continues."""
_MAX_NEW_TOKENS = 256
"""Default of lm-evaluation-harness for tasks that give no number."""


class LMFusionLM(TemplateLM):
    """The text tower of a model as an `LM` of lm-evaluation-harness. The image tower has no part in any answer.

    Texts are tokenized as lm-evaluation-harness does it for models of transformers, so scores can be compared with its
    `hf` models. Raises ValueError for a model without a tokenizer.
    """

    def __init__(self, model: "LMFusion", batch_tokens: int = BATCH_TOKENS, batch_size: int = 8) -> None:
        """batch_tokens: tokens of a forward pass for likelihoods. batch_size: answers generated at a time."""
        super().__init__()
        self.model = model
        self.tokenizer = require_tokenizer(model)
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._prefix = prefix_token_id(model)
        self._bos = self.tokenizer.decode([self._prefix])

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return max_length(self.model)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. add_special_tokens: None adds bos if the tokenizer does so and the text does not begin with it."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._bos)
        [ids] = token_ids(self.tokenizer, [string], control_tokens=True, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the model's chat template, with the template variables saved with the model. `today` is
        _TODAY unless they set it, so that scores do not depend on the day."""
        variables = {TODAY: _TODAY, **self.model.config.template_variables}
        if add_generation_prompt:
            return render(self.tokenizer, chat_history, add_generation_prompt=True, template_variables=variables)
        *before, last = chat_history
        begun = [*before, {**last, "content": last["content"] + _END_MARK}]
        written = render(self.tokenizer, begun, add_generation_prompt=False, template_variables=variables)
        if _END_MARK not in written:
            raise ValueError(
                "the chat template must keep the last message as it is, so that the model can continue it, "
                "but it changes it"
            )
        return written[: written.rindex(_END_MARK)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        windows = [Window(context + continuation, len(continuation)) for _, context, continuation in requests]
        found = score_windows(self.model, windows, self._batch_tokens)
        answers = [(likelihood.log_prob, likelihood.is_greedy) for likelihood in found]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[Window] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            of_text = rolling_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length)
            windows += of_text
            owners += [i] * len(of_text)
        totals = [0.0] * len(requests)
        for i, likelihood in zip(owners, score_windows(self.model, windows, self._batch_tokens), strict=True):
            totals[i] += likelihood.log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        for members in groups.values():
            written = self._generate([requests[i].args[0] for i in members], requests[members[0]].args[1])
            for i, text in zip(members, written, strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """What the LLM generates after each context, up to the first of the texts in settings["until"]."""
        options, stops = self._options(settings)
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks of a task must be below the LLM's context of {self.max_length} tokens, got "
                f"{options['max_new_tokens']}; set it in the task's generation_kwargs"
            )
        prompts = [self._truncate(context, room) for context in contexts]
        written = self.model.generate(prompts, batch_size=self._batch_size, max_images=0, **options)
        texts = [answer.text for answer in written]
        return [min((text.split(stop)[0] for stop in stops), key=len, default=text) for text in texts]

    def _options(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Generation options and stop texts from a task's generation_kwargs, read as `lm_eval`'s own models do."""
        values = dict(normalize_gen_kwargs({k: v for k, v in settings.items() if v is not None}, _MAX_NEW_TOKENS))
        for name, value in values.items():
            if name in _GENERATION_KEYS or name in _IGNORED or value in _NEUTRAL_VALUES.get(name, ()):
                continue
            known = ", ".join(sorted(_GENERATION_KEYS))
            if name in _NEUTRAL_VALUES:
                raise ValueError(
                    f"{name} in generation_kwargs of a task must be {_NEUTRAL_VALUES[name][0]} or left out, "
                    f"got {value!r}, which is not supported"
                )
            raise ValueError(f"generation_kwargs of a task must have keys out of {known}, got {name!r}")
        until = values.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        # At most MAX_STOP_STRINGS go to the engine. Control tokens come first because they are not in the generated
        # text: the caller can search it for all others, but not for these
        control = set(control_tokens(self.tokenizer).values())
        stops.sort(key=lambda stop: stop not in control)
        temperature = float(values.get("temperature", 1.0))
        samples = bool(values["do_sample"]) and temperature > 0
        return {
            "max_new_tokens": int(values["max_gen_toks"]),
            "do_sample": samples,
            "temperature": temperature if samples else 0.0,
            "top_p": float(values.get("top_p", 1.0)) if samples else 1.0,
            "top_k": int(values.get("top_k", 0)) if samples else 0,
            "stop_strings": stops[:MAX_STOP_STRINGS],
        }, stops

    def _truncate(self, context: str, room: int) -> str:
        """The end of a context, of up to `room` tokens. An empty context becomes bos."""
        if not context:
            return self._bos
        ids = self.tok_encode(context)
        return context if len(ids) <= room else self.tokenizer.decode(ids[-room:])


def load_tasks(names: Sequence[str], data: Mapping[str, str], include_path: str | None) -> list[Task]:
    """Tasks of lm-evaluation-harness, with their data read.

    names: of its own tasks or ours, or YAML files of tasks, whose `data_files` are beside them. data: paths of data by
    name of the task: a folder as on the hub, or a json, jsonl, csv or parquet file of the split that is used.
    include_path: a folder of YAML files, which replace tasks of the same names.

    Raises ValueError, with the way out, for an unknown name, and for data that cannot be read.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"language.include_path must be an existing folder, got {include_path}")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        manager = TaskManager(
            include_path=[PACKAGED, *([include_path] if include_path else [])], include_defaults=False
        )
        return [task for name in names for task in _load(manager, name, data.get(name))]
    finally:
        logger.setLevel(level)


@functools.cache
def _all_tasks() -> TaskManager:
    """With all tasks of lm-evaluation-harness. It reads thousands of files, which takes seconds."""
    return TaskManager()


def _load(manager: TaskManager, name: str, data: str | None) -> list[Task]:
    if name.endswith((".yaml", ".yml")):
        path: Path | None = Path(name)
        if not Path(name).is_file():
            raise ValueError(f"language.tasks must name existing YAML files, got {name}")
    else:
        if name not in manager.task_index:
            manager = _all_tasks()
        if name not in manager.task_index:
            raise ValueError(
                f"language.tasks must name tasks that lm-evaluation-harness has, got {name!r}; `lm-eval ls tasks` "
                "lists them, and a YAML file is given by a path that ends in .yaml"
            )
        path = manager.task_index[name].yaml_path
    spec: str | dict[str, Any] = name
    if path is not None and isinstance((values := _read_task(path)).get("task"), str):
        spec = _with_data(values, path.parent, data, name)
    elif data is not None:
        raise ValueError(
            f"keys of language.data must be single tasks, got the group {name!r}; name its tasks one by one"
        )
    where = spec.get("dataset_path") if isinstance(spec, dict) else name
    try:
        return list(manager.load([spec])["tasks"].values())
    except Exception as error:  # `datasets` raises many types if data are missing
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"the data of task {name} must be readable, got {reason} for {where}. Without the hub, download them "
            f"elsewhere and give the folder or file in language.data, as {{{name}: PATH}}, or leave the task out of "
            "language.tasks"
        ) from error


def _read_task(path: Path) -> dict[str, Any]:
    try:
        return load_yaml(path, resolve_func=True)
    except Exception as error:  # `!function` in a file imports a module, which may raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"the task file {path} must be readable, got {reason}") from error


def _with_data(values: dict[str, Any], folder: Path, given: str | None, name: str) -> dict[str, Any]:
    """A task's settings with the path of its data: `given`, or files beside its YAML, or what the task says."""
    values = dict(values)
    if given is not None:
        if not Path(given).exists():
            raise ValueError(f"language.data.{name} must be an existing folder or file, got {given}")
        loader = LOADERS.get(Path(given).suffix)
        if Path(given).is_file() and loader is None:
            raise ValueError(f"language.data.{name} must be a folder or one of {', '.join(LOADERS)}, got {given}")
        split = values.get("test_split") or values.get("validation_split") or values.get("training_split")
        if loader is None:
            values["dataset_path"] = str(Path(given).resolve())
        else:
            # The file holds one split. The others are unset: they are needed for few-shot examples only
            values |= {"training_split": None, "validation_split": None, "test_split": split, "fewshot_split": None}
            values |= {"dataset_path": loader, "dataset_name": None}
            values["dataset_kwargs"] = {"data_files": {split: str(Path(given).resolve())}}
        return values
    options = dict(values.get("dataset_kwargs") or {})
    files = options.get("data_files")
    if isinstance(files, Mapping):
        options["data_files"] = {split: str(_beside(folder, file)) for split, file in files.items()}
    elif isinstance(files, str):
        options["data_files"] = str(_beside(folder, files))
    if options:
        values["dataset_kwargs"] = options
    return values


def _beside(folder: Path, file: str) -> Path:
    return (folder / file).resolve() if (folder / file).exists() else Path(file)


def run_tasks(lm: LMFusionLM, tasks: Sequence[Task], num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """Results of `tasks` as `lm_eval.simple_evaluate` returns them, with samples.

    Its seeds and its bootstrap are off: nothing here uses a global random generator, and intervals are our own.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        results = evaluator.simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            task_manager=TaskManager(include_defaults=False),
        )
    finally:
        logger.setLevel(level)
    assert results is not None
    return dict(results)
