"""The metrics as Prometheus reads them: what this process has counted, and what the servers tell at that moment.

What cannot be read in time is absent, and its `..._up` is 0: a scrape neither fails nor hangs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from consumers.db.engine import read_transaction
from consumers.db.portfolio_queries import newest_snapshot_ages
from consumers.ops.metrics import COUNTS, Histogram
from consumers.ops.probes import Probe
from consumers.ops.status import outbox_facts, queue_facts
from consumers.worker.shared_state import DATABASE, REDIS
from producers.settings import TransportSettings

MOST_PORTFOLIOS = 100
SCRAPE_SECONDS = 1.5

# A list of what was found; None when there is nothing of the kind here.
Reading = Callable[[], list[Metric] | None]


def worker_registry(
    waits_for: Callable[[], str | None], queue_facts: Callable[[], Mapping[str, Any]]
) -> CollectorRegistry:
    """Of a worker, which knows what it `waits_for` and where its queue is."""
    registry = CollectorRegistry()
    registry.register(_CountsCollector(waits_for))
    registry.register(_PipelineCollector(lambda: _queue_metrics(queue_facts())))
    ProcessCollector(registry=registry)
    return registry


def pipeline_registry() -> CollectorRegistry:
    """Of a process that does not work itself; it finds the queue by the settings."""
    registry = CollectorRegistry()
    registry.register(_PipelineCollector(_queue_of_the_settings))
    ProcessCollector(registry=registry)
    return registry


class _CountsCollector(Collector):
    def __init__(self, waits_for: Callable[[], str | None]) -> None:
        self._waits_for = waits_for

    def collect(self) -> Iterator[Metric]:
        counted = COUNTS.read()
        events = CounterMetricFamily(
            "trading_history_events", "Deliveries that this process has ended.", labels=("type", "outcome")
        )
        for labels, count in counted.ends.items():
            events.add_metric(labels, count)
        yield events
        yield _histogram("batch_events", "Deliveries ended by one transaction.", counted.batch_events)
        yield _histogram("insert_seconds", "From a transaction's start to its commit.", counted.insert_seconds)
        yield _histogram(
            "lag_seconds", "From an event's own time to the commit of its row; not of imports.", counted.lag_seconds
        )
        yield CounterMetricFamily(
            "trading_history_recovered_jobs",
            "Jobs of dead workers that this one returned to the queue.",
            value=counted.recovered_jobs,
        )
        waiting = GaugeMetricFamily("trading_history_waiting", "1 while this worker waits for it.", labels=("for",))
        waited_for = self._waits_for()
        for what in (DATABASE, REDIS):
            waiting.add_metric([what], float(waited_for == what))
        yield waiting


class _PipelineCollector(Collector):
    """What PostgreSQL, Redis and the outbox tell, each asked beside the others."""

    def __init__(self, queue: Reading) -> None:
        self._probes: list[Probe[list[Metric] | None]] = [
            Probe("database", _database_metrics),
            Probe("redis", queue),
            Probe("outbox", _outbox_metrics),
        ]

    def collect(self) -> Iterator[Metric]:
        deadline = time.monotonic() + SCRAPE_SECONDS
        for probe, reading in [(probe, probe.start()) for probe in self._probes]:
            try:
                found = reading.result(max(deadline - time.monotonic(), 0))
            except Exception:  # the probe has told of it; TimeoutError: not in time
                yield _up(probe.name, up=False)
                continue
            if found is not None:
                yield _up(probe.name, up=True)
                yield from found


def _up(part: str, *, up: bool) -> Metric:
    return _gauge(f"{part}_up", f"1 if the {part} could be read for this scrape, within {SCRAPE_SECONDS:g} s.", up)


def _database_metrics() -> list[Metric]:
    ages = GaugeMetricFamily(
        "trading_history_newest_row_age_seconds",
        f"Since the instant of a portfolio's newest snapshot; of the {MOST_PORTFOLIOS} lowest numbers.",
        labels=("portfolio_id",),
    )
    with read_transaction() as db:
        newest = newest_snapshot_ages(db, MOST_PORTFOLIOS)
    for portfolio_id, seconds in newest:
        ages.add_metric(["none" if portfolio_id is None else str(portfolio_id)], seconds)
    return [ages]


def _queue_of_the_settings() -> list[Metric] | None:
    settings = TransportSettings.from_environment()
    if settings.redis_url is None:
        return None
    with settings.redis() as redis:
        return _queue_metrics(queue_facts(redis, settings.queue))


def _queue_metrics(facts: Mapping[str, Any]) -> list[Metric]:
    found = [
        _gauge("queue_jobs", "Jobs that wait in the queue.", facts["queued"]),
        _gauge("held_jobs", "Jobs that workers hold.", facts["held"]),
        _gauge("failed_jobs", "Jobs in RQ's failed registry: refused for good.", facts["failed"]),
        _gauge("workers", "Workers of the queue that are alive, by their registration.", facts["workers"]),
    ]
    # Unknown is when a job waits that does not tell since when.
    oldest = facts["oldest_waiting_seconds"] if facts["queued"] else 0
    if oldest is not None:
        found.append(_gauge("queue_oldest_age_seconds", "Since the job at the front of the queue came.", oldest))
    return found


def _outbox_metrics() -> list[Metric] | None:
    facts = outbox_facts(TransportSettings.from_environment())
    if facts is None:
        return None
    entries = GaugeMetricFamily(
        "trading_history_outbox_entries", "Entries of this machine's outbox that are not stored.", labels=("state",)
    )
    for state in ("pending", "sent", "rejected"):
        entries.add_metric([state], facts[state])
    oldest = facts["oldest_unsettled_seconds"] or 0
    return [entries, _gauge("outbox_oldest_age_seconds", "Since the oldest pending or sent one was recorded.", oldest)]


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"trading_history_{name}", documentation, value=float(value))


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, _accumulated(histogram.counts), strict=True))
    return HistogramMetricFamily(
        f"trading_history_{name}", documentation, buckets=buckets, sum_value=float(histogram.sum)
    )


def _accumulated(counts: Iterable[int]) -> Iterator[float]:
    total = 0
    for count in counts:
        total += count
        yield float(total)
