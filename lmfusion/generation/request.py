"""What does the engine know of one answer in the making? Its place in the cache, its phase, its image so far."""

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmfusion.generation.async_copy import upload
from lmfusion.generation.cache import ALIGNMENT, CachedDocument
from lmfusion.generation.decoding import TextStream, random_generator
from lmfusion.generation.guidance import Branch, ContextImage, guidance_of
from lmfusion.generation.options import GenerationOptions
from lmfusion.generation.prompt import Prompt, context_limit, require_tokenizer
from lmfusion.generation.samplers import SchedulerRun, StepTable, step_table
from lmfusion.model.batch import Document, SpecialTokens, encode_caption
from lmfusion.text.tokenization import control_tokens, find_tokens

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion


class Phase(enum.Enum):
    """What a request does in the next step."""

    PREFILL = "prefill"
    """Rows that are known: the prompt, a BOI, a finished image."""
    DECODE = "decode"
    DENOISE = "denoise"


@dataclass(eq=False)
class Prefill:
    """Rows that are known and wait to be read."""

    cached: CachedDocument
    document: Document
    images: list[ContextImage] = field(default_factory=list)
    """Those in the document."""


@dataclass(eq=False)
class DenoiseState:
    """An image in the making."""

    run: StepTable | SchedulerRun
    numbers: Tensor | None
    """float32 [num_steps, 7] on the CPU: of a table, timestep and coefficients of each step"""
    noise_scales: list[float]
    """Of a table, how much noise each step adds."""
    generator: torch.Generator
    x: Tensor
    """[C, h, w] on the device: noisy at first"""
    x0: Tensor
    """[C, h, w]: the clean image predicted last"""
    weight: float
    """of the branch that knows everything"""
    branches: list[Branch]
    step: int = 0

    @property
    def timestep(self) -> float:
        """The noise level of the next step."""
        return self.run.timesteps[self.step]

    @property
    def is_finished(self) -> bool:
        return self.step == len(self.run.timesteps)


class Request:
    """One answer in the making. The engine moves it on."""

    def __init__(
        self, model: "LMFusion", request_id: int, prompt: Prompt, options: GenerationOptions, index: int
    ) -> None:
        """Raises ValueError for an image size that codec or patch coder cannot make, steps or a scheduler that do not
        fit the diffusion, a stop string with text before a control token, or a prompt that leaves no room."""
        tokenizer = require_tokenizer(model)
        self.stop_ids = _stop_ids(options.stop_strings, control_tokens(tokenizer))
        """Control tokens that end the answer."""
        self.id = request_id
        self.options = options
        self.index = index
        self.prompt = prompt
        self.latent_shape = latent_shape(model, options.image_size)
        self.image_rows = model.image.patch_coder.tokens_per_image(*self.latent_shape[1:])
        self.min_images = max(options.min_images, int(options.draw_first))
        self.tokens = SpecialTokens.of(tokenizer, model.boi_token_id)
        negative = (options.negative_prompt or "").strip() if options.max_images else ""
        self.negative_ids = encode_caption(tokenizer, negative) if negative else []
        self._model_image_rows = model.tokens_per_image
        self.document = prompt.document(self._model_image_rows, self.tokens)
        self._num_rows = self._count_rows(model)
        if options.max_images:
            self._sampler_run(model)  # complain before anything is computed

        self.phase = Phase.PREFILL
        self.cached: CachedDocument | None = None
        self.branches: list[CachedDocument] = []
        """Rows of the branches that know less; in use while an image is drawn."""
        self.prefills: list[Prefill] = []
        self.wants_token = False
        """Whether the last row to be read predicts the next token."""
        self.token: int | None = None
        """The text token chosen last, while it has not been read."""
        self.generator = random_generator(options.seed, index, 0)
        last = prompt.parts[-1]
        self.stream = TextStream(tokenizer, options.stop_strings, last[-1:] if isinstance(last, list) else ())
        self.images: list[ContextImage] = []
        """All images so far, the prompt's first."""
        self.drawing: DenoiseState | None = None
        self.num_new_tokens = 0
        self.num_images = 0
        self.ending = ""
        """Why the text has ended, while images are still to be drawn."""
        self.started_at = time.perf_counter()

    def slot_counts(self) -> list[int]:
        """Rows of the cache to be kept for the answer: its document's, then each branch's."""
        return [-(-num_rows // ALIGNMENT) * ALIGNMENT for num_rows in self._most_rows()]

    def _most_rows(self) -> list[int]:
        options = self.options
        if not options.max_images or not options.is_guided:
            return [self._num_rows]
        nothing = len(self.tokens.bos) + len(self.negative_ids) + 1 + self.image_rows
        if options.image_guidance_scale is None:
            return [self._num_rows, nothing]
        images = self.prompt.num_image_rows(self._model_image_rows)
        images += (options.max_images - 1) * (self.image_rows + 2)
        # What the document holds itself, and the negative prompt
        return [self._num_rows, min(nothing + images, self._num_rows + len(self.negative_ids)), nothing]

    def _count_rows(self, model: "LMFusion") -> int:
        options, num_prompt = self.options, self.document.num_tokens
        image_rows = self.image_rows + 2  # with its markers
        limit = context_limit(model)
        most = num_prompt + options.max_new_tokens + options.max_images * image_rows
        if limit is None:
            return most
        num_negative = len(self.negative_ids)
        if num_negative and num_negative + image_rows > limit:
            raise ValueError(
                f"negative_prompt takes {num_negative} tokens and an image {image_rows}, but the model's context is "
                f"{limit}; shorten it"
            )
        if options.image_guidance_scale is not None:
            limit -= num_negative  # the branch that knows the images has it, too
        least = num_prompt + min(1, options.max_new_tokens) + self.min_images * image_rows
        if least > limit:
            raise ValueError(
                f"the prompt takes {num_prompt} tokens and the least answer {least - num_prompt} more, but the model's "
                f"context is {limit}; shorten one or the other"
            )
        return min(most, limit)

    @property
    def _room(self) -> int:
        """Rows that the document may still grow by."""
        assert self.cached is not None
        return self._num_rows - self.cached.length

    def text_room(self, num_ahead: int = 0) -> int:
        """Tokens of text that may still come, once `num_ahead` rows more have been read."""
        owed = max(0, self.min_images - self.num_images) * (self.image_rows + 2)
        return min(self.options.max_new_tokens - self.num_new_tokens, self._room - num_ahead - owed)

    @property
    def may_draw(self) -> bool:
        """Whether an image may come next."""
        return self.num_images < self.options.max_images and self._room >= self.image_rows + 2

    @property
    def owes_image(self) -> bool:
        return self.num_images < self.min_images and self.may_draw

    def start(self, images: list[ContextImage]) -> None:
        """Get ready to read the prompt, once there are rows for it; images: those in it."""
        assert self.cached is not None
        self.images = images
        self.prefills = [Prefill(self.cached, self.document, list(images))]
        self.wants_token = not self.options.draw_first and self.options.max_new_tokens > 0
        self.started_at = time.perf_counter()

    def begin_image(self, model: "LMFusion") -> None:
        """Get ready to draw: BOI, the branches' documents, and noise."""
        assert self.cached is not None
        options = self.options
        guidance = guidance_of(options, self.images, self.tokens, self.negative_ids)
        for cached in self.branches:
            cached.length = 0
        main = next((prefill for prefill in self.prefills if prefill.cached is self.cached), None)
        if main is None:
            main = Prefill(self.cached, Document())
            self.prefills.append(main)
        unread = [] if self.token is None else [self.token]
        main.document = main.document.text(unread).marker(self.tokens.boi_token_id)
        self.token = None
        self.prefills += [
            Prefill(cached, branch.document, branch.images)
            for cached, branch in zip(self._rows_of(guidance.branches), guidance.branches, strict=True)
        ]
        self.wants_token = False
        generator = random_generator(options.seed, self.index, 1 + self.num_images)
        run = self._sampler_run(model)
        x, numbers, noise_scales = torch.randn(self.latent_shape, generator=generator), None, []
        if isinstance(run, SchedulerRun):
            x = run.init_noise_sigma * x
        else:
            numbers = torch.cat([torch.tensor(run.timesteps, dtype=torch.float32)[:, None], run.coefficients], dim=1)
            noise_scales = run.coefficients[:, -1].tolist()
        x = upload(x, model.device)
        self.drawing = DenoiseState(
            run, numbers, noise_scales, generator, x, torch.zeros_like(x), guidance.weight, guidance.branches
        )
        self.phase = Phase.PREFILL

    def _rows_of(self, branches: Sequence[Branch]) -> list[CachedDocument]:
        """Ranges for `branches`: the first are the largest, as the branches that know most come first."""
        return self.branches[: len(branches)]

    def drawn_branches(self) -> list[tuple[CachedDocument, float]]:
        """Documents that take part in the next denoising step, with the weights of their predictions."""
        assert self.cached is not None and self.drawing is not None
        return [
            (self.cached, self.drawing.weight),
            *(
                (cached, branch.weight)
                for cached, branch in zip(self._rows_of(self.drawing.branches), self.drawing.branches, strict=True)
            ),
        ]

    def end_image(self) -> None:
        """Put the finished image into the document, without noise, as context of what follows."""
        assert self.cached is not None and self.drawing is not None
        image = ContextImage(self.drawing.x, self.image_rows)
        self.images.append(image)
        self.num_images += 1
        document = Document().image(self.image_rows).marker(self.tokens.eoi_token_id)
        self.prefills = [Prefill(self.cached, document, [image])]
        self.wants_token = not self.ending and self.text_room(self.image_rows + 1) > 0
        self.drawing = None
        self.phase = Phase.PREFILL

    def settings(self) -> dict[str, Any]:
        """What the image in the making is made with."""
        return {"prompt": self.prompt.text, **self.options.settings(), "index": self.index, "image": self.num_images}

    def _sampler_run(self, model: "LMFusion") -> StepTable | SchedulerRun:
        options = self.options
        if isinstance(options.sampler, str):
            return step_table(model.diffusion, options.sampler, options.num_steps, model.codec.latent_range)
        return SchedulerRun(options.sampler, model.diffusion, options.num_steps, model.codec.latent_range)


def _stop_ids(stop_strings: Sequence[str], control: Mapping[int, str]) -> set[int]:
    """Control tokens that stop strings begin with. They never show up in the text that is searched for stop strings."""
    ids = {token: token_id for token_id, token in control.items()}
    found = set()
    for stop in stop_strings:
        match = find_tokens(stop, ids)
        if match is not None and match.start() > 0:
            raise ValueError(
                f"stop_strings holds {stop!r}, which has text before the control token {match[0]!r}; give the text or "
                "the token alone"
            )
        if match is not None:
            found.add(ids[match[0]])
    return found


def latent_shape(model: "LMFusion", image_size: int | None) -> tuple[int, int, int]:
    """[C, h, w] of an image's latents. Raises ValueError for a size that the codec cannot make."""
    codec = model.codec
    image_size = codec.config.image_size if image_size is None else image_size
    if image_size < 1 or image_size % codec.downscale:
        raise ValueError(f"image_size is {image_size}; the codec makes positive multiples of {codec.downscale} pixels")
    size = image_size // codec.downscale
    return codec.latent_channels, size, size
