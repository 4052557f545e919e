"""Counters for Prometheus, in a registry of their own, so that several apps fit into one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from unimm.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What /metrics reports: requests by route and status, batches, tokens, and the queue."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("unimm_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("unimm_batch_seconds", "Seconds that a batch ran", ["kind"], registry=self.registry)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batches = Histogram(
            "unimm_batch_size", "Requests of a batch", ["kind"], buckets=sizes, registry=self.registry
        )
        self.tokens = Counter("unimm_tokens", "Tokens read and generated", ["kind"], registry=self.registry)
        self.waiting = Gauge("unimm_requests_waiting", "Requests in the queue", registry=self.registry)
        self.running = Gauge("unimm_requests_running", "Requests in the running batch", registry=self.registry)

    def watch(self, engine: Engine) -> None:
        """Report the queue and the batches of an engine."""
        self.waiting.set_function(lambda: engine.waiting)
        self.running.set_function(lambda: engine.running)
        engine.on_batch = self._on_batch

    def count_answer(self, path: str, status: int) -> None:
        """Count an answer to a request; `path` is the route's."""
        self.requests.labels(path, str(status)).inc()

    def _on_batch(self, kind: str, size: int, seconds: float) -> None:
        self.batches.labels(kind).observe(size)
        self.seconds.labels(kind).observe(seconds)

    def count_tokens(self, read: int, generated: int) -> None:
        """Count the tokens of an answered request."""
        self.tokens.labels("read").inc(read)
        self.tokens.labels("generated").inc(generated)

    def page(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
