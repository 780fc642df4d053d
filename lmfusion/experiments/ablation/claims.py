"""Checks claims about variants, such as an order of them, on the values that the variants ended with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from lmfusion.experiments.ablation.config import METRICS, ClaimConfig

Values = Mapping[str, float | None]
"""Metrics of one variant by name. One that was not measured is None or missing."""


@dataclass(frozen=True)
class Finding:
    """The outcome of checking one claim."""

    claim: str
    metric: str
    expected: str
    """The claim in terms of the variants."""
    found: bool | None
    """Whether the claim holds. None: a value that it needs was not measured."""
    is_exact: bool
    """Whether values must agree to the last bit."""
    values: dict[str, float | None]
    """The values that decided: the final ones of the variants, and "<variant> at the start" if the claim is about a
    change."""


def check_claim(config: ClaimConfig, final: Mapping[str, Values], start: Mapping[str, Values]) -> Finding:
    """Check a claim. final, start: values of each variant after its last and before its first step."""
    metric = config.metric
    values = {name: final.get(name, {}).get(metric) for name in config.variants}
    if config.order is not None:
        sign = " ≤ " if METRICS[metric] == "lower" else " ≥ "
        expected = sign.join(config.order)
        found = _all(_is_no_worse(metric, values[a], values[b]) for a, b in pairwise(config.order))
        return Finding(config.claim, metric, expected, found, False, values)
    names = ", ".join(config.variants)
    before = {name: start.get(name, {}).get(metric) for name in config.variants}
    if config.keeps is not None:
        expected = f"{names}: as before the first step, to the last bit"
        found = _all(_is_equal(before[name], values[name]) for name in config.variants)
    else:
        expected = f"{names}: worse than before the first step"
        found = _all(_is_worse(metric, values[name], before[name]) for name in config.variants)
    both = {
        key: value
        for name in config.variants
        for key, value in ((f"{name} at the start", before[name]), (name, values[name]))
    }
    return Finding(config.claim, metric, expected, found, config.keeps is not None, both)


def _all(holds: Iterable[bool | None]) -> bool | None:
    """False if one of them is False, else None if one is unknown, else True."""
    known = list(holds)
    if False in known:
        return False
    return None if None in known else True


def _is_no_worse(metric: str, a: float | None, b: float | None) -> bool | None:
    if a is None or b is None:
        return None
    return a <= b if METRICS[metric] == "lower" else a >= b


def _is_worse(metric: str, a: float | None, b: float | None) -> bool | None:
    no_worse = _is_no_worse(metric, a, b)
    return None if no_worse is None else not no_worse


def _is_equal(a: float | None, b: float | None) -> bool | None:
    return None if a is None or b is None else a == b
