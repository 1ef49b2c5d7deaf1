"""What /metrics reports, in the text format of Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Telemetry:
    """Counters of the server; names begin with `ivr_`."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("ivr_http_requests", "HTTP requests", ("route", "status"), registry=registry)
        self.answers = Counter("ivr_answers", "Answers that have ended", ("state",), registry=registry)
        self.refused = Counter("ivr_refused", "Requests refused because too many waited", registry=registry)
        self.tokens = Counter("ivr_tokens", "Answer tokens drawn", registry=registry)
        self.images = Counter("ivr_images", "Images drawn to the end", registry=registry)
        self.calls = Counter("ivr_model_calls", "Model calls of all engines", registry=registry)
        self.slots = Gauge("ivr_slots", "Answers that one engine can have in progress", registry=registry)
        self.in_use = Gauge("ivr_slots_in_use", "Answers in progress", registry=registry)
        self.waiting = Gauge("ivr_waiting", "Requests in the queue", registry=registry)

        def seconds(name: str, meaning: str) -> Histogram:
            return Histogram(f"ivr_{name}_seconds", meaning, buckets=_SECONDS, registry=registry)

        self.queue_seconds = seconds("queue", "Wait for a slot")
        self.first_row_seconds = seconds("first_row", "From a request to the first image row that was shown")
        self.answer_seconds = seconds("answer", "Time in a slot")

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
