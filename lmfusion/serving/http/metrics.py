"""Prometheus metrics of the server: requests, responses, tokens, images and times."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmfusion.generation.worker import WorkerStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets, in seconds."""
FINISH_REASONS = ("stop", "length", "cancelled", "error")


class ServerMetrics:
    """The metrics of one server, in a registry of its own.

    Args:
        stats: returns the current counts of the engine's worker.
    """

    def __init__(self, stats: Callable[[], WorkerStats]) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "lmfusion_http_responses", "Responses by HTTP status", ["status"], registry=self._registry
        )
        self._rejected = Counter(
            "lmfusion_requests_rejected", "Requests rejected because the server was full", registry=self._registry
        )
        self.first_event = Histogram(
            "lmfusion_first_event_seconds",
            "Seconds from a request's arrival to its first text or image",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.latency = Histogram(
            "lmfusion_request_seconds",
            "Seconds from a request's arrival to its end",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._registry.register(_WorkerCollector(stats))

    def count_status(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(str(status)).inc()
        if status == 429:
            self._rejected.inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _WorkerCollector(Collector):
    """Metrics that the engine's worker counts itself. They are read when Prometheus asks for them."""

    def __init__(self, stats: Callable[[], WorkerStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        """Without it, registering would call `collect`."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text, value in (
            ("engine_up", "1 while requests can be answered", int(not stats.problem)),
            ("requests_waiting", "Requests in the queue", stats.num_waiting),
            ("requests_running", "Requests in the batch", stats.num_running),
            ("cache_slots", "Slots of the key-value cache", stats.num_slots),
            ("cache_slots_used", "Slots that requests hold", stats.num_slots_used),
        ):
            yield GaugeMetricFamily(f"lmfusion_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of the prompts of finished requests", stats.num_prompt_tokens),
            ("new_tokens", "Text tokens of finished answers", stats.num_new_tokens),
            ("images", "Finished images", stats.num_images),
            ("denoise_steps", "Denoising steps of finished images", stats.num_denoise_steps),
        ):
            yield CounterMetricFamily(f"lmfusion_{name}", text, value)
        finished = CounterMetricFamily("lmfusion_requests_finished", "Requests by finish reason", labels=["reason"])
        for reason, number in (dict.fromkeys(FINISH_REASONS, 0) | stats.num_finished).items():
            finished.add_metric([reason], number)
        yield finished
