"""Denoising: images of different requests, at different steps of different samplers, take a step together.

Images of one size go through the image tower in one forward, with all their branches of guidance. The documents of a
batch seldom change from step to step, so their layout is kept. When steps are replayed as CUDA graphs, images and
documents are padded to powers of two: a few graphs then serve batches of every size.
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

MAX_LAYOUTS = 8
"""Layouts that are kept. A batch alternates between a few of them, as guidance sets in and ends."""


class Previews(NamedTuple):
    """Previews of the images of a batch, on their way from the device."""

    pixels: HostCopy
    """uint8 [n, h, w, 3]"""
    requests: list[Request]
    is_finite: HostCopy
    """bool [n]"""
    frames: list[tuple[int, int, int, int]]
    """(index, step, num_steps, pixels per side) of each"""

    def events(self) -> Iterator[tuple[Request, ImagePreview | None]]:
        """The event of each preview, or None if it is not finite. Waits for the pixels."""
        pictures = zip(self.pixels.wait(), self.is_finite.wait().tolist(), self.requests, self.frames, strict=True)
        for pixels, is_finite, request, (index, step, num_steps, size) in pictures:
            picture = ImagePreview(index, step, num_steps, preview_image(pixels, size)) if is_finite else None
            yield request, picture


class _Plan(NamedTuple):
    """Where the images of a batch are in the cache, and which branches belong to each."""

    layout: TokenLayout
    branching: Branching | None
    num_images: int
    """Those of the batch and those that pad it."""


class Denoiser:
    """Takes the denoising steps of requests."""

    def __init__(self, model: "LMFusion", cache: KeyValueCache, recorder: Recorder | None) -> None:
        """recorder: of CUDA graphs; None to launch every step from the host."""
        self._model = model
        self._cache = cache
        self._is_padded = recorder is not None
        self.denoise, self.predict = (
            ReplayedStep(partial(step, model, cache), cache.device, recorder, longest_document=context_limit(model))
            for step in (denoise_step, predict_step)
        )
        self._plans: OrderedDict[Hashable, _Plan] = OrderedDict()
        self._previews: list[Previews] = []

    def step(self, requests: Sequence[Request]) -> list[tuple[Request, Exception]]:
        """Take the next denoising step of each request. Returns the requests whose own code failed, with the errors.

        Nothing here waits for the device: the host may queue a step while the one before is still running.
        """
        failures: list[tuple[Request, Exception]] = []
        for batch in _batches(requests):
            plan = self._plan(batch)
            if isinstance(_state(batch[0]).run, SchedulerRun):
                failures += self._scheduler_step(batch, plan)
            else:
                self._table_step([_state(request) for request in batch], plan)
            failed = {request.id for request, _ in failures}
            for request in batch:
                _state(request).step += 1
                # A callback runs once per step, and not for a request whose scheduler has failed in this one
                if request.options.callback_on_step_end is not None and request.id not in failed:
                    failures += _attempt(request, partial(_call_back, request))
            self._begin_previews(batch)
        return failures

    def take_previews(self) -> list["Previews"]:
        """The previews of the steps so far; each is returned once. They may still be on their way from the device."""
        taken, self._previews = self._previews, []
        return taken

    def _table_step(self, states: Sequence[DenoiseState], plan: _Plan) -> None:
        """The next step of images whose samplers are tables of coefficients, in one function of tensors."""
        numbers = [state.numbers[state.step] for state in states]  # type: ignore[index]
        # Each image has its own generator, on the CPU, so that the batch does not change its noise. A step that adds no
        # noise takes no random numbers: the noise of later steps depends on how many were taken before.
        noise = [
            torch.randn(state.x.shape, generator=state.generator)
            if state.noise_scales[state.step]
            else torch.zeros(state.x.shape)
            for state in states
        ]
        x, x0 = self.denoise(
            _stacked([state.x for state in states], plan.num_images),
            _stacked([state.x0 for state in states], plan.num_images),
            _stacked(noise, plan.num_images),
            _stacked(numbers, plan.num_images),
            plan.layout,
            plan.branching,
            self._model.codec.latent_range,
        )
        for i, state in enumerate(states):  # the images that pad the batch come after these
            state.x, state.x0 = x[i], x0[i]

    def _scheduler_step(self, batch: Sequence[Request], plan: _Plan) -> list[tuple[Request, Exception]]:
        """The same with diffusers schedulers, each image with its own. Returns the requests whose scheduler failed."""
        states = [_state(request) for request in batch]
        scaled = [state.run.scale(state.x, state.step) for state in states]  # type: ignore[union-attr]
        timesteps = [torch.tensor(float(state.timestep)) for state in states]
        x, timesteps_padded = _stacked(scaled, plan.num_images), _stacked(timesteps, plan.num_images)
        predictions = self.predict(x, timesteps_padded, plan.layout, plan.branching)
        failures = []
        for request, prediction in zip(batch, predictions, strict=False):  # those that pad the batch come last
            failures += _attempt(request, partial(_schedule, request, prediction))
        return failures

    def _plan(self, batch: Sequence[Request]) -> _Plan:
        """Layout and branching of the next step of `batch`: those of an earlier step if nothing has changed."""
        num_train_timesteps = self._model.config.diffusion.num_train_timesteps
        documents = [_documents(request, num_train_timesteps) for request in batch]
        # All that the layout and the branching are made from. Slots are reused by later requests, so a document's start
        # alone does not tell: its length and the branches' weights are in the key, too.
        key = tuple(
            (request.num_image_tokens, request.options.guidance_rescale, *((c.start, c.length, w) for c, w in branches))
            for request, branches in zip(batch, documents, strict=True)
        )
        if key not in self._plans:
            self._plans[key] = self._build_plan(batch, documents)
            if len(self._plans) > MAX_LAYOUTS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def _build_plan(
        self, batch: Sequence[Request], documents: Sequence[Sequence[tuple[CachedDocument, float]]]
    ) -> _Plan:
        flat = [(cached, i) for i, branches in enumerate(documents) for cached, _ in branches]
        flat.sort(key=lambda item: item[0].start)  # the order that the cache's layout requires
        is_branched = len(flat) > len(batch)
        num_images, num_documents = len(batch), len(flat)
        if self._is_padded and batch[0].num_image_tokens <= self._cache.scratch.num_slots:
            num_images = next_power_of_two(num_images)
            num_documents = next_power_of_two(num_documents + num_images - len(batch))
        # Images that pad the batch need a document each, in the scratch slots: the first padding documents are theirs.
        # The rest belong to the last image, and nothing reads what they give.
        padding = range(len(batch), len(batch) + num_documents - len(flat))
        flat += [(self._cache.scratch, min(i, num_images - 1)) for i in padding]
        layout = self._cache.layout(
            [cached for cached, _ in flat], [[("image", batch[0].num_image_tokens)]] * len(flat)
        )
        if not is_branched:
            return _Plan(layout, None, num_images)
        position = {cached: b for b, (cached, _) in enumerate(flat)}
        index, weights = [], []
        for branches in [*documents, *[[(self._cache.scratch, 1.0)]] * (num_images - len(batch))]:
            positions = [position[cached] for cached, _ in branches]
            # Every image gets MAX_BRANCHES, so that the shape is the same with and without some of them
            index.append(positions + positions[:1] * (MAX_BRANCHES - len(positions)))
            weights.append([weight for _, weight in branches] + [0.0] * (MAX_BRANCHES - len(branches)))
        rescale = [request.options.guidance_rescale for request in batch] + [0.0] * (num_images - len(batch))
        device = self._cache.device
        branching = Branching(
            image=upload(torch.tensor([i for _, i in flat]), device),
            branch=upload(torch.tensor(index), device),
            weights=upload(weights, device),
            rescale=upload(rescale, device),
        )
        return _Plan(layout, branching, num_images)

    def _begin_previews(self, batch: Sequence[Request]) -> None:
        codec = self._model.codec
        shown, frames = [], []
        for request in batch:
            state, every = _state(request), request.options.preview_every
            if every and state.step % every == 0 and not state.is_finished:
                shown.append(request)
                size = codec.downscale * request.latent_shape[-1]
                frames.append((request.num_images, state.step, len(state.run.timesteps), size))
        if shown:
            clean = torch.stack([_state(request).x0 for request in shown])
            rgb = to_rgb(clean, preview_map(codec))
            self._previews.append(Previews(HostCopy(rgb), shown, HostCopy(are_finite(clean)), frames))


def _batches(requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Groups of requests that can share a forward, each in the order of its documents in the cache."""

    def kind(request: Request) -> tuple[bool, tuple[int, int, int]]:
        return isinstance(_state(request).run, SchedulerRun), request.latent_shape

    def start(request: Request) -> int:
        assert request.cached is not None
        return request.cached.start

    for _, batch in groupby(sorted(requests, key=lambda request: (kind(request), start(request))), kind):
        yield list(batch)


def _documents(request: Request, num_train_timesteps: int) -> list[tuple[CachedDocument, float]]:
    """The documents of the next step's branches, with their weights; outside the guidance interval only the first."""
    low, high = request.options.guidance_interval
    is_guided = low <= _state(request).timestep / num_train_timesteps <= high
    branches = request.branch_weights()
    return branches if is_guided else [(branches[0][0], 1.0)]


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _stacked(tensors: Sequence[Tensor], num_images: int) -> Tensor:
    """`tensors` in one tensor, padded with the first of them to `num_images`."""
    return torch.stack([*tensors, *[tensors[0]] * (num_images - len(tensors))])


def _state(request: Request) -> DenoiseState:
    assert request.denoising is not None
    return request.denoising


def _schedule(request: Request, prediction: Tensor) -> None:
    state = _state(request)
    assert isinstance(state.run, SchedulerRun)
    state.x, state.x0 = state.run.step(prediction, state.step, state.x, state.generator)


def _call_back(request: Request) -> None:
    """Call the request's callback after a step; it may replace the latents."""
    state, callback = _state(request), request.options.callback_on_step_end
    assert callback is not None
    step = state.step - 1
    answer = callback(step, int(state.run.timesteps[step]), {"latents": state.x})
    if answer is None:
        return
    latents = answer.get("latents", state.x)
    shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    if shape != tuple(state.x.shape):
        raise ValueError(
            f"latents of callback_on_step_end must be a tensor of the shape {tuple(state.x.shape)}, got {shape}"
        )
    state.x = latents.to(state.x)


def _attempt(request: Request, work: Callable[[], None]) -> list[tuple[Request, Exception]]:
    """Run code that belongs to one request. Returns what it raised, if it did: the other requests go on."""
    try:
        work()
    except Exception as error:
        return [(request, error)]
    return []
