"""How well are images described? CIDEr-D, BLEU-4, ROUGE-L and exact matches against reference captions.

Captions are written greedily and kept in captions.jsonl, from which the next run that asks for the same goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmfusion.data.config import SourceConfig
from lmfusion.evaluation.identity import model_digest, values_digest
from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.metrics.caption_metrics import bleu, score_captions
from lmfusion.evaluation.references import CocoConfig, References, check_references, load_references
from lmfusion.evaluation.results import Picture, Score, SuiteResult
from lmfusion.utils.config_values import check_least, to_values
from lmfusion.utils.files import replace_text

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

FILE = "captions.jsonl"
"""The first line says what the captions were made with; each further one holds {"image", "caption", "references"}."""
TOKENIZER = "Penn Treebank rules of pycocoevalcap, in Python (lmfusion.evaluation.metrics.ptb_tokenizer)"


@dataclass
class CaptionsConfig:
    """What is described. Raises ValueError unless one of source and coco is given, and for numbers out of range."""

    source: SourceConfig | None = None
    """A data source: all captions of an image are its references."""
    coco: CocoConfig | None = None
    """The same from a file in COCO's layout, such as Karpathy's test split."""
    num_images: int | None = None
    """The first ones in an order drawn with `seed`; None: all."""
    prompt: str = ""
    """How every caption begins; it is a part of what is scored."""
    max_new_tokens: int = 32
    batch_size: int = 8
    """Images described at a time; changes speed and memory only."""
    seed: int = 0
    num_shown: int = 24
    """Examples on the page."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.coco is None):
            raise ValueError("captions needs either source (a data source) or coco (files in COCO's layout)")
        check_least(self, "captions", num_images=1, max_new_tokens=1, batch_size=1, seed=0, num_shown=0)


def check_captions(config: CaptionsConfig) -> None:
    """Look for the data. Raises ValueError, with the way out, where they are missing, damaged or fewer than asked."""
    check_references(config.coco, "captions")
    _references(config, image_size=8)


def run_captions(model: "LMFusion", config: CaptionsConfig, folder: Path) -> SuiteResult:
    """Describe images and compare. Raises ValueError for more images than there are, and what `References` raises."""
    references = _references(config, model.codec.config.image_size)
    indices = [index for index, _ in references.draw(config.num_images, config.seed)]
    folder.mkdir(parents=True, exist_ok=True)
    written = describe(model, references, indices, config, folder / FILE)
    expected = [list(references[index].captions) for index in indices]
    return SuiteResult(
        "captions",
        scores_of(written, expected),
        to_values(config),
        pictures=_examples(references, indices, written, expected, config.num_shown, folder),
    )


def _references(config: CaptionsConfig, image_size: int) -> References:
    references = load_references(config.source, config.coco, image_size)
    if config.num_images is not None and config.num_images > len(references):
        raise ValueError(f"captions.num_images is {config.num_images}, but there are {len(references)} images")
    return references


def describe(
    model: "LMFusion", references: References, indices: Sequence[int], config: CaptionsConfig, file: Path
) -> list[str]:
    """A caption of each image at `indices`; those in `file`, of the same data, model and settings, stay."""
    data = to_values(config)
    key = values_digest(
        [model_digest(model), data["source"], data["coco"], config.prompt, config.max_new_tokens]
    )  # names of images alone may be those of another folder
    kept = _read_written(file, key)
    known = {values["image"]: values["caption"] for values in kept}
    chosen = [references[index] for index in indices]
    missing = [reference for reference in chosen if reference.sample_id not in known]
    whole = [{"key": key}, *kept]  # without a line that a crash has cut
    replace_text(file, "".join(json.dumps(values) + "\n" for values in whole))
    with open(file, "a", encoding="utf-8") as lines:
        for first in range(0, len(missing), 8 * config.batch_size):
            some = missing[first:][: 8 * config.batch_size]
            captions = model.caption(
                [reference.load_image() for reference in some],
                prompt=config.prompt,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
            )
            for reference, caption in zip(some, captions, strict=True):
                known[reference.sample_id] = f"{config.prompt.strip()} {caption}".strip()
                values = {
                    "image": reference.sample_id,
                    "caption": known[reference.sample_id],
                    "references": list(reference.captions),
                }
                lines.write(json.dumps(values) + "\n")
            lines.flush()
    return [known[reference.sample_id] for reference in chosen]


def scores_of(written: Sequence[str], expected: Sequence[Sequence[str]]) -> tuple[Score, ...]:
    """The four scores, with bootstraps over images."""
    found = score_captions(written, expected)
    exact = np.array([text in references for text, references in zip(written, expected, strict=True)], np.float64)
    count = len(written)
    details = {"references an image": round(sum(map(len, expected)) / count, 2), "tokenizer": TOKENIZER}
    return (
        Score("CIDEr-D", found.cider_d, *bootstrap(found.cider_d_by_image), count, details),
        Score("BLEU-4", found.bleu_4, *bootstrap(found.bleu_counts, bleu), count, details),
        Score("ROUGE-L", found.rouge_l, *bootstrap(found.rouge_l_by_image), count, details),
        Score("exact match", float(exact.mean()), *bootstrap(exact), count, {**details, "tokenizer": "none"}),
    )


def _read_written(file: Path, key: str) -> list[dict[str, Any]]:
    """The lines of captions that `file` holds, if it was made with `key`; one cut by a crash is left out."""
    found: list[dict[str, Any]] = []
    try:
        first, *lines = file.read_text(encoding="utf-8").split("\n")
        if json.loads(first) != {"key": key}:
            return []
        for line in lines:
            values = json.loads(line)
            found.append({name: values[name] for name in ("image", "caption", "references")})
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # what is not there, or not whole, is written again
        pass
    return found


def _examples(
    references: References,
    indices: Sequence[int],
    written: Sequence[str],
    expected: Sequence[Sequence[str]],
    num_shown: int,
    folder: Path,
) -> tuple[Picture, ...]:
    pictures = []
    for index, text, captions in list(zip(indices, written, expected, strict=True))[:num_shown]:
        file = folder / f"{index:06d}.png"
        references[index].load_image().save(file)
        verdict = "" if text in captions else f" (reference: {captions[0]})"
        pictures.append(Picture(file.name, f"{text or '(nothing)'}{verdict}"))
    return tuple(pictures)
