"""Which rows does the next step train on? Read, packed and encoded ahead in threads, the same whatever their number."""

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

from lmfusion.data.latent_cache.reader import LatentShards
from lmfusion.data.pipeline.documents import Plan, SkippedSample
from lmfusion.data.pipeline.image_latents import DamagedImageError, LatentReader
from lmfusion.data.pipeline.input_images import VisionReader
from lmfusion.data.pipeline.packing import PackedSequence, Window, WindowReader
from lmfusion.data.samples import DataConfig, EncodedSource, load_source
from lmfusion.data.sources.unused_files import report_unused
from lmfusion.model.batch import Batch, SpecialTokens, pack
from lmfusion.model.codec import Codec
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion.model.vision import VisionEncoder
from lmfusion.utils.randomness import generator


@dataclass(frozen=True)
class LoaderState:
    """Where reading stands: the next row. Says nothing of ranks and workers, whose numbers may change."""

    window: int = 0
    row: int = 0
    """Of the window."""


@dataclass(frozen=True)
class Step:
    """What one update is made of."""

    rows: list[Batch]
    """This rank's, in order, on the CPU. A row all of whose samples are damaged is an empty batch."""
    state: LoaderState
    """After this step."""
    epoch: float
    """Samples drawn up to and with this step, over those of all sources."""
    num_samples: int
    """Drawn by all ranks in this step, damaged ones included."""
    num_tokens_used: int
    """Of the rows of all ranks, those of damaged images included."""
    num_cut: int
    """Documents of all ranks that were cut to fit into a row."""
    damaged: tuple[SkippedSample, ...]
    """In the rows of this rank."""


@dataclass(frozen=True)
class _StepPlan:
    """A step whose images have not been read yet."""

    rows: list[PackedSequence]
    """Of all ranks."""
    state: LoaderState
    num_samples_read: int
    """Samples drawn up to and with this step."""


def check_shared_evenly(sequences_per_step: int, world_size: int) -> None:
    """Raises ValueError unless all ranks get as many rows of a step, and at least one."""
    if sequences_per_step < 1 or sequences_per_step % world_size:
        raise ValueError(
            f"a step has {sequences_per_step} rows, which {world_size} ranks cannot share evenly; "
            "change train.batch_tokens or data.seq_len"
        )


class PackedLoader:
    """Makes the rows of any step from the sources of `config`.

    Samples are drawn from an endless mixture of the sources, packed in windows, and dealt out row by row: a step takes
    the next `sequences_per_step` rows, of which this rank prepares every `world_size`-th. What a sample becomes depends on
    (seed, epoch, sample id) alone, so a run that resumes from a state, on another number of ranks or workers, sees what
    it would have seen.

    A damaged sample is left out of its row and reported; nothing else moves.

    Raises ValueError for sources that are missing, empty or made for another model, and for rows that cannot be shared
    out or cannot hold an image.
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
        """vision: what a vision-language model sees with. template_variables: what the chat template reads."""
        check_shared_evenly(sequences_per_step, world_size)
        sources = [load_source(source, codec.config.image_size) for source in config.sources]
        for source in sources:
            if isinstance(source, EncodedSource):
                source.check_made_with(codec, tokenizer)
            if isinstance(source, LatentShards):
                source.check_template_variables(template_variables or {})
        self.num_samples = sum(map(len, sources))
        """Of all sources."""
        self._config = config
        self._sources = sources
        self._windows = WindowReader(
            config,
            sources,
            tokenizer=deepcopy(tokenizer),  # calls set it up for their options: its owner may call it meanwhile
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
        self._rows_per_step = sequences_per_step
        self._seed = seed
        self._frozen_text = frozen_text
        self._is_pinned = torch.device(device).type == "cuda"
        self._rank = rank
        self._world_size = world_size

    def report_unused(self) -> None:
        """Print which files of the sources look like images or captions and are in no sample."""
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
                yield self._step(plan, map(self._row, self._own(plan)))
            return
        with ExitStack() as stack:

            def threads(number: int, name: str) -> ThreadPoolExecutor:
                pool = ThreadPoolExecutor(number, thread_name_prefix=f"lmfusion-{name}")
                stack.callback(pool.shutdown, cancel_futures=True)
                return pool

            # Closed in reverse: whoever waits for a pool outlives it
            windows = self._read_ahead(state.window, threads(1, "windows"), threads(self._config.num_workers, "texts"))
            workers = threads(self._config.num_workers, "rows")
            plans = islice(self._plan_steps(windows, state), num_steps)
            ahead: deque[tuple[_StepPlan, list[Future[tuple[Batch, list[SkippedSample]]]]]] = deque()
            # Enough that no worker is idle while the trainer is busy, and no more: rows of pixels are large
            own_rows = self._rows_per_step // self._world_size
            num_ahead = math.ceil(2 * self._config.num_workers / own_rows)
            for plan in plans:
                ahead.append((plan, [workers.submit(self._row, row) for row in self._own(plan)]))
                if len(ahead) > num_ahead:
                    done, rows = ahead.popleft()
                    yield self._step(done, (row.result() for row in rows))
            for done, rows in ahead:
                yield self._step(done, (row.result() for row in rows))

    def _read_ahead(self, first: int, reader: ThreadPoolExecutor, texts: ThreadPoolExecutor) -> Iterator[Window]:
        """Windows from number `first` on; while one is used, the next is read, or as many as a step takes."""
        numbers = count(first)
        ahead = deque([reader.submit(self._windows.read, next(numbers), texts.map)])
        while True:
            window = ahead.popleft().result()
            while len(ahead) < math.ceil(self._rows_per_step / len(window.rows)):
                ahead.append(reader.submit(self._windows.read, next(numbers), texts.map))
            yield window

    def _plan_steps(self, windows: Iterator[Window], state: LoaderState) -> Iterator[_StepPlan]:
        number, row = state.window, state.row
        window = next(windows)
        if not 0 <= row < len(window.rows):
            raise ValueError(
                f"the next row is {row} of window {number}, which has {len(window.rows)}; the data has changed since "
                "this state was saved. Restore it, or start another run"
            )
        before = number * self._config.pack_window
        num_samples_read = before + sum(earlier.num_samples for earlier in window.rows[:row])
        while True:
            rows: list[PackedSequence] = []
            while len(rows) < self._rows_per_step:
                if row == len(window.rows):
                    number, row, window = number + 1, 0, next(windows)
                rows.append(window.rows[row])
                num_samples_read += window.rows[row].num_samples
                row += 1
            after = LoaderState(number, row) if row < len(window.rows) else LoaderState(number + 1, 0)
            yield _StepPlan(rows, after, num_samples_read)

    def _own(self, plan: _StepPlan) -> list[PackedSequence]:
        return plan.rows[self._rank :: self._world_size]

    def _step(self, plan: _StepPlan, made: Iterable[tuple[Batch, list[SkippedSample]]]) -> Step:
        rows: list[Batch] = []
        damaged: list[SkippedSample] = []
        for batch, found in made:
            rows.append(batch)
            damaged += found
        return Step(
            rows=rows,
            state=plan.state,
            epoch=plan.num_samples_read / self.num_samples,
            num_samples=sum(row.num_samples for row in plan.rows),
            num_tokens_used=sum(row.num_tokens_used for row in plan.rows),
            num_cut=sum(row.num_cut for row in plan.rows),
            damaged=tuple(damaged),
        )

    def _row(self, row: PackedSequence) -> tuple[Batch, list[SkippedSample]]:
        """The batch of a row, and the samples that it had to do without."""
        num_images = sum(len(plan.images) for plan in row.plans)
        latents = torch.empty(num_images, *self._latents.shape)
        noise = np.empty(latents.shape, np.float32)
        whole: list[Plan] = []
        seen: list[Tensor] = []
        damaged = [*row.damaged]
        first = 0
        for plan in row.plans:
            last = first + len(plan.images)
            try:
                self._read_images(plan, latents[first:last])
                of_plan = self._read_seen(plan)
            except DamagedImageError as error:
                damaged.append(SkippedSample(plan.sample_id, str(error)))
                continue
            except ValueError as error:
                raise ValueError(f"sample {plan.sample_id}: {error}") from error
            draw = generator(self._seed, plan.ref.epoch, plan.sample_id, "noise")
            draw.standard_normal(dtype=np.float32, out=noise[first:last])
            whole.append(plan)
            seen += of_plan
            first = last
        batch = pack(
            [plan.document for plan in whole],
            latents[:first],
            torch.from_numpy(noise[:first]),
            torch.tensor([t for plan in whole for t in plan.timesteps], dtype=torch.int64),
            sample_ids=[plan.sample_id for plan in whole],
            frozen_text=self._frozen_text,
            vision_embeds=torch.cat(seen) if seen else None,
        )
        return (batch.pin_memory() if self._is_pinned else batch), damaged

    def _read_images(self, plan: Plan, latents: Tensor) -> None:
        """Fill `latents` [number of images, C, h, w]. What is drawn for an image does not depend on where it lies."""
        places = range(plan.first_image, plan.first_image + len(plan.images))
        for latent, i, load_image in zip(latents, places, plan.images, strict=True):
            draw = partial(generator, self._seed, plan.ref.epoch, plan.sample_id, f"latents {i}")
            latent.copy_(self._latents.read((plan.ref.source, plan.ref.index, i), load_image, draw))

    def _read_seen(self, plan: Plan) -> list[Tensor]:
        """Rows of each image that is seen."""
        if self._vision is None:
            return []
        return [self._vision.read((plan.ref.source, plan.ref.index, i), image) for i, image in enumerate(plan.seen)]
