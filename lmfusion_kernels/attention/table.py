"""The measured table: which attention kernel was the fastest on a device, from table.json.

A row says: for batches of at least `min_tokens` tokens, up to the next row that is otherwise equal, `kernel` was the
fastest. The file holds only measurements; without a row the default order decides. propose.py makes rows from benchmark
results.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PATH = Path(__file__).with_name("table.json")
DIRECTIONS = ("forward", "training")
"""The forward alone, or forward and backward together: a layer's backward has to use what its forward kept."""


@dataclass(frozen=True)
class TableRow:
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
def load() -> tuple[TableRow, ...]:
    """The rows of table.json. Raises ValueError if the file has other fields or an unknown direction."""
    return parse(PATH.read_text())


def parse(text: str) -> tuple[TableRow, ...]:
    rows = []
    for entry in json.loads(text):
        try:
            row = TableRow(**entry)
        except TypeError as error:
            raise ValueError(f"a row of {PATH.name} must have the fields of TableRow, got {entry}: {error}") from None
        if row.direction not in DIRECTIONS:
            raise ValueError(
                f"a direction in {PATH.name} must be one of {', '.join(DIRECTIONS)}, got {row.direction!r}"
            )
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
