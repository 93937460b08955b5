"""Counts and times for Prometheus, for each adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from inlay.serve.tickets import Ticket

from .names import Named

if TYPE_CHECKING:
    from inlay.serve.engine import Engine

__all__ = ["Tallies"]

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Tallies:
    """What /metrics says. Only models that were found are counted, so that no client can make names."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Stats(engine))  # pyright: ignore[reportArgumentType]
        own: Any = {"registry": self.registry, "namespace": "inlay"}
        by = ("adapter",)
        self.requests = Counter("requests", "Requests that have ended, by how", (*by, "outcome"), **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", by, **own)
        self.cached_tokens = Counter("cached_tokens", "Tokens of prompts that had been read before", by, **own)
        self.completion_tokens = Counter("completion_tokens", "Tokens of answers", by, **own)
        self.texts = Counter("classified_texts", "Texts that were classified", by, **own)
        self.first = Histogram(
            "time_to_first_token_seconds", "From a request to its first token", by, buckets=FIRST, **own
        )
        self.between = Histogram(
            "time_between_tokens_seconds", "Between two tokens of a request with one answer", by, buckets=BETWEEN, **own
        )
        self._last: dict[Ticket, float] = {}

    def token(self, named: Named, ticket: Ticket) -> None:
        """A token has come."""
        now, last = time.monotonic(), self._last.get(ticket)
        self._last[ticket] = now
        if last is not None and ticket.ask.sampling.n == 1:
            self.between.labels(_label(named)).observe(now - last)

    def ended(self, named: Named, usage: Mapping[str, Any], tickets: Sequence[Ticket], outcome: str) -> None:
        label = _label(named)
        self.requests.labels(label, outcome).inc()
        self.prompt_tokens.labels(label).inc(usage["prompt_tokens"])
        self.completion_tokens.labels(label).inc(usage["completion_tokens"])
        self.cached_tokens.labels(label).inc(usage["prompt_tokens_details"]["cached_tokens"])
        for ticket in tickets:
            self._last.pop(ticket, None)
            if ticket.first is not None:
                self.first.labels(label).observe(ticket.first - ticket.submitted)

    def classified(self, named: Named, texts: int) -> None:
        self.requests.labels(_label(named), "done").inc()
        self.texts.labels(_label(named)).inc(texts)

    def page(self) -> bytes:
        return generate_latest(self.registry)


def _label(named: Named) -> str:
    """A mix counts by its adapters, whatever the weights."""
    return " + ".join(sorted(named.adapters)) or named.title


class _Stats:
    """The engine's own numbers, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for name, words, value in (
            ("running", "Prompts whose answers are being written", stats.running),
            ("waiting", "Prompts that wait for their turn", stats.waiting),
            ("store_blocks_used", "Blocks of the key-value store that are in use", stats.blocks_used),
            ("store_blocks", "Blocks of the key-value store", stats.blocks),
        ):
            yield GaugeMetricFamily(f"inlay_{name}", words, value)
        yield CounterMetricFamily("inlay_tokens", "Tokens that the engine has made", stats.tokens)
        yield CounterMetricFamily("inlay_preempted", "Rows that made room and read again", stats.preempted)
        waiting = GaugeMetricFamily("inlay_waiting_by_key", "Prompts of one key that wait", labels=["key"])
        for tenant, own in stats.tenants.items():
            waiting.add_metric([tenant], own.waiting)
        yield waiting
