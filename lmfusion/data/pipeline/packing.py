"""Packs documents into sequences: windows of consecutive samples, each packed by itself before any image is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from lmfusion.data.config import DataConfig
from lmfusion.data.pipeline.documents import DocumentPlanner, Plan, SkippedSample
from lmfusion.data.pipeline.input_images import with_input_images
from lmfusion.data.pipeline.mixture import Mixture, SampleRef
from lmfusion.data.pipeline.order import Permutation, SourceOrder
from lmfusion.data.samples import Sample, Source
from lmfusion.data.storage.files import StorageError
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion_kernels.layout.packing import pack_documents

READ_TOGETHER = 32
"""Samples of a window that one thread reads, one after another."""


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """The documents of one packed sequence, in their order in it."""

    plans: tuple[Plan, ...]
    damaged: tuple[SkippedSample, ...] = ()
    """This sequence's share of the samples of its window that could not be read. Their lengths are unknown, so they
    are in no sequence, but they are counted with this one."""

    @property
    def num_samples(self) -> int:
        return len(self.plans) + len(self.damaged)

    @property
    def num_tokens_used(self) -> int:
        return sum(plan.document.num_tokens for plan in self.plans)

    @property
    def num_cut(self) -> int:
        return sum(plan.is_cut for plan in self.plans)


@dataclass(frozen=True, slots=True)
class Window:
    """The sequences made of `pack_window` consecutive samples."""

    sequences: tuple[PackedSequence, ...]
    """At least one: where every sample is damaged, a sequence without documents."""

    @property
    def damaged(self) -> tuple[SkippedSample, ...]:
        """Samples that could not be read."""
        return tuple(chain.from_iterable(sequence.damaged for sequence in self.sequences))


class WindowReader:
    """Reads and packs windows. Each is a pure function of the configuration and its number.

    sources: of `config.sources`, in their order. vlm_config: of a vision-language model, whose input images are read
    for their sizes. Raises ValueError for a source without samples, and for weights and sequences that are too small.
    """

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[Source],
        *,
        tokenizer: Any,
        tokens: SpecialTokens,
        tokens_per_image: int,
        diffusion: DiffusionConfig,
        seed: int,
        vlm_config: PreTrainedConfig | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        for source, named in zip(sources, config.sources, strict=True):
            if len(source) == 0:
                raise ValueError(f"the data source {named.name} has no samples")
        self._config = config
        self._sources = sources
        self._seed = seed
        orders = [SourceOrder(s.blocks, config.shuffle_blocks, seed, f"source {i}") for i, s in enumerate(sources)]
        self._mixture = Mixture(orders, [named.weight for named in config.sources], seed)
        self._planner = DocumentPlanner(
            config,
            tokenizer=tokenizer,
            tokens=tokens,
            tokens_per_image=tokens_per_image,
            diffusion=diffusion,
            seed=seed,
            image_token_id=None if vlm_config is None else vlm_config.image_token_id,
            template_variables=template_variables,
        )
        self._vlm_config = vlm_config

    def read(self, number: int, map_: Callable[..., Any] = map) -> Window:
        """Window `number`. map_: reads its samples, `map` or the one of a pool of threads.

        Raises StorageError where a text cannot be read: without that text the window would be packed differently.
        """
        size = self._config.pack_window
        refs = self._mixture.samples(range(number * size, (number + 1) * size))
        parts = [refs[i : i + READ_TOGETHER] for i in range(0, size, READ_TOGETHER)]
        read: list[tuple[SampleRef, Sample | SkippedSample]] = list(chain.from_iterable(map_(self._read, parts)))
        samples = [(ref, sample) for ref, sample in read if not isinstance(sample, SkippedSample)]
        damaged = [sample for _, sample in read if isinstance(sample, SkippedSample)]
        plans: list[Plan] = []
        for plan in self._planner.plan(samples):
            if isinstance(plan, SkippedSample):
                damaged.append(plan)
            else:
                plans.append(plan)
        return Window(self._pack(plans, damaged, number))

    def _read(self, refs: list[SampleRef]) -> list[tuple[SampleRef, Sample | SkippedSample]]:
        samples: list[tuple[SampleRef, Sample | SkippedSample]] = []
        for ref in refs:
            try:
                sample = self._sources[ref.source][ref.index]
                if self._vlm_config is not None:
                    sample = with_input_images(sample, self._vlm_config)
                samples.append((ref, sample))
            except StorageError:
                raise
            except (ValueError, OSError) as error:
                name = self._config.sources[ref.source].name
                samples.append((ref, SkippedSample(f"{name}, sample {ref.index}", str(error))))
        return samples

    def _pack(self, plans: list[Plan], damaged: list[SkippedSample], number: int) -> tuple[PackedSequence, ...]:
        if not plans:
            return (PackedSequence((), tuple(damaged)),)
        lengths = np.array([plan.document.num_tokens for plan in plans], np.int64)
        packed = pack_documents(lengths, self._config.seq_len, len(plans))
        # The packer may give the sequences of many short documents first. They are shuffled, so that the first steps of
        # a window are like its last ones. The name "rows" is part of the seed: another one would change the data.
        order = Permutation(len(packed), self._seed, number, "rows").take(np.arange(len(packed)))
        # Damaged samples are shared out evenly, so that SkipLog sees their share and not all of a window at once.
        shares = np.linspace(0, len(damaged), len(packed) + 1).astype(int)
        return tuple(
            PackedSequence(tuple(plans[i] for i in packed[place]), tuple(damaged[first:end]))
            for place, first, end in zip(order, shares, shares[1:], strict=False)
        )
