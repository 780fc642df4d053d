"""Which attention kernel was measured to be fastest on this device? The rows of table.json.

A row says: from `min_tokens` rows of a batch on, up to the next row that is alike in all else, `kernel` was the
fastest. The file holds what was measured and nothing else; where it says nothing, the default order decides. propose.py
makes rows from the results of benchmarks.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PATH = Path(__file__).with_name("table.json")
DIRECTIONS = ("forward", "training")
"""The forward alone, or forward and backward together: a layer's backward has to use what its forward kept."""


@dataclass(frozen=True)
class Row:
    """One decision of the table."""

    capability: str
    """Compute capability of the device, "9.0"."""
    dtype: str
    """"bfloat16", "float16" or "float32"."""
    head_dim: int
    direction: str
    """"forward" or "training"."""
    min_tokens: int
    kernel: str


@lru_cache(maxsize=1)
def load() -> tuple[Row, ...]:
    """The rows of table.json. Raises ValueError where the file has other fields or an unknown direction."""
    return parse(PATH.read_text())


def parse(text: str) -> tuple[Row, ...]:
    rows = []
    for entry in json.loads(text):
        try:
            row = Row(**entry)
        except TypeError as error:
            raise ValueError(f"{PATH.name} has the row {entry}, which does not fit: {error}") from None
        if row.direction not in DIRECTIONS:
            raise ValueError(f"{PATH.name} has the direction {row.direction!r}; known: {', '.join(DIRECTIONS)}")
        rows.append(row)
    return tuple(rows)


@lru_cache
def measured(capability: tuple[int, int], dtype: str, head_dim: int) -> dict[str, list[tuple[int, str]]]:
    """By direction: (min_tokens, kernel) in ascending order, for one kind of call."""
    result: dict[str, list[tuple[int, str]]] = {direction: [] for direction in DIRECTIONS}
    for row in load():
        if (row.capability, row.dtype, row.head_dim) == (f"{capability[0]}.{capability[1]}", dtype, head_dim):
            result[row.direction].append((row.min_tokens, row.kernel))
    return {direction: sorted(entries) for direction, entries in result.items()}
