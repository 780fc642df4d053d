"""What does a suite answer with? Scores with their intervals, tables and pictures, as JSON holds them."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number, and what it was made of."""

    name: str
    value: float
    low: float | None = None
    """Lower end of a 95 % bootstrap interval; None where there is none."""
    high: float | None = None
    count: int = 0
    """Samples it was computed from."""
    details: dict[str, Any] = field(default_factory=dict)
    """What makes it comparable: name of the extractor, sha256 of its weights, resize, tokenizer ... JSON values."""

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"the score {self.name} has one end of an interval; give both, or neither")

    def __str__(self) -> str:
        """The value with four significant digits, and its interval."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


@dataclass(frozen=True)
class SampleImage:
    """A picture of the page."""

    file: str
    """Relative to the folder that the suite was given."""
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts. Raises ValueError for a row that is not as long as the columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, but a row of {len(row)}")


@dataclass(frozen=True)
class SuiteResult:
    """What one suite found."""

    suite: str
    scores: tuple[Score, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for, as the recipe has it."""
    seconds: float = 0.0
    tables: tuple[Table, ...] = ()
    pictures: tuple[SampleImage, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Values that JSON knows; numbers that are none, such as nan, become null."""
        return _plain(asdict(self))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SuiteResult":
        """What `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        scores = tuple(
            Score(**{**s, "value": math.nan if s["value"] is None else s["value"]}) for s in values["scores"]
        )
        tables = tuple(
            Table(t["title"], tuple(t["columns"]), tuple(tuple(row) for row in t["rows"])) for t in values["tables"]
        )
        pictures = tuple(SampleImage(**picture) for picture in values["pictures"])
        return cls(values["suite"], scores, values["settings"], values["seconds"], tables, pictures)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
