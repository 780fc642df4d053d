"""How do images of different requests, at different steps of different samplers, take a step together?

Images of one size go through the image tower in one forward, with all their branches of guidance. Which documents these
are seldom changes from step to step, so their layout is kept. Where steps are replayed as CUDA graphs, images and
documents are padded to powers of two, so that few graphs do for batches of every size.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lmfusion.generation.async_copy import HostCopy, upload
from lmfusion.generation.cache import CachedDocument, KeyValueCache
from lmfusion.generation.device_steps import Branching, denoise_step, predict_step
from lmfusion.generation.events import ImagePreview
from lmfusion.generation.graphs import Recorder, ReplayedStep
from lmfusion.generation.guidance import MAX_BRANCHES
from lmfusion.generation.previews import preview_image, preview_map, to_rgb
from lmfusion.generation.prompt import context_limit
from lmfusion.generation.request import DenoiseState, Request
from lmfusion.generation.samplers import SchedulerRun
from lmfusion.utils.finite import are_finite
from lmfusion_kernels.layout.token_layout import TokenLayout

if TYPE_CHECKING:
    from lmfusion.model.modeling import LMFusion

NUM_KEPT = 8
"""Layouts that are kept: a batch alternates between a few, with and without guidance."""


class Previews(NamedTuple):
    """What the images of a batch would be if they were finished now."""

    pixels: HostCopy
    """uint8 [n, h, w, 3]"""
    requests: list[Request]
    is_finite: HostCopy
    """bool [n]"""
    frames: list[tuple[int, int, int, int]]
    """(index, step, num_steps, pixels a side) of each"""

    def events(self) -> Iterator[tuple[Request, ImagePreview | None]]:
        """One a picture; None for one whose numbers are not finite. Waits for the pixels."""
        pictures = zip(self.pixels.wait(), self.is_finite.wait().tolist(), self.requests, self.frames, strict=True)
        for pixels, is_finite, request, (index, step, num_steps, size) in pictures:
            picture = ImagePreview(index, step, num_steps, preview_image(pixels, size)) if is_finite else None
            yield request, picture


class _Rows(NamedTuple):
    """Where the images of a batch stand in the cache, and how their branches belong together."""

    layout: TokenLayout
    branching: Branching | None
    num_images: int
    """Of the batch and those that pad it."""


class Denoiser:
    """Takes the denoising steps of requests that draw."""

    def __init__(self, model: "LMFusion", cache: KeyValueCache, recorder: Recorder | None) -> None:
        """recorder: of CUDA graphs; None: every step is launched anew."""
        self._model = model
        self._cache = cache
        self._is_padded = recorder is not None
        self.denoise, self.predict = (
            ReplayedStep(partial(step, model, cache), cache.device, recorder, longest_document=context_limit(model))
            for step in (denoise_step, predict_step)
        )
        self._kept: OrderedDict[Hashable, _Rows] = OrderedDict()
        self._previews: list[Previews] = []

    def step(self, requests: Sequence[Request]) -> list[tuple[Request, Exception]]:
        """Move the drawing of each request on by a step; answers with those whose own code failed, and how."""
        failures: list[tuple[Request, Exception]] = []
        for batch in _batches(requests):
            rows = self._rows(batch)
            if isinstance(_drawing(batch[0]).run, SchedulerRun):
                failures += self._scheduled_step(batch, rows)
            else:
                self._table_step([_drawing(request) for request in batch], rows)
            failed = {request.id for request, _ in failures}
            for request in batch:
                _drawing(request).step += 1
                if request.options.callback_on_step_end is not None and request.id not in failed:
                    failures += _attempt(request, partial(_call_back, request))
            self._begin_previews(batch)
        return failures

    def take_previews(self) -> list["Previews"]:
        """The previews of the steps so far, each given out once. They may still be on their way from the device."""
        taken, self._previews = self._previews, []
        return taken

    def _table_step(self, drawings: Sequence[DenoiseState], rows: _Rows) -> None:
        """The next step of images whose samplers are tables of coefficients."""
        rows_of_numbers = [drawing.numbers[drawing.step] for drawing in drawings]  # type: ignore[index]
        noise = [
            torch.randn(drawing.x.shape, generator=drawing.generator)
            if drawing.noise_scales[drawing.step]
            else torch.zeros(drawing.x.shape)
            for drawing in drawings
        ]
        x, x0 = self.denoise(
            _stacked([drawing.x for drawing in drawings], rows.num_images),
            _stacked([drawing.x0 for drawing in drawings], rows.num_images),
            _stacked(noise, rows.num_images),
            _stacked(rows_of_numbers, rows.num_images),
            rows.layout,
            rows.branching,
            self._model.codec.latent_range,
        )
        for i, drawing in enumerate(drawings):
            drawing.x, drawing.x0 = x[i], x0[i]

    def _scheduled_step(self, batch: Sequence[Request], rows: _Rows) -> list[tuple[Request, Exception]]:
        """The same by schedulers of diffusers, each its own; answers with those that failed."""
        drawings = [_drawing(request) for request in batch]
        scaled = [drawing.run.scale(drawing.x, drawing.step) for drawing in drawings]  # type: ignore[union-attr]
        timesteps = [torch.tensor(float(drawing.timestep)) for drawing in drawings]
        x, timesteps_padded = _stacked(scaled, rows.num_images), _stacked(timesteps, rows.num_images)
        predictions = self.predict(x, timesteps_padded, rows.layout, rows.branching)
        failures = []
        for request, prediction in zip(batch, predictions, strict=False):  # after these comes what pads them
            failures += _attempt(request, partial(_schedule, request, prediction))
        return failures

    def _rows(self, batch: Sequence[Request]) -> _Rows:
        """Layout and branching of the next step of `batch`, those of an earlier one where nothing has changed."""
        num_train_timesteps = self._model.config.diffusion.num_train_timesteps
        documents = [_documents(request, num_train_timesteps) for request in batch]
        key = tuple(
            (request.image_rows, request.options.guidance_rescale, *((c.start, c.length, w) for c, w in drawn))
            for request, drawn in zip(batch, documents, strict=True)
        )
        if key not in self._kept:
            self._kept[key] = self._build_rows(batch, documents)
            if len(self._kept) > NUM_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _build_rows(
        self, batch: Sequence[Request], documents: Sequence[Sequence[tuple[CachedDocument, float]]]
    ) -> _Rows:
        flat = [(cached, i) for i, drawn in enumerate(documents) for cached, _ in drawn]
        flat.sort(key=lambda item: item[0].start)
        is_branched = len(flat) > len(batch)
        num_images, num_documents = len(batch), len(flat)
        if self._is_padded and batch[0].image_rows <= self._cache.scratch.num_rows:
            num_images = next_power_of_two(num_images)
            num_documents = next_power_of_two(num_documents + num_images - len(batch))
        # What pads the images comes first among what pads the documents: its own document is that of an image
        padding = range(len(batch), len(batch) + num_documents - len(flat))
        flat += [(self._cache.scratch, min(i, num_images - 1)) for i in padding]
        layout = self._cache.layout([cached for cached, _ in flat], [[("image", batch[0].image_rows)]] * len(flat))
        if not is_branched:
            return _Rows(layout, None, num_images)
        place = {cached: b for b, (cached, _) in enumerate(flat)}
        index, weights = [], []
        for drawn in [*documents, *[[(self._cache.scratch, 1.0)]] * (num_images - len(batch))]:
            places = [place[cached] for cached, _ in drawn]
            index.append(places + places[:1] * (MAX_BRANCHES - len(places)))
            weights.append([weight for _, weight in drawn] + [0.0] * (MAX_BRANCHES - len(drawn)))
        rescale = [request.options.guidance_rescale for request in batch] + [0.0] * (num_images - len(batch))
        device = self._cache.device
        branching = Branching(
            image=upload(torch.tensor([i for _, i in flat]), device),
            branch=upload(torch.tensor(index), device),
            weights=upload(weights, device),
            rescale=upload(rescale, device),
        )
        return _Rows(layout, branching, num_images)

    def _begin_previews(self, batch: Sequence[Request]) -> None:
        codec = self._model.codec
        shown, frames = [], []
        for request in batch:
            drawing, every = _drawing(request), request.options.preview_every
            if every and drawing.step % every == 0 and not drawing.is_finished:
                shown.append(request)
                size = codec.downscale * request.latent_shape[-1]
                frames.append((request.num_images, drawing.step, len(drawing.run.timesteps), size))
        if shown:
            clean = torch.stack([_drawing(request).x0 for request in shown])
            rgb = to_rgb(clean, preview_map(codec))
            self._previews.append(Previews(HostCopy(rgb), shown, HostCopy(are_finite(clean)), frames))


def _batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Requests that can go through one forward, in the order of their rows in the cache."""

    def kind(request: Request) -> tuple[bool, tuple[int, int, int]]:
        return isinstance(_drawing(request).run, SchedulerRun), request.latent_shape

    def place(request: Request) -> int:
        assert request.cached is not None
        return request.cached.start

    for _, batch in groupby(sorted(requests, key=lambda request: (kind(request), place(request))), kind):
        yield list(batch)


def _documents(request: Request, num_train_timesteps: int) -> list[tuple[CachedDocument, float]]:
    """The documents of the next step's branches, with their weights; outside the guidance interval there is one."""
    low, high = request.options.guidance_interval
    is_guided = low <= _drawing(request).timestep / num_train_timesteps <= high
    drawn = request.drawn_branches()
    return drawn if is_guided else [(drawn[0][0], 1.0)]


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _stacked(tensors: Sequence[Tensor], num_rows: int) -> Tensor:
    """`tensors` as rows of one, the first of them repeated up to `num_rows`."""
    return torch.stack([*tensors, *[tensors[0]] * (num_rows - len(tensors))])


def _drawing(request: Request) -> DenoiseState:
    assert request.drawing is not None
    return request.drawing


def _schedule(request: Request, prediction: Tensor) -> None:
    drawing = _drawing(request)
    assert isinstance(drawing.run, SchedulerRun)
    drawing.x, drawing.x0 = drawing.run.step(prediction, drawing.step, drawing.x, drawing.generator)


def _call_back(request: Request) -> None:
    """Let the request's callback see the step that was taken, and change its outcome."""
    drawing, callback = _drawing(request), request.options.callback_on_step_end
    assert callback is not None
    step = drawing.step - 1
    answer = callback(step, int(drawing.run.timesteps[step]), {"latents": drawing.x})
    if answer is None:
        return
    latents = answer.get("latents", drawing.x)
    shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    if shape != tuple(drawing.x.shape):
        raise ValueError(
            f"latents of callback_on_step_end must be a tensor of the shape {tuple(drawing.x.shape)}, got {shape}"
        )
    drawing.x = latents.to(drawing.x)


def _attempt(request: Request, work: Callable[[], None]) -> list[tuple[Request, Exception]]:
    """What the code of one request raised, if it did."""
    try:
        work()
    except Exception as error:
        return [(request, error)]
    return []
