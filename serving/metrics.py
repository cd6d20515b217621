"""Prometheus metrics of one server: latency per route and stage, candidates, problems."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """One registry per server, so that two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stages = Histogram(
            "polytower_stage_seconds",
            "Time in one stage of an answer",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._requests = Histogram(
            "polytower_request_seconds",
            "Time of a request",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._candidates = Histogram(
            "polytower_candidates", "Candidates per answer", ["interests"], buckets=(0, 1, 10, 50, 100, 200, 500, 1000),
            registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "polytower_batch_size", "Questions of one forward pass", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )  # fmt: skip
        self._problems = Counter("polytower_problems", "Problem responses", ["type"], registry=self.registry)
        self.in_flight = Gauge("polytower_requests_in_flight", "Requests being answered", registry=self.registry)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage: key, pool, state, history, tower, encode, search, titles, features, similarity, write."""
        start = perf_counter()
        try:
            yield
        finally:
            self._stages.labels(name).observe(perf_counter() - start)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts one finished request. route: its template, so that ids do not become labels."""
        self._requests.labels(route, str(status)).observe(seconds)

    def candidates(self, interests: str, count: int) -> None:
        """Counts the candidates of one answer."""
        self._candidates.labels(interests).observe(count)

    def batch(self, model: str, size: int) -> None:
        """Counts one forward pass that answered `size` questions at once."""
        self._batches.labels(model).observe(size)

    def problem(self, slug: str) -> None:
        """Counts one problem."""
        self._problems.labels(slug).inc()

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
