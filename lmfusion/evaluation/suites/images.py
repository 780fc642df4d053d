"""How good are the drawings? Distances of drawn from real images, and how well they fit their prompts.

Each prompt is drawn once a guidance scale, with chance that depends on the seed and the prompt's number alone. Drawings
are stored as PNG with what they were made with, and used again by the next run that asks for the same.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lmfusion.data.config import SourceConfig
from lmfusion.evaluation.identity import model_digest
from lmfusion.evaluation.metrics.bootstrap import PERCENTILES, bootstrap
from lmfusion.evaluation.metrics.extractors import ExtractorConfig, FeatureExtractor, load_extractor
from lmfusion.evaluation.metrics.feature_distances import frechet_distance, kernel_distances_of_subsets
from lmfusion.evaluation.references import CocoConfig, References, check_references, load_references, read_lines
from lmfusion.evaluation.results import Picture, Score, SuiteResult
from lmfusion.evaluation.suites.image_settings import image_options
from lmfusion.generation.options import GenerationOptions
from lmfusion.images.png import holds, save_png
from lmfusion.images.preprocessing import load_image, to_pil, to_tensor
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, as published KIDs have them; with fewer than twice as many images, subsets are halves."""
_WEIGHTS = {
    "inception": "They are at https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "clip": "CLIPs are on the hub, such as https://huggingface.co/openai/clip-vit-large-patch14",
}
"""Where what is missing can be had."""


@dataclass
class ImagesConfig:
    """What is drawn, and compared with what. Raises ValueError without prompts, and for numbers out of range."""

    source: SourceConfig | None = None
    """A data source: its captions are the prompts, its images the real ones."""
    coco: CocoConfig | None = None
    """The same from files in COCO's layout."""
    prompts: str | None = None
    """Instead of captions: a file of prompts, .txt (one a line) or .jsonl (one {"prompt": ...} a line)."""
    num_images: int | None = None
    """How many are drawn; None: one for each real image, or for each line of `prompts`."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.55])
    """All prompts are drawn with each of them."""
    sampler: str = "ddpm"
    num_steps: int = 250
    seed: int = 0
    """Of the choice of captions, and of the noise."""
    batch_size: int = 8
    """Drawn at a time; changes speed and memory only."""
    extractors: list[ExtractorConfig] = field(default_factory=list)
    """Networks whose features are compared; none: no distances."""
    control: SourceConfig | None = None
    """Other real images, as many as are drawn: their distances are what drawings without a fault would get."""
    clip: str | None = None
    """Folder of a CLIP model in transformers' form, for the CLIP score; None: no such score."""
    num_shown: int = 24
    """Drawings of each guidance scale on the page."""

    def __post_init__(self) -> None:
        if self.source is not None and self.coco is not None:
            raise ValueError("images has source and coco; give one of them")
        if self.source is None and self.coco is None and self.prompts is None:
            raise ValueError("images has no prompts; give source, coco or prompts")
        if self.extractors and self.source is None and self.coco is None:
            raise ValueError("images.extractors compare with real images; give source or coco, or leave them out")
        if self.control is not None and not self.extractors:
            raise ValueError("images.control is compared through images.extractors; give one, or leave it out")
        if not self.guidance_scales or len(set(self.guidance_scales)) < len(self.guidance_scales):
            raise ValueError(f"images.guidance_scales is {self.guidance_scales}; give one or more, each once")
        check_least(self, "images", num_images=2, batch_size=1, num_shown=0)
        for scale in self.guidance_scales:
            self.options(scale)

    def options(self, guidance_scale: float) -> GenerationOptions:
        """How an image is drawn. Raises ValueError for numbers out of range."""
        return image_options(self, "images", guidance_scale=guidance_scale)


def check_images(config: ImagesConfig) -> None:
    """Look for data, weights and packages. Raises ValueError or OSError, with the way out, where one is missing."""
    check_references(config.coco, "images")
    for source, coco in ((config.source, config.coco), (config.control, None)):
        if source is not None or coco is not None:
            load_references(source, coco, image_size=8)
    _given_prompts(config)
    for extractor in config.extractors:
        try:
            load_extractor(extractor)
        except FileNotFoundError as error:
            raise ValueError(f"{error}. {_WEIGHTS.get(extractor.kind, '')}") from error
    if config.clip is not None:
        from lmfusion.evaluation.metrics.clip_score import ClipScorer

        try:
            ClipScorer(Path(config.clip))
        except FileNotFoundError as error:
            raise ValueError(f"images.clip: {error}. {_WEIGHTS['clip']}") from error


def run_images(model: "LMFusion", config: ImagesConfig, folder: Path) -> SuiteResult:
    """Draw into `folder`, a subfolder a guidance scale, and compare.

    Real images are cropped and resized as for the model's training before they are compared. Raises ValueError for a
    num_images beyond the lines of `prompts`, and what `References` raises.
    """
    size, channels = model.codec.config.image_size, model.codec.config.channels
    references, prompts, indices = _prompts(config, size)
    extractors = [load_extractor(extractor, model.device) for extractor in config.extractors]
    real = []
    if references is not None:
        real = [extractor.features(_resized(references, indices, size, channels)) for extractor in extractors]
    scores: list[Score] = []
    pictures: list[Picture] = []
    digest = model_digest(model)
    for scale in config.guidance_scales:
        options = config.options(scale)
        files = draw_prompts(model, prompts, options, folder / f"guidance-{scale:g}", config.batch_size, digest)
        made = {"guidance": scale, "sampler": config.sampler, "steps": config.num_steps, "seed": config.seed}
        for extractor, of_real in zip(extractors, real, strict=True):
            drawn = extractor.features(load_image(file) for file in files)
            scores += distances(extractor, drawn, of_real, f", guidance {scale:g}", made | _real_details(size))
        if config.clip is not None:
            scores.append(_clip_score(model, Path(config.clip), files, prompts, f", guidance {scale:g}", made))
        pictures += [
            Picture(str(file.relative_to(folder)), f"{prompt} (guidance {scale:g})")
            for file, prompt in list(zip(files, prompts, strict=True))[: config.num_shown]
        ]
    if config.control is not None:
        others = load_references(config.control, None, size)
        chosen = sorted({index for index, _ in others.draw(min(len(prompts), len(others)), config.seed)})
        for extractor, of_real in zip(extractors, real, strict=True):
            of_others = extractor.features(_resized(others, chosen, size, channels))
            details = {"real images instead of drawings": config.control.name, **_real_details(size)}
            scores += distances(extractor, of_others, of_real, ", of other real images", details)
    return SuiteResult("images", tuple(scores), to_values(config), pictures=tuple(pictures))


def distances(
    extractor: FeatureExtractor, drawn: np.ndarray, real: np.ndarray, what: str, details: dict[str, Any]
) -> list[Score]:
    """Frechet and kernel distance of features [n, d] and [m, d]. what: ends the scores' names.

    The kernel distance is the mean over random subsets without replacement, as KID is published. Its interval comes
    from the spread of the subsets (Shao and Wu 1989): that of halves is the spread of the whole, of smaller ones a
    known multiple of it. The Frechet distance has none: its resamples would all lie above it.
    """
    name = extractor.distance_name
    count = len(drawn)
    details = {"real images": len(real), **extractor.details, **details}
    num_smaller = min(len(drawn), len(real))
    size = min(SUBSET_SIZE, num_smaller // 2)
    scores = [Score(f"{name}{what}", frechet_distance(drawn, real), count=count, details=details)]
    if size >= 2:
        subsets = kernel_distances_of_subsets(drawn, real, NUM_SUBSETS, size)
        value = float(subsets.mean())
        spread = (size / (num_smaller - size)) ** 0.5
        low, high = (value + spread * (float(end) - value) for end in np.percentile(subsets, PERCENTILES))
        kernel = "KID" if name == "FID" else name.replace("Frechet", "kernel")
        details = {**details, "subsets": f"{NUM_SUBSETS} of {size}"}
        scores.append(Score(f"{kernel}{what}", value, low, high, count, details))
    return scores


def read_prompts(path: str) -> list[str]:
    """The prompts of a file. Raises ValueError for one that is missing, empty or neither .txt nor .jsonl."""
    file = Path(path)
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"images.prompts is {path}; give a file that is there, .txt (one a line) or .jsonl")
    lines = [line.strip() for line in read_lines(file)]
    if file.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"].strip() for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{path} holds a line that is no object {{"prompt": text}}: {error}') from error
    if not lines or not all(lines):
        raise ValueError(f"{path} holds no prompts, or an empty one")
    return lines


def draw_prompts(
    model: "LMFusion",
    prompts: Sequence[str],
    options: GenerationOptions,
    folder: Path,
    batch_size: int,
    digest: str,
) -> list[Path]:
    """A PNG in `folder` for each prompt; those that are there, made with the same, are not drawn again.

    digest: of the model. The noise of prompt i depends on (options.seed, i) alone. Other files are left alone.
    """
    from lmfusion.generation import Done, ImageEnd, encode_prompt
    from lmfusion.generation.api import EngineRequest, engine_for, evaluating

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:06d}.png" for i in range(len(prompts))]
    made = {
        "sampler": options.sampler,
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "seed": options.seed,
        "model_sha256": digest,
    }
    wanted = [{"prompt": prompt, "index": i, **made} for i, prompt in enumerate(prompts)]
    missing = [i for i, settings in enumerate(wanted) if not holds(files[i], settings)]
    asked = [EngineRequest(encode_prompt(model, [prompts[i]]), options, i) for i in missing]
    if not asked:
        return files
    engine = engine_for(model, asked, batch_size)
    with evaluating(model):
        for first in range(0, len(asked), 8 * batch_size):  # so that few wait in memory at a time
            places = {
                engine.submit(a.prompt, a.options, index=a.index): a.index for a in asked[first:][: 8 * batch_size]
            }
            while engine.has_work:
                for request_id, event in engine.step():
                    if isinstance(event, Done) and event.exception is not None:
                        raise event.exception
                    if isinstance(event, ImageEnd):
                        i = places[request_id]
                        save_png(files[i], event.image, wanted[i])
    return files


def _prompts(config: ImagesConfig, image_size: int) -> tuple[References | None, list[str], list[int]]:
    """The references, the prompts, and the indices of the real images, each once."""
    has_real = config.source is not None or config.coco is not None
    references = load_references(config.source, config.coco, image_size) if has_real else None
    given = _given_prompts(config)
    count = config.num_images if given is None else config.num_images or len(given)
    pairs = [] if references is None else references.draw(count, config.seed)
    prompts = given[:count] if given is not None else [caption for _, caption in pairs]
    return references, prompts, sorted({index for index, _ in pairs})


def _given_prompts(config: ImagesConfig) -> list[str] | None:
    """The prompts of the file; None where captions are the prompts. Raises ValueError for more images than prompts."""
    if config.prompts is None:
        return None
    given = read_prompts(config.prompts)
    if config.num_images is not None and config.num_images > len(given):
        raise ValueError(f"images.num_images is {config.num_images}, but {config.prompts} has {len(given)} prompts")
    return given


def _resized(references: References, indices: Sequence[int], size: int, channels: int) -> Iterator[Image.Image]:
    """Real images as the model's codec is given them."""
    for index in indices:
        yield to_pil(to_tensor(references[index].load_image(), size, channels)[None])[0]


def _real_details(size: int) -> dict[str, Any]:
    return {"real images are": f"cropped to the middle and resized to {size} x {size} first"}


def _clip_score(
    model: "LMFusion", folder: Path, files: Sequence[Path], prompts: Sequence[str], what: str, made: dict[str, Any]
) -> Score:
    from lmfusion.evaluation.metrics.clip_score import ClipScorer

    scorer = ClipScorer(folder, model.device)
    values = scorer.scores((load_image(file) for file in files), list(prompts))
    return Score(f"CLIP score{what}", float(values.mean()), *bootstrap(values), len(values), {**scorer.details, **made})
