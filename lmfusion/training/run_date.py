"""The date of a run, for chat templates that ask for it: the same at every start and on every rank."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lmfusion.data.config import KINDS_WITH_CONVERSATIONS
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World


def with_date(config: RunConfig, world: World) -> RunConfig:
    """`config` with `data.today` set: to its own value, else to the date of the run's first start, else to today.

    The run's folder keeps the date. Without a source that can hold conversations, `config` is returned unchanged.
    """
    kinds = {source.kind for source in (*config.data.sources, *config.validation.sources)}
    if config.data.today is not None or not kinds & set(KINDS_WITH_CONVERSATIONS):
        return config
    date = _kept(Path(config.output) / "config.yaml") if world.rank == 0 else None
    days = (date or datetime.date.today()).toordinal() if world.rank == 0 else 0
    [days] = world.sum_integers([days])  # rank 0 decides, since clocks may differ
    return replace(config, data=replace(config.data, today=datetime.date.fromordinal(int(days)).isoformat()))


def _kept(path: Path) -> datetime.date | None:
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        return datetime.date.fromisoformat(values["data"]["today"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None  # the run has not begun, or it began before dates were kept
