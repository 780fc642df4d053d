"""Engine: continuous batching of requests that generate text and images, over one key-value cache.

Requests join and leave between steps. A step advances every running request, in up to three forwards of the model:

    prefill   tokens that are known: prompts, BOI with the branches of guidance, finished images with EOI
    decode    one text token per document, by the text tower alone
    denoise   the tokens of the images, by the image tower alone; all branches of guidance in one forward

The forwards of text and of images share no weights, so one forward for both would save nothing.
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
"""Images that the autoencoder encodes or decodes at a time: it works at full size, which takes much memory."""
MAX_PREFILL_TOKENS = 16384
"""Most tokens of new prompts in one prefill, which bounds its working memory."""


class Engine:
    """Answers many requests at a time. One thread uses it: `submit`, then `step` while `has_work`.

    The model must be in evaluation mode. While the engine is used, its weights may be changed in place between steps,
    but not replaced: CUDA graphs hold their addresses.
    """

    plan: MemoryPlan
    """The memory that the engine holds."""
    limits: Limits

    def __init__(
        self,
        model: "LMFusion",
        *,
        num_slots: int | None = None,
        max_batch: int = 64,
        limits: Limits | None = None,
        use_graphs: bool | None = None,
    ) -> None:
        """num_slots: tokens that the key-value cache holds, of all running requests together; None: planned from the
        free memory. max_batch: requests that run at a time. use_graphs: replay CUDA graphs; None: on a GPU, unless the
        model is sharded.

        Raises ValueError for a model without tokenizer, for numbers below 1, or for graphs without a GPU.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.limits = limits or Limits()
        self.max_batch = max_batch
        self.plan = plan_memory(model, num_slots, max_batch)
        self._model = model
        if use_graphs is None and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            use_graphs = False  # gathering the weights of a sharded model cannot be recorded
        recorder = recorder_for(model.device, use_graphs)
        self._is_padded = recorder is not None
        # With CUDA graphs, batches are padded with documents in scratch slots; none of them is longer than one image
        self._cache = KeyValueCache(model, self.plan.num_slots, model.tokens_per_image if recorder else 0)
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
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have started and not ended."""
        return len(self._running)

    @property
    def running_ids(self) -> list[int]:
        """Their ids."""
        return list(self._running)

    @property
    def num_slots(self) -> int:
        """Slots of the key-value cache."""
        return self._cache.num_slots

    @property
    def num_slots_used(self) -> int:
        """Slots that running requests hold."""
        return self._cache.num_slots_used

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do, or events to return."""
        return bool(self._waiting or self._running or self._events)

    def submit(self, prompt: Prompt, options: GenerationOptions, *, index: int = 0) -> int:
        """Queue a request. Returns its id, which its events carry.

        index: distinguishes requests with the same seed; (seed, index) is the key of the random numbers.

        Raises ValueError for options beyond the limits, or an answer that could never fit the context or the cache.
        """
        self.limits.check(options, prompt.num_images)
        request = Request(self._model, next(self._ids), prompt, options, index)
        num_slots = sum(request.slot_counts())
        if num_slots > self.num_slots:
            raise ValueError(
                f"prompt and answer must fit the key-value cache of {self.num_slots} slots, got {num_slots}; ask for "
                "fewer images or tokens, or make the cache larger"
            )
        if options.preview_every:
            preview_map(self._model.codec)  # the first call fits it; servers make that call before they start
        self._waiting.append(request)
        return request.id

    def cancel(self, request_id: int) -> None:
        """End a request and free its slots of the cache at once; the next `step` returns its Done.

        Nothing happens if the request has ended already.
        """
        waiting = next((request for request in self._waiting if request.id == request_id), None)
        if waiting is not None:
            self._waiting.remove(waiting)
            self._events.append((request_id, _done(waiting, "cancelled")))
        elif request_id in self._running:
            self._finish(self._running[request_id], "cancelled")

    def step(self) -> list[tuple[int, Event]]:
        """Advance every running request by a token or a denoising step. Returns the events with their request ids.

        A request whose callback or scheduler raises, or whose numbers are not finite, ends with finish_reason "error";
        the others continue. What the model itself raises, such as out of memory, is raised.
        """
        with torch.no_grad():
            self._admit()
            # The phases are taken before the prefill changes them: a request whose prompt is prefilled in this step
            # starts to decode or to denoise in the next one. So no forward writes slots that another one of the same
            # step reads.
            running = list(self._running.values())
            prefill, decode, denoise = (
                [r for r in running if r.phase is phase] for phase in (Phase.PREFILL, Phase.DECODE, Phase.DENOISE)
            )
            # The previews of the step before: their copies had a whole step to arrive, so waiting for them costs
            # nothing
            previews = self._denoiser.take_previews()
            # All work of the step is queued first, and results are waited for afterwards. Waiting for a token before
            # the denoising step is queued would leave the device idle.
            sampled = self._prefill(prefill) + self._decode(decode)
            failed = self._denoiser.step(denoise)
            for requests, token_ids in sampled:
                for request, token_id in zip(requests, token_ids.wait().tolist(), strict=False):  # padding comes last
                    if request.id in self._running:  # a callback may have cancelled it
                        self._accept_token(request, token_id)
            for request, error in failed:
                self._finish(request, "error", error)
            for preview in previews:
                for request, event in preview.events():
                    if request.id in self._running and event is None:
                        self._finish(request, "error", _image_error(request))
                    elif event is not None and request.id in self._running:
                        self._events.append((request.id, event))
            self._finish_images(
                [r for r in denoise if r.id in self._running and r.denoising and r.denoising.is_finished]
            )
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Start waiting requests in their order, as long as there are slots for all that each may need.

        A request gets all its slots at once, so that none has to stop halfway for another one.
        """
        num_prefill = 0
        while self._waiting and self.num_running < self.max_batch:
            request = self._waiting[0]
            if num_prefill and num_prefill + request.document.num_tokens > MAX_PREFILL_TOKENS:
                return
            cached = self._cache.allocate(request.slot_counts())
            if cached is None:
                return
            num_prefill += request.document.num_tokens
            self._waiting.popleft()
            self._running[request.id] = request
            request.cached, request.branches = cached[0], cached[1:]
            try:
                request.start(self._context_images(request.prompt))
            except Exception as error:  # such as too large an image for the autoencoder's memory
                self._finish(request, "error", error)
                continue
            if not request.needs_token:
                self._image_or_end(request)

    def _context_images(self, prompt: Prompt) -> list[ContextImage]:
        """The images of a prompt in their order, encoded."""
        pixels = [image for image in prompt.images if isinstance(image, Tensor)]
        latents: list[Tensor] = []
        for start in range(0, len(pixels), CODEC_BATCH):
            batch = torch.stack(pixels[start : start + CODEC_BATCH])
            latents += self._model.codec.encode(upload(batch, self._cache.device))
        in_order = iter(latents)
        images = []
        for image in prompt.images:
            if isinstance(image, VisionInput):
                assert self._model.vision is not None
                [embeds] = self._model.vision.encode([image])
                images.append(ContextImage(embeds, image.num_tokens, is_vision=True))
            else:
                images.append(ContextImage(next(in_order), self._model.tokens_per_image))
        return images

    def _prefill(self, requests: Sequence[Request]) -> list[tuple[list[Request], HostCopy]]:
        """Put known tokens into the cache. Returns the tokens that follow, for the requests that need one."""
        if not requests:
            return []
        # Documents of the cache's layout must be in the order of their slots
        prefills = sorted((prefill for r in requests for prefill in r.prefills), key=lambda item: item.cached.start)
        x_text, x_image = self._embed(prefills)
        layout = self._cache.layout([p.cached for p in prefills], [p.document.spans for p in prefills])
        h_text, _ = self._model.run_layers(x_text, x_image, layout, self._cache.layers)

        ends = itertools.accumulate(len(prefill.document.token_ids) for prefill in prefills)
        last_token = {prefill.cached: end - 1 for prefill, end in zip(prefills, ends, strict=True)}
        # Only now: the layout above holds the lengths before these tokens
        for prefill in prefills:
            prefill.cached.length += prefill.document.num_tokens
        need_token = []
        for request in requests:
            request.prefills = []
            if request.needs_token:
                need_token.append(request)
            else:
                request.phase = Phase.DENOISE
        if not need_token:
            return []
        last = torch.tensor([last_token[request.cached] for request in need_token])  # type: ignore[index]
        logits = self._model.text_logits(h_text.index_select(0, upload(last, h_text.device)))
        params, is_greedy = self._sampling_params(need_token)
        params = SamplingParams(*(upload(numbers, logits.device) for numbers in params))
        return [(need_token, HostCopy(next_tokens(logits, params, is_greedy)))]

    def _embed(self, prefills: Sequence[Prefill]) -> tuple[Tensor, Tensor]:
        """Inputs of the text tower and of the image tower for `prefills`; images have no noise."""
        model, device = self._model, self._cache.device
        token_ids = torch.from_numpy(number_vision_tokens([prefill.document for prefill in prefills]))
        images = [image for prefill in prefills for image in prefill.images]
        vision = [image.data for image in images if image.is_vision]
        x_text = model.embed(upload(token_ids, device), torch.cat(vision) if vision else None)
        latents = [image.data for image in images if not image.is_vision]
        # Runs of equal shape, not all images of a shape: the tokens must stay in the order of the documents
        runs = [list(run) for _, run in itertools.groupby(latents, key=lambda x: x.shape)]
        x_image = [
            model.encode_images(torch.stack(run), torch.zeros(len(run), dtype=torch.int64, device=device))[0]
            for run in runs
        ]
        return x_text, torch.cat(x_image) if x_image else x_text.new_empty(0, model.config.image_hidden_size)

    def _decode(self, requests: Sequence[Request]) -> list[tuple[list[Request], HostCopy]]:
        """Put the last token of each request into the cache. Returns the tokens that follow."""
        if not requests:
            return []
        batch = sorted(requests, key=lambda request: request.cached.start)  # type: ignore[union-attr]
        documents = [request.cached for request in batch if request.cached is not None]
        num_padding = next_power_of_two(len(batch)) - len(batch) if self._is_padded else 0
        layout = self._cache.layout(
            [*documents, *[self._cache.scratch] * num_padding], [[("text", 1)]] * (len(batch) + num_padding)
        )
        token_ids = torch.tensor([request.pending_token for request in batch] + [0] * num_padding)
        params, is_greedy = self._sampling_params(batch, num_padding)
        following = self._decode_step(token_ids, layout, params, is_greedy)
        for document in documents:
            document.length += 1
        return [(batch, HostCopy(following))]

    def _sampling_params(self, requests: Sequence[Request], num_padding: int = 0) -> tuple[SamplingParams, bool]:
        """The sampling parameters of each request, on the host, and whether all of them are greedy."""
        vocab_size = self._model.boi_token_id
        values = []
        for request in requests:
            options, temperature = request.options, request.options.text_temperature
            allow_boi = float(request.can_start_image)
            # From the request's own generator, one number per token, so that its text does not depend on the batch
            uniform = float(torch.rand((), generator=request.generator)) if temperature else 0.0
            values.append((allow_boi, temperature, options.top_p, options.top_k or vocab_size + 1, uniform))
        is_greedy = all(temperature == 0 for _, temperature, *_ in values)
        values += values[:1] * num_padding
        return SamplingParams(*torch.tensor(list(zip(*values, strict=True)), dtype=torch.float32)), is_greedy

    def _accept_token(self, request: Request, token_id: int) -> None:
        """Continue from a sampled token: it is text, begins an image, or ends the answer."""
        request.pending_token = None
        if token_id == NO_TOKEN:
            self._finish(request, "error", text_error())
        elif token_id == self._model.boi_token_id:
            self._start_image(request)
        elif token_id in self._end_ids or token_id in request.stop_ids:
            if request.needs_image:
                self._start_image(request)
            else:
                self._finish(request, "stop")
        else:
            request.num_new_tokens += 1
            self._emit_text(request, request.stream.push(token_id))
            request.pending_token, request.phase = token_id, Phase.DECODE
            if request.stream.is_stopped or request.text_room() <= 0:
                request.end_reason = "stop" if request.stream.is_stopped else "length"
                self._image_or_end(request)

    def _image_or_end(self, request: Request) -> None:
        """When no text can follow: start the next image that is still needed, or end the answer."""
        if request.needs_image:
            self._start_image(request)
        else:
            self._finish(request, request.end_reason or ("length" if request.options.max_new_tokens else "stop"))

    def _start_image(self, request: Request) -> None:
        self._emit_text(request, request.stream.finish())
        request.start_image(self._model)
        assert request.denoising is not None
        side = self._model.codec.downscale * request.latent_shape[-1]
        num_steps = len(request.denoising.run.timesteps)
        self._events.append((request.id, ImageBegin(request.num_images, side, side, num_steps)))

    def _finish_images(self, requests: Sequence[Request]) -> None:
        """Decode finished images, and prepare their prefill if the answer continues."""
        by_shape = sorted(requests, key=lambda request: request.latent_shape)
        for _, run in itertools.groupby(by_shape, key=lambda request: request.latent_shape):
            finished = list(run)
            images: list[Image.Image] = []
            is_finite: list[bool] = []
            for start in range(0, len(finished), CODEC_BATCH):
                latents = [r.denoising.x for r in finished[start : start + CODEC_BATCH] if r.denoising is not None]
                pixels = self._model.codec.decode(torch.stack(latents))
                checked = HostCopy(are_finite(latents, pixels))
                images += to_pil(pixels)
                is_finite += checked.wait().tolist()  # to_pil has waited for the images already
            for request, image, is_image in zip(finished, images, is_finite, strict=True):
                if not is_image:
                    self._finish(request, "error", _image_error(request))
                    continue
                self._events.append((request.id, ImageEnd(request.num_images, image, request.settings())))
                request.finish_image()
                if not request.needs_token:
                    self._image_or_end(request)

    def _emit_text(self, request: Request, text: str) -> None:
        if text:
            self._events.append((request.id, TextDelta(text)))

    def _finish(self, request: Request, reason: str, error: Exception | None = None) -> None:
        if self._running.pop(request.id, None) is None:
            return  # it has ended already; freeing its slots twice would give them to two requests
        self._emit_text(request, request.stream.finish())
        self._cache.free([document for document in (request.cached, *request.branches) if document is not None])
        self._events.append((request.id, _done(request, reason, error)))


def _image_error(request: Request) -> Exception:
    assert request.denoising is not None
    return image_error(request.num_images, request.options.sampler, len(request.denoising.run.timesteps))


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
