"""The suite `images`: distance of generated from real images (FID, KID), and fit to their prompts (CLIP score).

FID is by Heusel et al. 2017, KID by Binkowski et al. 2018, and the CLIP score by Hessel et al. 2021. Each prompt gets
one image per guidance scale, with noise that depends only on the seed and the prompt's number. Images are saved as PNG
with their settings inside, and the next run with the same settings uses them again.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from lmfusion.data.config import SourceConfig
from lmfusion.evaluation.identity import model_digest
from lmfusion.evaluation.metrics.bootstrap import PERCENTILES, bootstrap
from lmfusion.evaluation.metrics.extractors import ExtractorConfig, FeatureExtractor, load_extractor
from lmfusion.evaluation.metrics.feature_distances import frechet_distance, kernel_distances_of_subsets
from lmfusion.evaluation.references import CocoConfig, References, check_references, load_references, read_lines
from lmfusion.evaluation.results import SampleImage, Score, SuiteResult
from lmfusion.evaluation.suites.image_settings import image_options
from lmfusion.generation.options import GenerationOptions
from lmfusion.images.png import has_settings, save_png
from lmfusion.images.preprocessing import load_image, to_pil, to_tensor
from lmfusion.utils.config_values import check_least, to_values

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

NUM_SUBSETS, SUBSET_SIZE = 100, 1000
"""Subsets of the kernel distance, as usual for KID. With fewer than twice as many images, subsets are halves."""
_WEIGHTS = {
    "inception": "They are at https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "clip": "CLIPs are on the hub, such as https://huggingface.co/openai/clip-vit-large-patch14",
}
"""Where to get missing weights, by kind of extractor."""


@dataclass
class ImagesConfig:
    """Which images to generate, and what to compare with. Raises ValueError without prompts, and for bad numbers."""

    source: SourceConfig | None = None
    """A data source: its captions are the prompts, its images the real images."""
    coco: CocoConfig | None = None
    """Instead, files in COCO's layout."""
    prompts: str | None = None
    """A file of prompts to use instead of captions: .txt (one per line) or .jsonl ({"prompt": ...} per line)."""
    num_images: int | None = None
    """Images per guidance scale; None: one for each real image, or for each line of `prompts`."""
    guidance_scales: list[float] = field(default_factory=lambda: [1.55])
    """Images of all prompts are generated with each of them."""
    sampler: str = "ddpm"
    num_steps: int = 250
    seed: int = 0
    """For the choice of captions and for the noise."""
    batch_size: int = 8
    """Images generated at a time; changes speed and memory only."""
    extractors: list[ExtractorConfig] = field(default_factory=list)
    """Networks whose features are compared. If empty, there are no distances."""
    control: SourceConfig | None = None
    """Other real images, as many as are generated: their distances are what perfect images would get."""
    clip: str | None = None
    """Folder of a CLIP model in transformers' format, for the CLIP score; None: no such score."""
    num_shown: int = 24
    """Number of images of each guidance scale on the page."""

    def __post_init__(self) -> None:
        if self.source is not None and self.coco is not None:
            raise ValueError("images must have source or coco, got both; give one of them")
        if self.source is None and self.coco is None and self.prompts is None:
            raise ValueError("images must have prompts, got none; give source, coco or prompts")
        if self.extractors and self.source is None and self.coco is None:
            raise ValueError(
                "images.extractors need real images to compare with; give source or coco, or leave them out"
            )
        if self.control is not None and not self.extractors:
            raise ValueError(
                "images.control needs images.extractors to be compared with; give one, or leave control out"
            )
        if not self.guidance_scales or len(set(self.guidance_scales)) < len(self.guidance_scales):
            raise ValueError(
                f"images.guidance_scales must be one or more different numbers, got {self.guidance_scales}"
            )
        check_least(self, "images", num_images=2, batch_size=1, num_shown=0)
        for scale in self.guidance_scales:
            self.options(scale)

    def options(self, guidance_scale: float) -> GenerationOptions:
        """The options of one image. Raises ValueError for numbers out of range."""
        return image_options(self, "images", guidance_scale=guidance_scale)


@dataclass(frozen=True)
class ImagesSuite:
    """Images generated from prompts, compared with real images and with the prompts."""

    config_type: ClassVar[type] = ImagesConfig
    config: ImagesConfig

    def check(self) -> None:
        """Look for data, weights and packages. Raises ValueError or OSError, with the way out, if one is missing."""
        check_references(self.config.coco, "images")
        for source, coco in ((self.config.source, self.config.coco), (self.config.control, None)):
            if source is not None or coco is not None:
                load_references(source, coco, image_size=8)
        _given_prompts(self.config)
        for extractor in self.config.extractors:
            try:
                load_extractor(extractor)
            except FileNotFoundError as error:
                raise ValueError(f"{error}. {_WEIGHTS.get(extractor.kind, '')}") from error
        if self.config.clip is not None:
            from lmfusion.evaluation.metrics.clip_score import ClipScorer

            try:
                ClipScorer(Path(self.config.clip))
            except FileNotFoundError as error:
                raise ValueError(f"images.clip: {error}. {_WEIGHTS['clip']}") from error

    def run(self, model: "LMFusion", folder: Path) -> SuiteResult:
        """Generate images into `folder`, a subfolder per guidance scale, and compare them.

        Real images are cropped and resized as for the model's training before they are compared. Raises ValueError if
        `num_images` is above the number of lines of `prompts`, and what `References` raises.
        """
        config = self.config
        size, channels = model.codec.config.image_size, model.codec.config.channels
        references, prompts, indices = _prompts(config, size)
        extractors = [load_extractor(extractor, model.device) for extractor in config.extractors]
        real = []
        if references is not None:
            real = [extractor.features(_resized(references, indices, size, channels)) for extractor in extractors]
        scores: list[Score] = []
        pictures: list[SampleImage] = []
        digest = model_digest(model)
        for scale in config.guidance_scales:
            options = config.options(scale)
            files = generate_images(model, prompts, options, folder / f"guidance-{scale:g}", config.batch_size, digest)
            made = {"guidance": scale, "sampler": config.sampler, "steps": config.num_steps, "seed": config.seed}
            for extractor, of_real in zip(extractors, real, strict=True):
                generated = extractor.features(load_image(file) for file in files)
                scores += distances(extractor, generated, of_real, f", guidance {scale:g}", made | _real_details(size))
            if config.clip is not None:
                scores.append(_clip_score(model, Path(config.clip), files, prompts, f", guidance {scale:g}", made))
            pictures += [
                SampleImage(str(file.relative_to(folder)), f"{prompt} (guidance {scale:g})")
                for file, prompt in list(zip(files, prompts, strict=True))[: config.num_shown]
            ]
        if config.control is not None:
            others = load_references(config.control, None, size)
            chosen = sorted({index for index, _ in others.sample(min(len(prompts), len(others)), config.seed)})
            for extractor, of_real in zip(extractors, real, strict=True):
                of_others = extractor.features(_resized(others, chosen, size, channels))
                details = {"real images instead of generated ones": config.control.name, **_real_details(size)}
                scores += distances(extractor, of_others, of_real, ", of other real images", details)
        return SuiteResult("images", tuple(scores), to_values(config), pictures=tuple(pictures))


def distances(
    extractor: FeatureExtractor, generated: np.ndarray, real: np.ndarray, suffix: str, details: dict[str, Any]
) -> list[Score]:
    """Frechet and kernel distance of features [n, d] and [m, d]. suffix: end of the scores' names.

    The kernel distance is the mean over random subsets without replacement, as usual for KID. Its interval comes from
    the spread of the subsets (Shao and Wu 1989): halves spread as the whole sample does, and smaller subsets by a known
    multiple of it. The Frechet distance has no interval because all of its resamples would lie above it.
    """
    name = extractor.distance_name
    count = len(generated)
    details = {"real images": len(real), **extractor.details, **details}
    num_smaller = min(len(generated), len(real))
    size = min(SUBSET_SIZE, num_smaller // 2)
    scores = [Score(f"{name}{suffix}", frechet_distance(generated, real), count=count, details=details)]
    if size >= 2:
        subsets = kernel_distances_of_subsets(generated, real, NUM_SUBSETS, size)
        value = float(subsets.mean())
        spread = (size / (num_smaller - size)) ** 0.5
        low, high = (value + spread * (float(end) - value) for end in np.percentile(subsets, PERCENTILES))
        kernel = "KID" if name == "FID" else name.replace("Frechet", "kernel")
        details = {**details, "subsets": f"{NUM_SUBSETS} of {size}"}
        scores.append(Score(f"{kernel}{suffix}", value, low, high, count, details))
    return scores


def read_prompts(path: str) -> list[str]:
    """The prompts of a file. Raises ValueError for one that is missing, empty or neither .txt nor .jsonl."""
    file = Path(path)
    if not file.is_file() or file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"images.prompts must be an existing .txt file (one per line) or .jsonl file, got {path}")
    lines = [line.strip() for line in read_lines(file)]
    if file.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"].strip() for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path} must hold an object {{"prompt": text}} per line, got a line without: {error}'
            ) from error
    if not lines or not all(lines):
        raise ValueError(f"{path} must hold at least one prompt and no empty ones, got {len(lines)} lines")
    return lines


def generate_images(
    model: "LMFusion",
    prompts: Sequence[str],
    options: GenerationOptions,
    folder: Path,
    batch_size: int,
    digest: str,
) -> list[Path]:
    """A PNG in `folder` for each prompt. Files that exist and were made with the same settings are kept.

    digest: of the model. The noise of prompt i depends only on (options.seed, i). Other files are not touched.
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
    expected = [{"prompt": prompt, "index": i, **made} for i, prompt in enumerate(prompts)]
    missing = [i for i, settings in enumerate(expected) if not has_settings(files[i], settings)]
    requests = [EngineRequest(encode_prompt(model, [prompts[i]]), options, i) for i in missing]
    if not requests:
        return files
    engine = engine_for(model, requests, batch_size)
    with evaluating(model):
        # Submitted in groups, so that only a few requests wait in memory at a time
        for first in range(0, len(requests), 8 * batch_size):
            group = requests[first:][: 8 * batch_size]
            indices = {engine.submit(r.prompt, r.options, index=r.index): r.index for r in group}
            while engine.has_work:
                for request_id, event in engine.step():
                    if isinstance(event, Done) and event.exception is not None:
                        raise event.exception
                    if isinstance(event, ImageEnd):
                        i = indices[request_id]
                        save_png(files[i], event.image, expected[i])
    return files


def _prompts(config: ImagesConfig, image_size: int) -> tuple[References | None, list[str], list[int]]:
    """The references, the prompts, and the indices of the real images without repetition."""
    has_real = config.source is not None or config.coco is not None
    references = load_references(config.source, config.coco, image_size) if has_real else None
    given = _given_prompts(config)
    count = config.num_images if given is None else config.num_images or len(given)
    pairs = [] if references is None else references.sample(count, config.seed)
    prompts = given[:count] if given is not None else [caption for _, caption in pairs]
    return references, prompts, sorted({index for index, _ in pairs})


def _given_prompts(config: ImagesConfig) -> list[str] | None:
    """The prompts of the file; None if captions are the prompts. Raises ValueError for more images than prompts."""
    if config.prompts is None:
        return None
    given = read_prompts(config.prompts)
    if config.num_images is not None and config.num_images > len(given):
        raise ValueError(
            f"images.num_images must be at most {len(given)}, the prompts of {config.prompts}, got {config.num_images}"
        )
    return given


def _resized(references: References, indices: Sequence[int], size: int, channels: int) -> Iterator[Image.Image]:
    """Real images at the size and with the channels of the model's codec."""
    for index in indices:
        yield to_pil(to_tensor(references[index].load_image(), size, channels)[None])[0]


def _real_details(size: int) -> dict[str, Any]:
    return {"real images are": f"cropped to the middle and resized to {size} x {size} first"}


def _clip_score(
    model: "LMFusion", folder: Path, files: Sequence[Path], prompts: Sequence[str], suffix: str, made: dict[str, Any]
) -> Score:
    from lmfusion.evaluation.metrics.clip_score import ClipScorer

    scorer = ClipScorer(folder, model.device)
    values = scorer.scores((load_image(file) for file in files), list(prompts))
    return Score(
        f"CLIP score{suffix}", float(values.mean()), *bootstrap(values), len(values), {**scorer.details, **made}
    )
