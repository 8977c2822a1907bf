"""What Prometheus reads: counted in the engine's thread as it happens, gauges taken from the engine's last report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from assay.engine.request import Request
from assay.engine.runner import Token

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OUTCOMES = ("stop", "length", "cancelled", "deadline", "error", "refused")
MEDIA = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics, in a registry of its own. Implements the worker's Observer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ttft = Histogram(
            "assay_ttft_seconds", "Arrival to the first token.", registry=self.registry, buckets=SECONDS
        )
        self.between = Histogram(
            "assay_inter_token_seconds", "Token to token.", registry=self.registry, buckets=SECONDS
        )
        self.queued = Histogram(
            "assay_queue_seconds", "Arrival to the first step.", registry=self.registry, buckets=SECONDS
        )
        self.read = Counter("assay_prompt_tokens", "Tokens of accepted prompts.", registry=self.registry)
        self.written = Counter("assay_completion_tokens", "Tokens of replies.", registry=self.registry)
        self.outcomes = Counter("assay_requests", "Replies by how they ended.", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:
            self.outcomes.labels(outcome)

    def submitted(self, requests: Sequence[Request]) -> None:
        self.read.inc(sum(len(request.source or request.prompt) for request in requests))

    def started(self, waited: float) -> None:
        self.queued.observe(waited)

    def said(self, token: Token, began: float, last: float | None, at: float) -> None:
        self.written.inc()
        if last is None:
            self.ttft.observe(at - began)
        else:
            self.between.observe(at - last)

    def ended(self, outcome: str) -> None:
        self.outcomes.labels(outcome).inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)


class EngineReport(Collector):
    """The engine's own numbers, as they stood after its last step."""

    def __init__(self, stats: Callable[[], Mapping[str, Any]]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        for name, (key, text) in GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(name, text, value=stats[key])
        for name, (key, text) in COUNTERS.items():
            if key in stats:
                yield CounterMetricFamily(name, text, value=stats[key])


GAUGES = {
    "assay_running": ("running", "Sequences that are being computed."),
    "assay_waiting": ("waiting", "Sequences that wait for room."),
    "assay_pages_used": ("pages_used", "Cache pages that running sequences hold."),
    "assay_pages_cached": ("pages_cached", "Cache pages that nobody holds, kept for prompts that begin alike."),
    "assay_pages_free": ("pages_free", "Cache pages that nobody holds and in which nothing stands."),
    "assay_pages_total": ("pages_total", "Cache pages there are."),
}
COUNTERS = {"assay_prefix_hit_tokens": ("hit_tokens", "Prompt tokens that were found stored and not computed.")}
