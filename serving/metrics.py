"""Prometheus metrics of one server: latency per route and stage, candidates, problems."""

from functools import cache
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Stopwatch:
    """A context whose seconds go into a histogram, whatever its end."""

    __slots__ = ("_histogram", "_started")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._histogram.observe(perf_counter() - self._started)


class ServerMetrics:
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
        self._searches = Counter(
            "polytower_searches", "Searches, by what answered them", ["by"], registry=self.registry
        )
        self._index = Gauge(
            "polytower_index", "The index in memory: generation, items, bytes, load_seconds", ["what"],
            registry=self.registry,
        )  # fmt: skip
        self._recall = Histogram(
            "polytower_shadow_recall", "Share of the exact answer that a sampled answer had", ["by"],
            buckets=(0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999, 1), registry=self.registry,
        )  # fmt: skip
        # Finding a series by its labels takes longer than counting in it.
        self._stage, self._request = cache(self._stages.labels), cache(self._requests.labels)
        self.in_flight = Gauge("polytower_requests_in_flight", "Requests being answered", registry=self.registry)

    def stage(self, name: str) -> "Stopwatch":
        """Times one stage: key, pool, state, history, tower, encode, search, titles, features, similarity, write."""
        return Stopwatch(self._stage(name))

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts one finished request. route: its template, so that ids do not become labels."""
        self._request(route, str(status)).observe(seconds)

    def candidates(self, interests: str, count: int) -> None:
        """Counts the candidates of one answer."""
        self._candidates.labels(interests).observe(count)

    def batch(self, model: str, size: int) -> None:
        """Counts one forward pass that answered `size` questions at once."""
        self._batches.labels(model).observe(size)

    def searched(self, by: str) -> None:
        """Counts one search: by memory or by sql."""
        self._searches.labels(by).inc()

    def recall(self, by: str, share: float) -> None:
        """Takes the recall of one sampled answer, found by memory or by sql."""
        self._recall.labels(by).observe(share)

    def index(self, *, generation: int, items: int, size: int, seconds: float) -> None:
        """Describes the index in memory (all 0: there is none). size: bytes; seconds: that the last load took."""
        for what, value in {"generation": generation, "items": items, "bytes": size, "load_seconds": seconds}.items():
            self._index.labels(what).set(value)

    def problem(self, slug: str) -> None:
        """Counts one problem."""
        self._problems.labels(slug).inc()

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
