"""Prepares the packed sequences of each training step: reads, packs and encodes them ahead in threads.

The sequences are the same on any number of threads and ranks, and two integers say where to go on (`LoaderState`).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmfusion.data.config import DataConfig
from lmfusion.data.pipeline.documents import Plan, SkippedSample
from lmfusion.data.pipeline.image_latents import DamagedImageError, LatentReader
from lmfusion.data.pipeline.input_images import VisionReader
from lmfusion.data.pipeline.packing import PackedSequence, Window, WindowReader
from lmfusion.data.registry import load_source
from lmfusion.data.samples import LatentSource
from lmfusion.data.sources.unused_files import report_unused
from lmfusion.model.batch import Batch, SpecialTokens, pack
from lmfusion.model.codec import Codec
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.model.vision import VisionEncoder
from lmfusion.utils.prefetch import submit_ahead
from lmfusion.utils.randomness import generator


@dataclass(frozen=True)
class LoaderState:
    """The sequence that comes next. It does not depend on ranks and workers, whose numbers may change."""

    window: int = 0
    sequence: int = 0
    """Its number in the window."""


@dataclass(frozen=True)
class Step:
    """The data of one update."""

    batches: list[Batch]
    """This rank's micro-batches, one packed sequence each, in order, on the CPU. A sequence all of whose samples are
    damaged is an empty batch."""
    state: LoaderState
    """After this step."""
    epoch: float
    """Samples read up to and including this step, over the samples of all sources."""
    num_samples: int
    """Read by all ranks in this step, damaged ones included."""
    num_tokens_used: int
    """In the sequences of all ranks, including the tokens of damaged images."""
    num_cut: int
    """Documents of all ranks that were cut to fit into a sequence."""
    damaged: tuple[SkippedSample, ...]
    """In the sequences of this rank."""


@dataclass(frozen=True)
class _StepPlan:
    """A step whose images have not been read yet."""

    sequences: list[PackedSequence]
    """Of all ranks."""
    state: LoaderState
    num_samples_read: int
    """Samples read up to and including this step."""


_Made = tuple[Batch, list[SkippedSample]]
"""The batch of a sequence, and the samples that were skipped."""


def check_shared_evenly(sequences_per_step: int, world_size: int) -> None:
    """Raises ValueError unless all ranks get the same number of a step's sequences, and at least one."""
    if sequences_per_step < 1 or sequences_per_step % world_size:
        raise ValueError(
            f"the sequences of a step must be a multiple of the number of ranks, {world_size}, got "
            f"{sequences_per_step}; change train.batch_tokens or data.seq_len"
        )


class PackedLoader:
    """Makes the packed sequences of any step from the sources of `config`.

    Samples come from an endless mixture of the sources and are packed in windows. A step takes the next
    `sequences_per_step` sequences, of which this rank prepares every `world_size`-th. What becomes of a sample depends
    only on (seed, epoch, sample id), so a run that resumes from a state, on another number of ranks or workers, sees
    the same data.

    A damaged sample is left out of its sequence and reported; all other samples stay where they are.

    Raises ValueError for sources that are missing, empty or made for another model, and for sequences that cannot be
    shared among the ranks or cannot hold an image.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        codec: Codec,
        tokenizer: Any,
        tokens: SpecialTokens,
        tokens_per_image: int,
        diffusion: DiffusionConfig,
        sequences_per_step: int,
        seed: int,
        frozen_text: bool,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        vision: VisionEncoder | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """tokens_per_image: image tokens of one target image. frozen_text: whether the text tower is frozen, so that
        only the images have a loss. vision: the encoder of a vision-language model. template_variables: variables for
        the chat template."""
        check_shared_evenly(sequences_per_step, world_size)
        sources = [load_source(source, codec.config.image_size) for source in config.sources]
        for source in sources:
            if isinstance(source, LatentSource):
                source.check_made_with(codec, tokenizer)
                source.check_template_variables(template_variables or {})
        self.num_samples = sum(map(len, sources))
        """Of all sources."""
        self._config = config
        self._sources = sources
        self._windows = WindowReader(
            config,
            sources,
            tokenizer=deepcopy(tokenizer),  # a call changes its settings, and its owner may call it at the same time
            tokens=tokens,
            tokens_per_image=tokens_per_image,
            diffusion=diffusion,
            seed=seed,
            vlm_config=None if vision is None else vision.config,
            template_variables=template_variables,
        )
        self._vision = None if vision is None else VisionReader(vision, device, cache_megabytes=config.cache_megabytes)
        self._latents = LatentReader(
            codec, device, sample=config.sample_latents, cache_megabytes=config.cache_megabytes
        )
        self._sequences_per_step = sequences_per_step
        self._seed = seed
        self._frozen_text = frozen_text
        self._is_pinned = torch.device(device).type == "cuda"
        self._rank = rank
        self._world_size = world_size

    def report_unused(self) -> None:
        """Print which files of the sources look like images or captions but belong to no sample."""
        for source, config in zip(self._sources, self._config.sources, strict=True):
            report_unused(source, config.name)

    def steps(self, state: LoaderState, num_steps: int) -> Iterator[Step]:
        """The next `num_steps` steps from `state` on, prepared ahead by `num_workers` threads.

        The threads end when the iterator does, when it is closed, and when it raises. Raises ValueError, naming the
        sample, for latents that do not fit the codec, and for a state that the data does not have.
        """
        if self._config.num_workers == 0:
            plans = self._plan_steps(map(self._windows.read, count(state.window)), state)
            for plan in islice(plans, num_steps):
                yield self._step(plan, map(self._make, self._own(plan)))
            return
        with ExitStack() as stack:

            def pool_of(num_threads: int, name: str) -> ThreadPoolExecutor:
                pool = ThreadPoolExecutor(num_threads, thread_name_prefix=f"lmfusion-{name}")
                stack.callback(pool.shutdown, cancel_futures=True)
                return pool

            # The pools are shut down in reverse order. The thread that reads windows waits for the pool of texts, so
            # its own pool must come first: shut down the other way round, it could wait for a text that never comes.
            window_pool, text_pool = pool_of(1, "windows"), pool_of(self._config.num_workers, "texts")
            windows = self._read_ahead(state.window, window_pool, text_pool)
            workers = pool_of(self._config.num_workers, "sequences")

            def submit(plan: _StepPlan) -> tuple[_StepPlan, list[Future[_Made]]]:
                return plan, [workers.submit(self._make, sequence) for sequence in self._own(plan)]

            # Enough steps that no worker is idle while the trainer is busy, but not more: their pixels take memory.
            num_ahead = math.ceil(2 * self._config.num_workers / (self._sequences_per_step // self._world_size))
            plans = islice(self._plan_steps(windows, state), num_steps)
            for plan, futures in submit_ahead(submit, plans, num_ahead):
                yield self._step(plan, (future.result() for future in futures))

    def _read_ahead(self, first: int, reader: ThreadPoolExecutor, texts: ThreadPoolExecutor) -> Iterator[Window]:
        """Windows from number `first` on. While one is used, the next is read, or as many as a step takes.

        This is not `submit_ahead`, since how many are read ahead depends on the sequences of the window before.
        """
        numbers = count(first)
        ahead = deque([reader.submit(self._windows.read, next(numbers), texts.map)])
        while True:
            window = ahead.popleft().result()
            while len(ahead) < math.ceil(self._sequences_per_step / len(window.sequences)):
                ahead.append(reader.submit(self._windows.read, next(numbers), texts.map))
            yield window

    def _plan_steps(self, windows: Iterator[Window], state: LoaderState) -> Iterator[_StepPlan]:
        number, place = state.window, state.sequence
        window = next(windows)
        if not 0 <= place < len(window.sequences):
            raise ValueError(
                f"the next sequence must be one of the {len(window.sequences)} of window {number}, got {place}; the "
                "data has changed since this state was saved. Restore it, or start another run"
            )
        before = number * self._config.pack_window
        num_samples_read = before + sum(earlier.num_samples for earlier in window.sequences[:place])
        while True:
            sequences: list[PackedSequence] = []
            while len(sequences) < self._sequences_per_step:
                if place == len(window.sequences):
                    number, place, window = number + 1, 0, next(windows)
                sequences.append(window.sequences[place])
                num_samples_read += window.sequences[place].num_samples
                place += 1
            after = LoaderState(number, place) if place < len(window.sequences) else LoaderState(number + 1, 0)
            yield _StepPlan(sequences, after, num_samples_read)

    def _own(self, plan: _StepPlan) -> list[PackedSequence]:
        return plan.sequences[self._rank :: self._world_size]

    def _step(self, plan: _StepPlan, made: Iterable[_Made]) -> Step:
        batches: list[Batch] = []
        damaged: list[SkippedSample] = []
        for batch, found in made:
            batches.append(batch)
            damaged += found
        return Step(
            batches=batches,
            state=plan.state,
            epoch=plan.num_samples_read / self.num_samples,
            num_samples=sum(sequence.num_samples for sequence in plan.sequences),
            num_tokens_used=sum(sequence.num_tokens_used for sequence in plan.sequences),
            num_cut=sum(sequence.num_cut for sequence in plan.sequences),
            damaged=tuple(damaged),
        )

    def _make(self, sequence: PackedSequence) -> _Made:
        num_images = sum(len(plan.images) for plan in sequence.plans)
        latents = torch.empty(num_images, *self._latents.shape)
        noise = np.empty(latents.shape, np.float32)
        whole: list[Plan] = []
        vision_embeds: list[Tensor] = []
        damaged = [*sequence.damaged]
        first = 0
        for plan in sequence.plans:
            last = first + len(plan.images)
            try:
                self._read_images(plan, latents[first:last])
                embeds = self._read_input_images(plan)
            except DamagedImageError as error:
                damaged.append(SkippedSample(plan.sample_id, str(error)))
                continue
            except ValueError as error:
                raise ValueError(f"sample {plan.sample_id}: {error}") from error
            rng = generator(self._seed, plan.ref.epoch, plan.sample_id, "noise")
            rng.standard_normal(dtype=np.float32, out=noise[first:last])
            whole.append(plan)
            vision_embeds += embeds
            first = last
        batch = pack(
            [plan.document for plan in whole],
            latents[:first],
            torch.from_numpy(noise[:first]),
            torch.tensor([t for plan in whole for t in plan.timesteps], dtype=torch.int64),
            sample_ids=[plan.sample_id for plan in whole],
            frozen_text=self._frozen_text,
            vision_embeds=torch.cat(vision_embeds) if vision_embeds else None,
        )
        return (batch.pin_memory() if self._is_pinned else batch), damaged

    def _read_images(self, plan: Plan, latents: Tensor) -> None:
        """Fill `latents` [number of images, C, h, w]. Samples of a posterior do not depend on where an image lies."""
        places = range(plan.first_image, plan.first_image + len(plan.images))
        for latent, i, load_image in zip(latents, places, plan.images, strict=True):
            make_rng = partial(generator, self._seed, plan.ref.epoch, plan.sample_id, f"latents {i}")
            latent.copy_(self._latents.read((plan.ref.source, plan.ref.index, i), load_image, make_rng))

    def _read_input_images(self, plan: Plan) -> list[Tensor]:
        """Embeddings of each input image."""
        if self._vision is None:
            return []
        images = enumerate(plan.input_images)
        return [self._vision.read((plan.ref.source, plan.ref.index, i), image) for i, image in images]
