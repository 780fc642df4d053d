"""How do many answers come about side by side? Requests join and leave between steps; one buffer holds what was read.

A step of the engine moves every running request on, in up to three forwards of the model:

    read      prompts, BOI with the branches of guidance, finished images with EOI: what is known and new
    decode    one text row a document: the text tower alone
    denoise   the images' rows: the image tower alone; all branches of guidance in one forward

The forwards of text and of images share no weight, so one for both would save nothing.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor

from lmfusion.generation.async_copy import HostCopy, upload
from lmfusion.generation.cache import KeyValueCache
from lmfusion.generation.decoding import NO_TOKEN, SamplingParams, next_tokens
from lmfusion.generation.denoising import Denoiser, next_power_of_two
from lmfusion.generation.device_steps import decode_step
from lmfusion.generation.events import Done, Event, ImageBegin, ImageEnd, TextDelta
from lmfusion.generation.graphs import ReplayedStep, recorder_for
from lmfusion.generation.guidance import ContextImage
from lmfusion.generation.memory import MemoryPlan, plan_memory
from lmfusion.generation.options import GenerationOptions, Limits
from lmfusion.generation.previews import preview_map
from lmfusion.generation.prompt import Prompt, context_limit, end_token_ids
from lmfusion.generation.request import Phase, Prefill, Request
from lmfusion.images.preprocessing import to_pil
from lmfusion.model.batch import number_vision_tokens
from lmfusion.model.vision import VisionInput
from lmfusion.utils.finite import are_finite, image_error, text_error

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

CODEC_BATCH = 8
"""Images that the autoencoder codes at a time: its working memory is that of a network on full-size images."""
MAX_READ_ROWS = 16384
"""Rows of new prompts read in one forward at most, so that its working memory stays bounded."""


class Engine:
    """Answers requests, many at a time. One thread uses it: submit, then `step` while `has_work`.

    The model is to be in evaluation mode and stays as it is for as long as the engine is used (weights may be changed
    in place between steps).
    """

    plan: MemoryPlan
    """What the engine holds, and what a step takes beside it."""
    limits: Limits

    def __init__(
        self,
        model: "LMFusion",
        *,
        num_rows: int | None = None,
        max_batch: int = 64,
        limits: Limits | None = None,
        use_graphs: bool | None = None,
    ) -> None:
        """num_rows: tokens that the key-value cache holds, of all running requests together; None: what fits well.
        max_batch: requests that run at a time. use_graphs: replay CUDA graphs; None: on a GPU, unless the model is
        sharded.

        Raises ValueError for a model without tokenizer, for numbers below 1, or for graphs without a GPU.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1")
        self.limits = limits or Limits()
        self.max_batch = max_batch
        self.plan = plan_memory(model, num_rows, max_batch)
        self._model = model
        if use_graphs is None and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            use_graphs = False  # gathering the weights of a sharded model is not recorded
        recorder = recorder_for(model.device, use_graphs)
        self._is_padded = recorder is not None
        self._cache = KeyValueCache(model, self.plan.num_rows, model.tokens_per_image if recorder else 0)
        self._denoiser = Denoiser(model, self._cache, recorder)
        self._decode_step = ReplayedStep(
            partial(decode_step, model, self._cache),
            self._cache.device,
            recorder,
            longest_document=context_limit(model),
        )
        self._end_ids = end_token_ids(model)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._events: list[tuple[int, Event]] = []
        self._ids = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running_ids(self) -> list[int]:
        """Requests that have begun and not ended."""
        return list(self._running)

    @property
    def num_rows(self) -> int:
        """Rows of the key-value cache."""
        return self._cache.num_rows

    @property
    def num_rows_used(self) -> int:
        return self._cache.num_rows_used

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._waiting or self._running or self._events)

    def submit(self, prompt: Prompt, options: GenerationOptions, *, index: int = 0) -> int:
        """Queue a request; its id comes with its events. index: makes chance differ between prompts of one seed.

        Raises ValueError for options beyond the limits, or an answer that could never fit the context or the cache.
        """
        self.limits.check(options, prompt.num_images)
        request = Request(self._model, next(self._ids), prompt, options, index)
        num_rows = sum(request.slot_counts())
        if num_rows > self.num_rows:
            raise ValueError(
                f"the prompt and its answer may take {num_rows} rows of the key-value cache, which has "
                f"{self.num_rows}; ask for fewer images or tokens, or make the cache larger"
            )
        if options.preview_every:
            preview_map(self._model.codec)  # fitted at the first call; servers make it before they begin
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request and free its rows of the cache at once; `step` tells so. One that has ended is left alone."""
        waiting = next((request for request in self._waiting if request.id == request_id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
            self._events.append((request_id, _done(waiting, "cancelled")))
        elif request_id in self._running:
            self._finish(self._running[request_id], "cancelled")

    def step(self) -> list[tuple[int, Event]]:
        """Move every running request on by a token or a denoising step; answers with what happened, by request id.

        A request whose callback or scheduler raises, or whose numbers are not finite, ends with finish_reason "error";
        the others go on. Whatever the model itself raises (out of memory) is raised.
        """
        with torch.no_grad():
            self._admit()
            running = list(self._running.values())
            prefill, writing, drawing = (
                [r for r in running if r.phase is phase] for phase in (Phase.PREFILL, Phase.DECODE, Phase.DENOISE)
            )
            previews = self._denoiser.take_previews()
            chosen = self._read(prefill) + self._decode(writing)
            failed = self._denoiser.step(drawing)
            # What has to be waited for comes last: the device is busy with the drawings meanwhile
            for requests, token_ids in chosen:
                for request, token_id in zip(requests, token_ids.wait().tolist(), strict=False):  # padding comes after
                    if request.id in self._running:  # callbacks may cancel
                        self._accept(request, token_id)
            for request, error in failed:
                self._finish(request, "error", error)
            for preview in previews:
                for request, picture in preview.events():
                    if request.id in self._running and picture is None:
                        self._finish(request, "error", _image_error(request))
                    elif picture is not None and request.id in self._running:
                        self._events.append((request.id, picture))
            self._end_images([r for r in drawing if r.id in self._running and r.drawing and r.drawing.is_finished])
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Let waiting requests begin, in their order, as long as there is room for all that they may need."""
        num_read = 0
        while self._waiting and self.num_running < self.max_batch:
            request = self._waiting[0]
            if num_read and num_read + request.document.num_tokens > MAX_READ_ROWS:
                return
            cached = self._cache.allocate(request.slot_counts())
            if cached is None:
                return
            num_read += request.document.num_tokens
            self._waiting.popleft()
            self._running[request.id] = request
            request.cached, request.branches = cached[0], cached[1:]
            try:
                request.start(self._context_images(request.prompt))
            except Exception as error:  # such as too large an image for the autoencoder's memory
                self._finish(request, "error", error)
                continue
            if not request.wants_token:
                self._continue_without_text(request)

    def _context_images(self, prompt: Prompt) -> list[ContextImage]:
        """A prompt's images in their order, encoded."""
        pixels = [image for image in prompt.images if isinstance(image, Tensor)]
        latents: list[Tensor] = []
        for start in range(0, len(pixels), CODEC_BATCH):
            few = torch.stack(pixels[start : start + CODEC_BATCH])
            latents += self._model.codec.encode(upload(few, self._cache.device))
        in_order = iter(latents)
        images = []
        for image in prompt.images:
            if isinstance(image, VisionInput):
                assert self._model.vision is not None
                [rows] = self._model.vision.encode([image])
                images.append(ContextImage(rows, image.num_tokens, is_seen=True))
            else:
                images.append(ContextImage(next(in_order), self._model.tokens_per_image))
        return images

    def _read(self, requests: Sequence[Request]) -> list[tuple[list[Request], HostCopy]]:
        """Read what is known; answers with the tokens that follow, where one is wanted."""
        if not requests:
            return []
        prefills = sorted((prefill for r in requests for prefill in r.prefills), key=lambda item: item.cached.start)
        x_text, x_image = self._rows_of(prefills)
        layout = self._cache.layout([r.cached for r in prefills], [r.document.spans for r in prefills])
        h_text, _ = self._model.run_layers(x_text, x_image, layout, self._cache.layers)

        ends = itertools.accumulate(len(prefill.document.token_ids) for prefill in prefills)
        last_row = {prefill.cached: end - 1 for prefill, end in zip(prefills, ends, strict=True)}
        for prefill in prefills:
            prefill.cached.length += prefill.document.num_tokens
        asking = []
        for request in requests:
            request.prefills = []
            if request.wants_token:
                asking.append(request)
            else:
                request.phase = Phase.DENOISE
        if not asking:
            return []
        rows = torch.tensor([last_row[request.cached] for request in asking])  # type: ignore[index]
        logits = self._model.text_logits(h_text.index_select(0, upload(rows, h_text.device)))
        choice, is_greedy = self._choice(asking)
        choice = SamplingParams(*(upload(numbers, logits.device) for numbers in choice))
        return [(asking, HostCopy(next_tokens(logits, choice, is_greedy)))]

    def _rows_of(self, prefills: Sequence[Prefill]) -> tuple[Tensor, Tensor]:
        """Rows of both towers that `prefills` begin with, images without noise."""
        model, device = self._model, self._cache.device
        token_ids = torch.from_numpy(number_vision_tokens([prefill.document for prefill in prefills]))
        images = [image for prefill in prefills for image in prefill.images]
        seen = [image.data for image in images if image.is_seen]
        x_text = model.embed(upload(token_ids, device), torch.cat(seen) if seen else None)
        latents = [image.data for image in images if not image.is_seen]
        runs = [list(run) for _, run in itertools.groupby(latents, key=lambda x: x.shape)]
        rows = [
            model.encode_images(torch.stack(run), torch.zeros(len(run), dtype=torch.int64, device=device))[0]
            for run in runs
        ]
        return x_text, torch.cat(rows) if rows else x_text.new_empty(0, model.config.image_hidden_size)

    def _decode(self, requests: Sequence[Request]) -> list[tuple[list[Request], HostCopy]]:
        """Read the token chosen last of each request; answers with those that follow."""
        if not requests:
            return []
        batch = sorted(requests, key=lambda request: request.cached.start)  # type: ignore[union-attr]
        documents = [request.cached for request in batch if request.cached is not None]
        num_padding = next_power_of_two(len(batch)) - len(batch) if self._is_padded else 0
        layout = self._cache.layout(
            [*documents, *[self._cache.scratch] * num_padding], [[("text", 1)]] * (len(batch) + num_padding)
        )
        token_ids = torch.tensor([request.token for request in batch] + [0] * num_padding)
        choice, is_greedy = self._choice(batch, num_padding)
        following = self._decode_step(token_ids, layout, choice, is_greedy)
        for document in documents:
            document.length += 1
        return [(batch, HostCopy(following))]

    def _choice(self, requests: Sequence[Request], num_padding: int = 0) -> tuple[SamplingParams, bool]:
        """How each request chooses its next token, in tensors on the host, and whether all take the likeliest."""
        vocab_size = self._model.boi_token_id
        rows = []
        for request in requests:
            options, temperature = request.options, request.options.text_temperature
            allow_boi = float(request.may_draw)
            uniform = float(torch.rand((), generator=request.generator)) if temperature else 0.0
            rows.append((allow_boi, temperature, options.top_p, options.top_k or vocab_size + 1, uniform))
        is_greedy = all(row[1] == 0 for row in rows)
        rows += rows[:1] * num_padding
        return SamplingParams(*torch.tensor(list(zip(*rows, strict=True)), dtype=torch.float32)), is_greedy

    def _accept(self, request: Request, token_id: int) -> None:
        """Go on from the token that was chosen: text, the beginning of an image, or the end."""
        request.token = None
        if token_id == NO_TOKEN:
            self._finish(request, "error", text_error())
        elif token_id == self._model.boi_token_id:
            self._begin_image(request)
        elif token_id in self._end_ids or token_id in request.stop_ids:
            if request.owes_image:
                self._begin_image(request)
            else:
                self._finish(request, "stop")
        else:
            request.num_new_tokens += 1
            self._tell_text(request, request.stream.push(token_id))
            request.token, request.phase = token_id, Phase.DECODE
            if request.stream.is_stopped or request.text_room() <= 0:
                request.ending = "stop" if request.stream.is_stopped else "length"
                self._continue_without_text(request)

    def _continue_without_text(self, request: Request) -> None:
        """Where no text can follow: draw what is still to be drawn, or end."""
        if request.owes_image:
            self._begin_image(request)
        else:
            self._finish(request, request.ending or ("length" if request.options.max_new_tokens else "stop"))

    def _begin_image(self, request: Request) -> None:
        self._tell_text(request, request.stream.finish())
        request.begin_image(self._model)
        assert request.drawing is not None
        side = self._model.codec.downscale * request.latent_shape[-1]
        num_steps = len(request.drawing.run.timesteps)
        self._events.append((request.id, ImageBegin(request.num_images, side, side, num_steps)))

    def _end_images(self, requests: Sequence[Request]) -> None:
        """Decode finished images, and put them into their documents where the answer goes on."""
        by_shape = sorted(requests, key=lambda request: request.latent_shape)
        for _, run in itertools.groupby(by_shape, key=lambda request: request.latent_shape):
            finished = list(run)
            images: list[Image.Image] = []
            is_finite: list[bool] = []
            for start in range(0, len(finished), CODEC_BATCH):
                latents = [r.drawing.x for r in finished[start : start + CODEC_BATCH] if r.drawing is not None]
                pixels = self._model.codec.decode(torch.stack(latents))
                checked = HostCopy(are_finite(latents, pixels))
                images += to_pil(pixels)
                is_finite += checked.wait().tolist()  # no extra wait: the images were just waited for
            for request, image, is_image in zip(finished, images, is_finite, strict=True):
                if not is_image:
                    self._finish(request, "error", _image_error(request))
                    continue
                self._events.append((request.id, ImageEnd(request.num_images, image, request.settings())))
                request.end_image()
                if not request.wants_token:
                    self._continue_without_text(request)

    def _tell_text(self, request: Request, text: str) -> None:
        if text:
            self._events.append((request.id, TextDelta(text)))

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        if self._running.pop(request.id, None) is None:  # it has ended before
            return
        self._tell_text(request, request.stream.finish())
        self._cache.free([document for document in (request.cached, *request.branches) if document is not None])
        self._events.append((request.id, _done(request, reason, error)))


def _image_error(request: Request) -> Exception:
    assert request.drawing is not None
    return image_error(request.num_images, request.options.sampler, len(request.drawing.run.timesteps))


def _done(request: Request, reason: str, error: Exception | None = None) -> Done:
    return Done(
        finish_reason=reason,
        num_prompt_tokens=request.document.num_tokens,
        num_new_tokens=request.num_new_tokens,
        num_images=request.num_images,
        seconds=time.perf_counter() - request.started_at if request.cached is not None else 0.0,
        error=f"{type(error).__name__}: {error}" if error is not None else "",
        exception=error,
    )
