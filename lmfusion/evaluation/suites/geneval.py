"""The suite `geneval`: images for the prompts of GenEval (Ghosh et al. 2023), in the folders that its scripts read.

    <folder>/00000/metadata.jsonl       line 0 of evaluation_metadata.jsonl, as it is
    <folder>/00000/samples/0000.png     and so on, four of each prompt in the paper

GenEval itself scores whether an image shows its prompt, with an object detector that is not part of this project:
`python evaluation/evaluate_images.py <folder> --outfile results.jsonl --model-path <detector>`, then
`python evaluation/summary_scores.py results.jsonl`, both in https://github.com/djghosh13/geneval. The scores here are
counts of images. `lmfusion.evaluation.suites.shapes` tests the same skills and scores them itself.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lmfusion.evaluation.identity import model_digest
from lmfusion.evaluation.references import read_lines
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult, Table
from lmfusion.evaluation.suites.image_settings import image_options, sampling_options
from lmfusion.images.png import has_settings, save_png
from lmfusion.utils.config_values import check_least, to_values
from lmfusion.utils.files import replace_text
from lmfusion.utils.json_files import parse_json_object

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

PROMPTS = "prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval"
SCORER = "GenEval's own evaluation/evaluate_images.py"
NUM_DIGITS_OF_FOLDERS, NUM_DIGITS_OF_SAMPLES = 5, 4


@dataclass
class GenEvalConfig:
    """Which images to generate for GenEval. Raises ValueError for an unknown sampler and for numbers out of range."""

    prompts: str
    """evaluation_metadata.jsonl of GenEval, with a line {"tag": ..., "include": [...], "prompt": ...} per prompt."""
    num_prompts: int | None = None
    """The first ones of the file; None: all, which are 553."""
    num_images: int = 4
    """Images of each prompt."""
    guidance_scale: float = 1.55
    sampler: str = "ddpm"
    num_steps: int = 250
    seed: int = 0
    """The noise depends only on seed + number of the prompt, and on the number of the image."""

    def __post_init__(self) -> None:
        check_least(self, "geneval", num_prompts=1, num_images=1)
        image_options(self, "geneval")


@dataclass(frozen=True)
class GenEvalSuite:
    """Images in the layout of GenEval's own scripts."""

    config_type: ClassVar[type] = GenEvalConfig
    config: GenEvalConfig

    def check(self) -> None:
        """Raise ValueError if the prompts are missing, damaged, or fewer than `num_prompts`."""
        read_metadata(self.config)

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Generate the images that are missing in `folder`, in GenEval's layout. The scores are counts.

        An image is kept if its PNG says that this model made it from the same prompt, seed and options.

        Raises ValueError as `check` does, and if `folder` holds prompts or images beyond those of `config`, which
        GenEval's script would count too.
        """
        config = self.config
        metadata = read_metadata(config)
        digest = model_digest(model)
        _check_nothing_else(folder, len(metadata), config.num_images)
        pictures, num_generated, shown = [], 0, set()
        for i, line in enumerate(metadata):
            num_generated += _generate(model, config, line, i, folder, digest)
            if line["tag"] not in shown:
                shown.add(line["tag"])
                pictures += [
                    SampleImage(str(_sample(folder, i, k).relative_to(folder)), f"{line['tag']}: {line['prompt']}")
                    for k in range(config.num_images)
                ]
        tags = Counter(line["tag"] for line in metadata)
        rows = tuple((tag, str(count), str(count * config.num_images)) for tag, count in tags.items())
        details = {"to be scored by": SCORER, "generated now": num_generated}
        scores = (
            Score("prompts", len(metadata), count=len(metadata), details=details),
            Score("images", len(metadata) * config.num_images, count=len(metadata), details=details),
        )
        table = Table(f"Images to be scored by {SCORER}", ("task", "prompts", "images"), rows)
        return SuiteResult("geneval", scores, to_values(config), tables=(table,), pictures=tuple(pictures))


def read_metadata(config: GenEvalConfig) -> list[dict[str, Any]]:
    """The first `num_prompts` lines of `config.prompts`.

    Raises ValueError for a file that is missing or holds anything else, and if it has fewer prompts.
    """
    file = Path(config.prompts)
    if not file.is_file():
        raise ValueError(f"geneval.prompts must be an existing file, got {file}; give {PROMPTS}")
    metadata = [_read_line(file, number, line) for number, line in enumerate(read_lines(file), start=1)]
    num_prompts = config.num_prompts or max(1, len(metadata))
    if num_prompts > len(metadata):
        raise ValueError(f"geneval.prompts must have at least {num_prompts} prompts, got {len(metadata)} in {file}")
    return metadata[:num_prompts]


def _read_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = parse_json_object(line)
    except ValueError as error:
        raise ValueError(f"{file}: line {number} must be a JSON object, got {line[:80]!r}: {error}") from error
    is_text = all(isinstance(values.get(key), str) for key in ("tag", "prompt"))
    if not is_text or not values["prompt"].strip() or not isinstance(values.get("include"), list):
        raise ValueError(
            f'{file}: line {number} must be {{"tag": text, "include": [...], "prompt": text}}, got {line[:80]!r}'
        )
    return values


def _folder(folder: Path, index: int) -> Path:
    return folder / f"{index:0{NUM_DIGITS_OF_FOLDERS}d}"


def _sample(folder: Path, index: int, number: int) -> Path:
    return _folder(folder, index) / "samples" / f"{number:0{NUM_DIGITS_OF_SAMPLES}d}.png"


def _check_nothing_else(folder: Path, num_prompts: int, num_images: int) -> None:
    def beyond(paths: list[Path], count: int) -> list[Path]:
        return [path for path in paths if path.stem.isdigit() and int(path.stem) >= count]

    if not folder.is_dir():
        return
    others = beyond([path for path in folder.iterdir() if path.is_dir()], num_prompts)
    others += beyond(list(folder.glob("*/samples/*.png")), num_images)
    if others:
        raise ValueError(
            f"{folder} must hold only the images of this export, got {min(others)}, which GenEval would count too; "
            "delete it, or set output elsewhere"
        )


def _generate(
    model: "LMFusion", config: GenEvalConfig, line: dict[str, Any], index: int, folder: Path, digest: str
) -> int:
    """Generate the images of one prompt unless all are there. Returns how many were generated."""
    files = [_sample(folder, index, number) for number in range(config.num_images)]
    options = {**sampling_options(config), "seed": config.seed + index}
    made = {"prompt": line["prompt"], **options, "model_sha256": digest}
    expected = [{**made, "index": number} for number in range(config.num_images)]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    replace_text(_folder(folder, index) / "metadata.jsonl", json.dumps(line))
    if all(has_settings(file, settings) for file, settings in zip(files, expected, strict=True)):
        return 0
    images = model.draw([line["prompt"]] * config.num_images, batch_size=config.num_images, **options)
    for file, image, settings in zip(files, images, expected, strict=True):
        save_png(file, image, settings)
    return len(files)
