"""Request: the state of one answer in the engine, with its phase, its slots of the cache and its image so far."""

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
    """Puts tokens that are known already into the cache: the prompt, a BOI, a finished image."""
    DECODE = "decode"
    """Puts the last text token into the cache and samples the next one."""
    DENOISE = "denoise"
    """Takes a denoising step of its image."""


@dataclass(eq=False)
class Prefill:
    """Known tokens that wait to be put into the cache."""

    cached: CachedDocument
    document: Document
    images: list[ContextImage] = field(default_factory=list)
    """The images in the document."""


@dataclass(eq=False)
class DenoiseState:
    """The state of an image that is being denoised."""

    run: StepTable | SchedulerRun
    numbers: Tensor | None
    """For a table: float32 [num_steps, 7] on the CPU, timestep and coefficients of each step."""
    noise_scales: list[float]
    """For a table: how much noise each step adds."""
    generator: torch.Generator
    x: Tensor
    """[C, h, w] on the device; noise at first."""
    x0: Tensor
    """[C, h, w]: the clean image that the last step predicted."""
    weight: float
    """Of the branch with the whole prompt."""
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
    """The state of one answer. The engine advances it."""

    def __init__(
        self, model: "LMFusion", request_id: int, prompt: Prompt, options: GenerationOptions, index: int
    ) -> None:
        """index: with the seed, the key of the answer's random numbers.

        Raises ValueError for an image size that codec or patch coder cannot make, a number of steps or a scheduler that
        does not fit the diffusion, a stop string with text before a control token, or a prompt that leaves no room for
        an answer.
        """
        tokenizer = require_tokenizer(model)
        self.stop_ids = _stop_ids(options.stop_strings, control_tokens(tokenizer))
        """Control tokens that end the answer."""
        self.id = request_id
        self.options = options
        self.index = index
        self.prompt = prompt
        self.latent_shape = latent_shape(model, options.image_size)
        self.num_image_tokens = model.image.patch_coder.tokens_per_image(*self.latent_shape[1:])
        self.min_images = max(options.min_images, int(options.draw_first))
        self.tokens = SpecialTokens.of(tokenizer, model.boi_token_id)
        negative = (options.negative_prompt or "").strip() if options.max_images else ""
        self.negative_ids = encode_caption(tokenizer, negative) if negative else []
        self._num_input_image_tokens = model.tokens_per_image
        self.document = prompt.document(self._num_input_image_tokens, self.tokens)
        self._max_length = self._document_limit(model)
        """Most tokens of the document, prompt and answer."""
        if options.max_images:
            self._sampler_run(model)  # raises before anything is computed

        self.phase = Phase.PREFILL
        self.cached: CachedDocument | None = None
        self.branches: list[CachedDocument] = []
        """Documents of the other branches of guidance; in use while an image is denoised."""
        self.prefills: list[Prefill] = []
        self.needs_token = False
        """Whether the last token of the prefill predicts a text token that is to be sampled."""
        self.pending_token: int | None = None
        """The text token sampled last, until it is in the cache."""
        # One generator for the text and another one for each image: how much text there is does not change the images
        self.generator = random_generator(options.seed, index, 0)
        last = prompt.parts[-1]
        self.stream = TextStream(tokenizer, options.stop_strings, last[-1:] if isinstance(last, list) else ())
        self.images: list[ContextImage] = []
        """All images so far, those of the prompt first."""
        self.denoising: DenoiseState | None = None
        self.num_new_tokens = 0
        self.num_images = 0
        self.end_reason = ""
        """Why the text has ended, while images are still to be generated; "" before that."""
        self.started_at = time.perf_counter()

    def slot_counts(self) -> list[int]:
        """Slots of the cache that the answer needs at most: those of its document, then those of each other branch."""
        return [-(-length // ALIGNMENT) * ALIGNMENT for length in self._max_lengths()]

    def _max_lengths(self) -> list[int]:
        options = self.options
        if not options.max_images or not options.is_guided:
            return [self._max_length]
        nothing = len(self.tokens.bos) + len(self.negative_ids) + 1 + self.num_image_tokens
        if options.image_guidance_scale is None:
            return [self._max_length, nothing]
        images = self.prompt.num_image_tokens(self._num_input_image_tokens)
        images += (options.max_images - 1) * (self.num_image_tokens + 2)
        # The branch with the images has no more than the whole document and the negative prompt
        return [self._max_length, min(nothing + images, self._max_length + len(self.negative_ids)), nothing]

    def _document_limit(self, model: "LMFusion") -> int:
        options, num_prompt = self.options, self.document.num_tokens
        num_image_tokens = self.num_image_tokens + 2  # with its markers
        limit = context_limit(model)
        most = num_prompt + options.max_new_tokens + options.max_images * num_image_tokens
        if limit is None:
            return most
        num_negative = len(self.negative_ids)
        if num_negative and num_negative + num_image_tokens > limit:
            raise ValueError(
                f"negative_prompt must leave room for an image of {num_image_tokens} tokens in the model's context of "
                f"{limit}, got {num_negative} tokens; shorten it"
            )
        if options.image_guidance_scale is not None:
            limit -= num_negative  # the branch with the images holds it, too
        least = num_prompt + min(1, options.max_new_tokens) + self.min_images * num_image_tokens
        if least > limit:
            raise ValueError(
                f"the prompt and the shortest answer must fit the model's context of {limit} tokens, got {num_prompt} "
                f"and {least - num_prompt} tokens; shorten the prompt or ask for less"
            )
        return min(most, limit)

    @property
    def _room(self) -> int:
        """Tokens that the document may still grow by."""
        assert self.cached is not None
        return self._max_length - self.cached.length

    def text_room(self, num_ahead: int = 0) -> int:
        """Text tokens that may still come, once `num_ahead` more tokens are in the cache."""
        reserved = max(0, self.min_images - self.num_images) * (self.num_image_tokens + 2)
        return min(self.options.max_new_tokens - self.num_new_tokens, self._room - num_ahead - reserved)

    @property
    def can_start_image(self) -> bool:
        """Whether an image may come next."""
        return self.num_images < self.options.max_images and self._room >= self.num_image_tokens + 2

    @property
    def needs_image(self) -> bool:
        """Whether an image must come before the answer may end."""
        return self.num_images < self.min_images and self.can_start_image

    def start(self, images: list[ContextImage]) -> None:
        """Prepare the prefill of the prompt, once there are slots for it. images: those in the prompt."""
        assert self.cached is not None
        self.images = images
        self.prefills = [Prefill(self.cached, self.document, list(images))]
        self.needs_token = not self.options.draw_first and self.options.max_new_tokens > 0
        self.started_at = time.perf_counter()

    def start_image(self, model: "LMFusion") -> None:
        """Prepare the next image: the prefill of BOI and of the other branches, and the noise."""
        assert self.cached is not None
        options = self.options
        guidance = guidance_of(options, self.images, self.tokens, self.negative_ids)
        # The other branches start again for each image: their slots are reused, whatever the last image left in them
        for cached in self.branches:
            cached.length = 0
        # A prefill of the document may be waiting already, such as the end of the image before: BOI is added to it
        main = next((prefill for prefill in self.prefills if prefill.cached is self.cached), None)
        if main is None:
            main = Prefill(self.cached, Document())
            self.prefills.append(main)
        pending = [] if self.pending_token is None else [self.pending_token]
        main.document = main.document.text(pending).marker(self.tokens.boi_token_id)
        self.pending_token = None
        self.prefills += [
            Prefill(cached, branch.document, branch.images)
            for cached, branch in zip(self._documents_of(guidance.branches), guidance.branches, strict=True)
        ]
        self.needs_token = False
        generator = random_generator(options.seed, self.index, 1 + self.num_images)
        run = self._sampler_run(model)
        x, numbers, noise_scales = torch.randn(self.latent_shape, generator=generator), None, []
        if isinstance(run, SchedulerRun):
            x = run.init_noise_sigma * x
        else:
            numbers = torch.cat([torch.tensor(run.timesteps, dtype=torch.float32)[:, None], run.coefficients], dim=1)
            noise_scales = run.coefficients[:, -1].tolist()
        x = upload(x, model.device)
        self.denoising = DenoiseState(
            run, numbers, noise_scales, generator, x, torch.zeros_like(x), guidance.weight, guidance.branches
        )
        self.phase = Phase.PREFILL

    def _documents_of(self, branches: Sequence[Branch]) -> list[CachedDocument]:
        """The documents of `branches`. The largest come first, as do the branches with the most context."""
        return self.branches[: len(branches)]

    def branch_weights(self) -> list[tuple[CachedDocument, float]]:
        """The documents of the next denoising step, with the weights of their predictions; that of the whole prompt
        first."""
        assert self.cached is not None and self.denoising is not None
        return [
            (self.cached, self.denoising.weight),
            *(
                (cached, branch.weight)
                for cached, branch in zip(
                    self._documents_of(self.denoising.branches), self.denoising.branches, strict=True
                )
            ),
        ]

    def finish_image(self) -> None:
        """Prepare the prefill of the finished image, without noise, as the context of what follows."""
        assert self.cached is not None and self.denoising is not None
        image = ContextImage(self.denoising.x, self.num_image_tokens)
        self.images.append(image)
        self.num_images += 1
        document = Document().image(self.num_image_tokens).marker(self.tokens.eoi_token_id)
        self.prefills = [Prefill(self.cached, document, [image])]
        self.needs_token = not self.end_reason and self.text_room(self.num_image_tokens + 1) > 0
        self.denoising = None
        self.phase = Phase.PREFILL

    def settings(self) -> dict[str, Any]:
        """The settings of the current image, as JSON values."""
        return {"prompt": self.prompt.text, **self.options.settings(), "index": self.index, "image": self.num_images}

    def _sampler_run(self, model: "LMFusion") -> StepTable | SchedulerRun:
        options = self.options
        if isinstance(options.sampler, str):
            return step_table(model.diffusion, options.sampler, options.num_steps, model.codec.latent_range)
        return SchedulerRun(options.sampler, model.diffusion, options.num_steps, model.codec.latent_range)


def _stop_ids(stop_strings: Sequence[str], control: Mapping[int, str]) -> set[int]:
    """Control tokens that stop strings begin with. They never appear in the text that is searched for stop strings."""
    ids = {token: token_id for token_id, token in control.items()}
    found = set()
    for stop in stop_strings:
        match = find_tokens(stop, ids)
        if match is not None and match.start() > 0:
            raise ValueError(
                f"stop_strings must not have text before a control token, got {stop!r} with the control token "
                f"{match[0]!r}; give the text or the token alone"
            )
        if match is not None:
            found.add(ids[match[0]])
    return found


def latent_shape(model: "LMFusion", image_size: int | None) -> tuple[int, int, int]:
    """[C, h, w] of an image's latents. Raises ValueError for a size that the codec cannot make."""
    codec = model.codec
    image_size = codec.config.image_size if image_size is None else image_size
    if image_size < 1 or image_size % codec.downscale:
        raise ValueError(f"image_size must be a positive multiple of {codec.downscale} pixels, got {image_size}")
    size = image_size // codec.downscale
    return codec.latent_channels, size, size
