"""Which documents share a row? Windows of consecutive samples, each packed by itself before any image is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from lmfusion.data.pipeline.documents import Damage, DocumentPlanner, Plan
from lmfusion.data.pipeline.input_images import with_seen_images
from lmfusion.data.pipeline.mixture import Draw, Mixture
from lmfusion.data.pipeline.order import Permutation, SourceOrder
from lmfusion.data.samples import DataConfig, Sample, Source
from lmfusion.data.storage.files import StorageError
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.diffusion import DiffusionConfig
from lmfusion_kernels.layout.packing import pack_documents

READ_TOGETHER = 32
"""Samples of a window that one thread reads, one after another."""


@dataclass(frozen=True, slots=True)
class Row:
    """The documents of one row, in the order they are drawn in."""

    plans: tuple[Plan, ...]
    damaged: tuple[Damage, ...] = ()
    """The row's share of its window's samples that could not be read: they have no place in a row, since their lengths
    are not known, but they count with the row."""

    @property
    def num_samples(self) -> int:
        return len(self.plans) + len(self.damaged)

    @property
    def num_slots_used(self) -> int:
        return sum(plan.document.num_tokens for plan in self.plans)

    @property
    def num_cut(self) -> int:
        return sum(plan.is_cut for plan in self.plans)


@dataclass(frozen=True, slots=True)
class Window:
    """What `pack_window` consecutive samples became."""

    rows: tuple[Row, ...]
    """One at least: where every sample is damaged, a row without documents."""

    @property
    def damaged(self) -> tuple[Damage, ...]:
        """Samples that could not be read."""
        return tuple(chain.from_iterable(row.damaged for row in self.rows))


class WindowReader:
    """Reads and packs windows. Each is a pure function of the configuration and its number.

    `sources` are those of `config.sources`. vlm_config: of a vision-language model, whose images that are seen are read
    for their sizes. Raises ValueError for a source without samples, and for weights and rows that are too small.
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
        """The window of that number. `map_` reads its samples: `map`, or that of a pool of threads.

        Raises StorageError where a text cannot be read: without it the window would be packed otherwise.
        """
        size = self._config.pack_window
        draws = self._mixture.draw(range(number * size, (number + 1) * size))
        parts = [draws[i : i + READ_TOGETHER] for i in range(0, size, READ_TOGETHER)]
        read: list[tuple[Draw, Sample | Damage]] = list(chain.from_iterable(map_(self._read, parts)))
        samples = [(draw, sample) for draw, sample in read if not isinstance(sample, Damage)]
        damaged = [sample for _, sample in read if isinstance(sample, Damage)]
        plans: list[Plan] = []
        for plan in self._planner.plan(samples):
            if isinstance(plan, Damage):
                damaged.append(plan)
            else:
                plans.append(plan)
        return Window(self._pack(plans, damaged, number))

    def _read(self, draws: list[Draw]) -> list[tuple[Draw, Sample | Damage]]:
        samples: list[tuple[Draw, Sample | Damage]] = []
        for draw in draws:
            try:
                sample = self._sources[draw.source][draw.index]
                if self._vlm_config is not None:
                    sample = with_seen_images(sample, self._vlm_config)
                samples.append((draw, sample))
            except StorageError:
                raise
            except (ValueError, OSError) as error:
                name = self._config.sources[draw.source].name
                samples.append((draw, Damage(f"{name}, sample {draw.index}", str(error))))
        return samples

    def _pack(self, plans: list[Plan], damaged: list[Damage], number: int) -> tuple[Row, ...]:
        if not plans:
            return (Row((), tuple(damaged)),)
        lengths = np.array([plan.document.num_tokens for plan in plans], np.int64)
        rows = pack_documents(lengths, self._config.row_tokens, len(plans))
        # The packer's rows may begin with those of many documents; steps shall not differ in kind with their place
        order = Permutation(len(rows), self._seed, number, "rows").take(np.arange(len(rows)))
        # Shared out evenly, so that whoever counts sees the share that is damaged, not a window's all at once
        shares = np.linspace(0, len(damaged), len(rows) + 1).astype(int)
        return tuple(
            Row(tuple(plans[i] for i in rows[row]), tuple(damaged[first:end]))
            for row, first, end in zip(order, shares, shares[1:], strict=False)
        )
