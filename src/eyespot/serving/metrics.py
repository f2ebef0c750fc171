"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, each with the name of a model as its label.

    Source: names follow https://prometheus.io/docs/practices/naming/
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"eyespot_{name}", text, ["model", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"eyespot_{name}", text, ["model"], registry=self.registry, buckets=buckets)

        self.answers = counter("answers", "Answers that have ended, by how", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, those of pictures included")
        self.kept_tokens = counter("kept_prompt_tokens", "Those of them that were in memory and needed no work")
        self.answer_tokens = counter("answer_tokens", "Tokens of answers")
        self.batch_rows = histogram("batch_rows", "Answers that grew together in one step", ROWS)
        self.waited = histogram("queue_seconds", "From the arrival of a request to its first work", SECONDS)
        self.first_token = histogram("first_token_seconds", "From the arrival of a request to its first token", SECONDS)
        self.answered = histogram("answer_seconds", "From the arrival of a request to the end of its answer", SECONDS)
        self.requests = Counter(
            "eyespot_http_requests", "Requests, by path and status", ["path", "status"], registry=self.registry
        )
        self._waiting = Gauge("eyespot_waiting", "Requests that wait for a row", ["model"], registry=self.registry)
        self._running = Gauge("eyespot_running", "Answers that are growing", ["model"], registry=self.registry)

    def watch(self, model: str, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Ask for the lengths of a queue and of a batch whenever somebody asks for the metrics."""
        self._waiting.labels(model).set_function(waiting)
        self._running.labels(model).set_function(running)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)
