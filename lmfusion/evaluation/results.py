"""The result of a suite: scores with their intervals, tables and images, and their form in JSON."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number, and what it was computed from."""

    name: str
    value: float
    low: float | None = None
    """Lower end of a 95 % bootstrap interval; None if there is no interval."""
    high: float | None = None
    count: int = 0
    """Samples it was computed from."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a comparison needs to know: extractor, sha256 of its weights, resize, tokenizer, ... JSON values."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"score {self.name} must have both ends of its interval or neither, got one")

    def __str__(self) -> str:
        """The value with four significant digits, and its interval."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class SampleImage:
    """An image of the page."""

    file: str
    """Path relative to the folder of the suite."""
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts. Raises ValueError for a row without exactly one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"rows of table {self.title!r} must have {len(self.columns)} cells, got {len(row)}")


@dataclass(frozen=True)
class SuiteResult:
    """The result of one suite."""

    suite: str
    scores: tuple[Score, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """The suite's configuration, as in the recipe."""
    seconds: float = 0.0
    tables: tuple[Table, ...] = ()
    pictures: tuple[SampleImage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values. Numbers that JSON does not have, such as nan, become null."""
        return _json_values(asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SuiteResult":
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        scores = tuple(
            Score(**{**s, "value": math.nan if s["value"] is None else s["value"]}) for s in values["scores"]
        )
        tables = tuple(
            Table(t["title"], tuple(t["columns"]), tuple(tuple(row) for row in t["rows"])) for t in values["tables"]
        )
        pictures = tuple(SampleImage(**picture) for picture in values["pictures"])
        return cls(values["suite"], scores, values["settings"], values["seconds"], tables, pictures)


def _json_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
