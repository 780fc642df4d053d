"""What is the server doing? Counts and times in Prometheus' text format, version 0.0.4."""

import bisect
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from lmfusion.generation.worker import WorkerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms."""
FINISH_REASONS = ("stop", "length", "cancelled", "error")


class Histogram:
    """How many values were at most as large as each bound."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> list[str]:
        totals = list(itertools.accumulate(self._counts))
        labels = [*map(str, self._bounds), "+Inf"]
        buckets = [f'{name}_bucket{{le="{label}"}} {total}' for label, total in zip(labels, totals, strict=True)]
        return [*buckets, f"{name}_sum {self._sum:.6f}", f"{name}_count {totals[-1]}"]


class Metrics:
    """What the server counts itself, beside the engine's worker. Used in the event loop's thread alone."""

    def __init__(self) -> None:
        self.first_event = Histogram()
        """Seconds from a request's arrival to the first text or image."""
        self.latency = Histogram()
        """Seconds from a request's arrival to its end."""
        self._statuses: Counter[int] = Counter()

    def count_status(self, status: int) -> None:
        self._statuses[status] += 1

    def render(self, stats: WorkerStats) -> str:
        """The page that Prometheus reads."""
        reasons = dict.fromkeys(FINISH_REASONS, 0) | stats.num_finished
        statuses = {str(status): number for status, number in self._statuses.items()}
        lines = [
            *_metric("engine_up", "gauge", "1 while requests can be answered", int(not stats.problem)),
            *_metric("requests_waiting", "gauge", "requests in the queue", stats.num_waiting),
            *_metric("requests_running", "gauge", "requests in the batch", stats.num_running),
            *_labelled("requests_finished_total", "requests by how they ended", "reason", reasons),
            *_metric("requests_rejected_total", "counter", "requests that found the queue full", self._statuses[429]),
            *_labelled("http_responses_total", "answers by HTTP status", "status", statuses),
            *_metric("prompt_tokens_total", "counter", "rows of finished prompts", stats.num_prompt_tokens),
            *_metric("new_tokens_total", "counter", "text tokens of finished answers", stats.num_new_tokens),
            *_metric("images_total", "counter", "images finished", stats.num_images),
            *_metric("denoise_steps_total", "counter", "steps of finished images", stats.num_denoise_steps),
            *_metric("cache_slots", "gauge", "slots of the key-value cache", stats.num_slots),
            *_metric("cache_slots_used", "gauge", "slots that requests hold", stats.num_slots_used),
        ]
        for name, what, histogram in (
            ("first_event_seconds", "from arrival to the first text or image", self.first_event),
            ("request_seconds", "from arrival to the end", self.latency),
        ):
            lines += [*_head(name, "histogram", what), *histogram.lines(f"lmfusion_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP lmfusion_{name} {what}", f"# TYPE lmfusion_{name} {kind}"]


def _metric(name: str, kind: str, what: str, value: int) -> list[str]:
    return [*_head(name, kind, what), f"lmfusion_{name} {value}"]


def _labelled(name: str, what: str, label: str, values: Mapping[str, int]) -> list[str]:
    rows = [f'lmfusion_{name}{{{label}="{key}"}} {value}' for key, value in values.items()]
    return [*_head(name, "counter", what), *rows]
