"""Did it turn out as claimed? Orderings of variants, judged on the values they ended with."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from lmfusion.experiments.ablation.config import METRICS, OrderingConfig

Values = Mapping[str, float | None]
"""Of one variant: metrics by name; None, or no key, where one was not measured."""


@dataclass(frozen=True)
class Finding:
    """What was found of one claim."""

    claim: str
    metric: str
    expected: str
    """In terms of the variants."""
    found: bool | None
    """None: a value that it needs was not measured."""
    is_exact: bool
    """Whether it is a matter of the last bit."""
    values: dict[str, float | None]
    """What it was judged on: the variants' final values and, where they were compared with it, "<variant> at the
    start"."""


def judge(ordering: OrderingConfig, final: Mapping[str, Values], start: Mapping[str, Values]) -> Finding:
    """Whether a claim holds of the `final` values of the variants and, before their first step, their `start`."""
    metric = ordering.metric
    values = {name: final.get(name, {}).get(metric) for name in ordering.variants}
    if ordering.order is not None:
        sign = " ≤ " if METRICS[metric] == "lower" else " ≥ "
        expected = sign.join(ordering.order)
        found = _all(_is_no_worse(metric, values[a], values[b]) for a, b in pairwise(ordering.order))
        return Finding(ordering.claim, metric, expected, found, False, values)
    names = ", ".join(ordering.variants)
    before = {name: start.get(name, {}).get(metric) for name in ordering.variants}
    if ordering.keeps is not None:
        expected = f"{names}: as before the first step, to the last bit"
        found = _all(_is_equal(before[name], values[name]) for name in ordering.variants)
    else:
        expected = f"{names}: worse than before the first step"
        found = _all(_is_worse(metric, values[name], before[name]) for name in ordering.variants)
    both = {
        key: value
        for name in ordering.variants
        for key, value in ((f"{name} at the start", before[name]), (name, values[name]))
    }
    return Finding(ordering.claim, metric, expected, found, ordering.keeps is not None, both)


def _all(answers: Iterable[bool | None]) -> bool | None:
    """False if one of them is; else None if one is unknown."""
    known = list(answers)
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
