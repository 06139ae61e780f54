"""What /metrics tells, under the names that vLLM's dashboards and routers read.

Times are from one process's monotonic clock; the time to the first token starts when the HTTP
request came, its tokenisation included. This module imports no jax.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from decode.server.link import Link

if TYPE_CHECKING:
    from decode.request import Request

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKENS = tuple(1 << i for i in range(18))


class Metrics:
    """One registry for one server; `text` renders it."""

    def __init__(self, link: Link, model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(link, model))
        self._model = model

        def histogram(name: str, told: str, buckets: Iterable[float]) -> Any:
            made = Histogram(
                f"vllm:{name}", told, ["model_name"], buckets=tuple(buckets),
                registry=self._registry,
            )  # fmt: skip
            return made.labels(model)

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", told, ["model_name", *labels], registry=self._registry)

        self.first = histogram("time_to_first_token_seconds", "From arrival.", _SECONDS)
        self.between = histogram("inter_token_latency_seconds", "Between outputs.", _SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self.prompts = histogram("request_prompt_tokens", "Of each request.", _TOKENS)
        self.answers = histogram("request_generation_tokens", "Of each request.", _TOKENS)
        self._read = counter("prompt_tokens", "Prompt tokens read.").labels(model)
        self._written = counter("generation_tokens", "Tokens generated.").labels(model)
        self._ends = counter("request_success", "Requests by how they ended.", "finished_reason")

    def watch(self, request: Request) -> Watch:
        """Follows one request."""
        return Watch(self, len(request.prompt), request.arrival)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)


class Watch:
    """Times of one request."""

    def __init__(self, metrics: Metrics, prompt: int, arrival: float) -> None:
        self._metrics, self._prompt, self._arrival = metrics, prompt, arrival
        self._last, self._tokens = 0.0, 0

    def take(self, tokens: int, finish: str | None) -> None:
        """An output of so many tokens came."""
        now, metrics = time.monotonic(), self._metrics
        if tokens:
            if not self._last:
                metrics.first.observe(now - self._arrival)
                metrics.prompts.observe(self._prompt)
                metrics._read.inc(self._prompt)
            else:
                metrics.between.observe((now - self._last) / tokens)
            self._last = now
            self._tokens += tokens
            metrics._written.inc(tokens)
        if finish is not None:
            metrics._ends.labels(metrics._model, finish).inc()
            metrics.whole.observe(now - self._arrival)
            metrics.answers.observe(self._tokens)


class _Engine(Collector):
    """The engine's own figures, as it last told them."""

    def __init__(self, link: Link, model: str) -> None:
        self._link, self._model = link, model

    def collect(self) -> Iterable[Metric]:
        stats = self._link.stats
        if stats is None:
            return
        pages = stats.pages_used + stats.pages_cached + stats.pages_free
        gauges = {
            "num_requests_running": (stats.running, "Requests in the batch."),
            "num_requests_waiting": (stats.waiting, "Requests in the queue."),
            "kv_cache_usage_perc": (stats.pages_used / max(1, pages), "Pages in use, 0 to 1."),
        }
        counters = {
            "prefix_cache_queries": (stats.prefix_queries, "Prompt tokens looked up."),
            "prefix_cache_hits": (stats.prefix_hits, "Prompt tokens found in the cache."),
            "num_preemptions": (stats.preemptions, "Requests put back into the queue."),
            "spec_decode_num_draft_tokens": (stats.drafted, "Tokens drafted."),
            "spec_decode_num_accepted_tokens": (stats.accepted, "Drafted tokens accepted."),
            "engine_restarts": (self._link.restarts, "Engines started after one had died."),
            "compiles_after_ready": (stats.compiles, "Programs compiled while serving."),
        }
        for kind, family in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (value, told) in family.items():
                made = kind(f"vllm:{name}", told, labels=["model_name"])
                made.add_metric([self._model], value)
                yield made
