"""Which drawings does GenEval (Ghosh et al. 2023) ask for? Those of its prompts, in the folders that its judge reads.

    <folder>/00000/metadata.jsonl       line 0 of evaluation_metadata.jsonl, as it is
    <folder>/00000/samples/0000.png     and so on, four of each prompt in the paper

Whether a drawing shows what was asked for is judged by GenEval itself, with an object detector that is no part of this
project: `python evaluation/evaluate_images.py <folder> --outfile results.jsonl --model-path <detector>`, then
`python evaluation/summary_scores.py results.jsonl`, both in https://github.com/djghosh13/geneval. The scores here are
counts. `lmfusion.evaluation.suites.shapes` asks for the same skills and judges by itself.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmfusion.evaluation.identity import model_digest
from lmfusion.evaluation.references import read_lines
from lmfusion.evaluation.results import Picture, Score, SuiteResult, Table
from lmfusion.evaluation.suites.image_settings import drawing_values, image_options
from lmfusion.images.png import has_settings, save_png
from lmfusion.utils.config_values import check_least, to_values
from lmfusion.utils.files import replace_text

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

PROMPTS = "prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval"
JUDGE = "GenEval's own evaluation/evaluate_images.py"
NUM_DIGITS_OF_FOLDERS, NUM_DIGITS_OF_SAMPLES = 5, 4


@dataclass
class GenEvalConfig:
    """What is drawn for GenEval. Raises ValueError for numbers out of range."""

    prompts: str
    """evaluation_metadata.jsonl of GenEval: a line {"tag": ..., "include": [...], "prompt": ...} a prompt."""
    num_prompts: int | None = None
    """The first ones of the file; None: all 553."""
    num_images: int = 4
    """Drawings of each prompt."""
    guidance_scale: float = 1.55
    sampler: str = "ddpm"
    num_steps: int = 250
    seed: int = 0
    """Noise depends on (seed + number of the prompt, number of the drawing) alone."""

    def __post_init__(self) -> None:
        check_least(self, "geneval", num_prompts=1, num_images=1)
        image_options(self, "geneval")


def check_geneval(config: GenEvalConfig) -> None:
    """Raise ValueError where the prompts are missing, damaged, or fewer than `num_prompts`."""
    read_metadata(config)


def run_geneval(model: "LMFusion", config: GenEvalConfig, folder: Path) -> SuiteResult:
    """Draw what is not there yet into `folder`, in GenEval's layout. Its scores are counts.

    A drawing is there if its PNG says that this model made it of the same prompt, seed and options.

    Raises ValueError for what `check_geneval` refuses, and where `folder` holds prompts or samples beyond those asked
    for, which the judge would count too.
    """
    metadata = read_metadata(config)
    digest = model_digest(model)
    _check_nothing_else(folder, len(metadata), config.num_images)
    pictures, num_drawn, shown = [], 0, set()
    for i, line in enumerate(metadata):
        num_drawn += _draw(model, config, line, i, folder, digest)
        if line["tag"] not in shown:
            shown.add(line["tag"])
            pictures += [
                Picture(str(_sample(folder, i, k).relative_to(folder)), f"{line['tag']}: {line['prompt']}")
                for k in range(config.num_images)
            ]
    tags = Counter(line["tag"] for line in metadata)
    rows = tuple((tag, str(count), str(count * config.num_images)) for tag, count in tags.items())
    details = {"judged by": JUDGE, "drawn now": num_drawn}
    scores = (
        Score("prompts", len(metadata), count=len(metadata), details=details),
        Score("drawings", len(metadata) * config.num_images, count=len(metadata), details=details),
    )
    table = Table(f"Drawings to be judged by {JUDGE}", ("task", "prompts", "drawings"), rows)
    return SuiteResult("geneval", scores, to_values(config), tables=(table,), pictures=tuple(pictures))


def read_metadata(config: GenEvalConfig) -> list[dict[str, Any]]:
    """The lines of `config.prompts` that are drawn.

    Raises ValueError for a file that is missing or holds anything else, and for more prompts than it has.
    """
    file = Path(config.prompts)
    if not file.is_file():
        raise ValueError(f"geneval.prompts is {file}, and there is no such file; give {PROMPTS}")
    metadata = [_read_line(file, number, line) for number, line in enumerate(read_lines(file), start=1)]
    wanted = config.num_prompts or max(1, len(metadata))
    if wanted > len(metadata):
        raise ValueError(f"geneval.prompts is {file}, which has {len(metadata)} prompts; {wanted} are asked for")
    return metadata[:wanted]


def _read_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}: line {number} is no JSON: {error}") from error
    is_text = isinstance(values, dict) and all(isinstance(values.get(key), str) for key in ("tag", "prompt"))
    if not is_text or not values["prompt"].strip() or not isinstance(values.get("include"), list):
        raise ValueError(
            f'{file}: line {number} is {line[:80]!r}; GenEval has {{"tag": text, "include": [...], "prompt": text}}'
        )
    return dict(values)


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
            f"{min(others)} is of another export, and would be judged too; delete it, or set output elsewhere"
        )


def _draw(model: "LMFusion", config: GenEvalConfig, line: dict[str, Any], index: int, folder: Path, digest: str) -> int:
    """Draw the samples of one prompt unless all are there. Answers with how many were drawn."""
    files = [_sample(folder, index, number) for number in range(config.num_images)]
    options = {**drawing_values(config), "seed": config.seed + index}
    made = {"prompt": line["prompt"], **options, "model_sha256": digest}
    wanted = [{**made, "index": number} for number in range(config.num_images)]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    replace_text(_folder(folder, index) / "metadata.jsonl", json.dumps(line))
    if all(has_settings(file, settings) for file, settings in zip(files, wanted, strict=True)):
        return 0
    images = model.draw([line["prompt"]] * config.num_images, batch_size=config.num_images, **options)
    for file, image, settings in zip(files, images, wanted, strict=True):
        save_png(file, image, settings)
    return len(files)
