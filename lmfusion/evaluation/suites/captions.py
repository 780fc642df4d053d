"""The suite `captions`: CIDEr-D, BLEU-4, ROUGE-L and exact matches of captions against reference captions.

The metrics are those of the COCO caption evaluation (Chen et al. 2015; https://github.com/tylin/coco-caption). Captions
are decoded greedily and saved in captions.jsonl, from which the next run with the same settings continues.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmfusion.data.config import SourceConfig
from lmfusion.evaluation.identity import model_digest, values_digest
from lmfusion.evaluation.metrics.bootstrap import bootstrap
from lmfusion.evaluation.metrics.caption_metrics import bleu, score_captions
from lmfusion.evaluation.references import CocoConfig, References, check_references, load_references
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult
from lmfusion.reports.pictures import save_picture
from lmfusion.utils.config_values import check_least, to_values
from lmfusion.utils.files import replace_text

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

FILE = "captions.jsonl"
"""Its first line identifies the settings; each further one holds {"image", "caption", "references"}."""
TOKENIZER = "Penn Treebank rules of pycocoevalcap, in Python (lmfusion.evaluation.metrics.ptb_tokenizer)"


@dataclass
class CaptionsConfig:
    """Which images to caption. Raises ValueError unless either source or coco is given, and for bad numbers."""

    source: SourceConfig | None = None
    """A data source; all captions of an image are its references."""
    coco: CocoConfig | None = None
    """Instead, files in COCO's layout, such as Karpathy's test split."""
    num_images: int | None = None
    """Number of images, in a random order by `seed`; None: all."""
    prompt: str = ""
    """Beginning of every caption. It is scored too."""
    max_new_tokens: int = 32
    batch_size: int = 8
    """Images captioned at a time; changes speed and memory only."""
    seed: int = 0
    num_shown: int = 24
    """Number of examples on the page."""

    def __post_init__(self) -> None:
        if (self.source is None) == (self.coco is None):
            raise ValueError("captions must have either source (a data source) or coco (files in COCO's layout)")
        check_least(self, "captions", num_images=1, max_new_tokens=1, batch_size=1, seed=0, num_shown=0)


@dataclass(frozen=True)
class CaptionsSuite:
    """Captions of images, compared with reference captions."""

    config_type: ClassVar[type] = CaptionsConfig
    config: CaptionsConfig

    def check(self) -> None:
        """Look for the data. Raises ValueError if they are missing, damaged or fewer than `num_images`."""
        check_references(self.config.coco, "captions")
        _references(self.config, image_size=8)

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Caption images and compare. Raises ValueError as `check` does, and what `References` raises."""
        config = self.config
        references = _references(config, model.codec.config.image_size)
        indices = [index for index, _ in references.sample(config.num_images, config.seed)]
        folder.mkdir(parents=True, exist_ok=True)
        written = write_captions(model, references, indices, config, folder / FILE)
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
        raise ValueError(
            f"captions.num_images must be at most {len(references)}, the images there are, got {config.num_images}"
        )
    return references


def write_captions(
    model: "LMFusion", references: References, indices: Sequence[int], config: CaptionsConfig, file: Path
) -> list[str]:
    """A caption of each image at `indices`. Captions in `file` of the same data, model and settings are kept."""
    data = to_values(config)
    # The data are part of the key because images of different folders may have the same names
    key = values_digest([model_digest(model), data["source"], data["coco"], config.prompt, config.max_new_tokens])
    kept = _read_written(file, key)
    known = {values["image"]: values["caption"] for values in kept}
    chosen = [references[index] for index in indices]
    missing = [reference for reference in chosen if reference.sample_id not in known]
    # Written again before appending: a crash may have truncated the last line
    replace_text(file, "".join(json.dumps(values) + "\n" for values in [{"key": key}, *kept]))
    with open(file, "a", encoding="utf-8") as lines:
        for first in range(0, len(missing), 8 * config.batch_size):
            batch = missing[first:][: 8 * config.batch_size]
            captions = model.caption(
                [reference.load_image() for reference in batch],
                prompt=config.prompt,
                max_new_tokens=config.max_new_tokens,
                batch_size=config.batch_size,
            )
            for reference, caption in zip(batch, captions, strict=True):
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
    """The four scores, with bootstrap intervals over images."""
    found = score_captions(written, expected)
    exact = np.array([text in references for text, references in zip(written, expected, strict=True)], np.float64)
    count = len(written)
    details = {"references per image": round(sum(map(len, expected)) / count, 2), "tokenizer": TOKENIZER}
    return (
        Score("CIDEr-D", found.cider_d, *bootstrap(found.cider_d_by_image), count, details),
        Score("BLEU-4", found.bleu_4, *bootstrap(found.bleu_counts, bleu), count, details),
        Score("ROUGE-L", found.rouge_l, *bootstrap(found.rouge_l_by_image), count, details),
        Score("exact match", float(exact.mean()), *bootstrap(exact), count, {**details, "tokenizer": "none"}),
    )


def _read_written(file: Path, key: str) -> list[dict[str, Any]]:
    """The captions in `file` if its key is `key`. A line that a crash has truncated is left out."""
    found: list[dict[str, Any]] = []
    try:
        first, *lines = file.read_text(encoding="utf-8").split("\n")
        if json.loads(first) != {"key": key}:
            return []
        for line in lines:
            values = json.loads(line)
            found.append({name: values[name] for name in ("image", "caption", "references")})
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a missing or damaged caption is written again
        pass
    return found


def _examples(
    references: References,
    indices: Sequence[int],
    written: Sequence[str],
    expected: Sequence[Sequence[str]],
    num_shown: int,
    folder: Path,
) -> tuple[SampleImage, ...]:
    pictures = []
    for index, text, captions in list(zip(indices, written, expected, strict=True))[:num_shown]:
        file = folder / f"{index:06d}.png"
        save_picture(references[index].load_image(), file)
        verdict = "" if text in captions else f" (reference: {captions[0]})"
        pictures.append(SampleImage(file.name, f"{text or '(nothing)'}{verdict}"))
    return tuple(pictures)
