"""The metrics as Prometheus reads them: the counts of this process, and the pipeline's health at that moment.

A value that cannot be read in time is absent, and its `..._up` is 0: a scrape neither fails nor hangs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from redis import RedisError

from consumers.db.engine import read_transaction
from consumers.db.portfolio_queries import newest_snapshot_ages
from consumers.errors import first_line
from consumers.ops.health import HealthReader, Reading, Value
from consumers.ops.metrics import COUNTS, WAITED_FOR, Histogram
from consumers.ops.outbox_health import OutboxHealth
from consumers.ops.queue_health import QueueHealth, queue_of_settings
from producers.errors import HistoryError

logger = logging.getLogger(__name__)

MOST_PORTFOLIOS = 100
SCRAPE_SECONDS = 1.5

Ages = list[tuple[int | None, float]]


def worker_registry(waits_for: Callable[[], str | None], queue: Callable[[], QueueHealth]) -> CollectorRegistry:
    """Metrics of a worker: `waits_for` names the server that it waits for, `queue` reads its queue."""
    registry = CollectorRegistry()
    registry.register(_CountsCollector(waits_for))
    registry.register(_PipelineCollector(queue))
    ProcessCollector(registry=registry)
    return registry


def pipeline_registry() -> CollectorRegistry:
    """Metrics of a process that is no worker; the queue is that of the settings."""
    registry = CollectorRegistry()
    registry.register(_PipelineCollector(queue_of_settings))
    ProcessCollector(registry=registry)
    return registry


class _CountsCollector(Collector):
    def __init__(self, waits_for: Callable[[], str | None]) -> None:
        self._waits_for = waits_for

    def collect(self) -> Iterator[Metric]:
        counted = COUNTS.read()
        results = counted.results.items()
        documentation = "Deliveries that this process has decided."
        yield _family("events", documentation, ("type", "outcome"), results, CounterMetricFamily)
        yield _histogram("batch_events", "Deliveries decided by one transaction.", counted.batch_events)
        yield _histogram("insert_seconds", "From a transaction's start to its commit.", counted.insert_seconds)
        yield _histogram(
            "lag_seconds", "From an event's own time to the commit of its row; not of imports.", counted.lag_seconds
        )
        yield CounterMetricFamily(
            "trading_history_recovered_jobs",
            "Jobs of dead workers that this one returned to the queue.",
            value=counted.recovered_jobs,
        )
        waited_for = self._waits_for()
        waiting = [((server,), float(waited_for == server)) for server in WAITED_FOR]
        yield _family("waiting", "1 while this worker waits for it.", ("for",), waiting)


class _PipelineCollector(Collector):
    """The health of database, queue and outbox. A failure is logged once, and so is its end."""

    def __init__(self, queue: Callable[[], QueueHealth | None]) -> None:
        self._reader = HealthReader(_ages, queue)
        self._failing: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        health = self._reader.read(SCRAPE_SECONDS)
        yield from self._part("database", health.database, _database_metrics)
        yield from self._part("redis", health.queue, _queue_metrics)
        yield from self._part("outbox", health.outbox, _outbox_metrics)

    def _part(
        self, name: str, reading: Reading[Value], metrics: Callable[[Value], Iterable[Metric]]
    ) -> Iterator[Metric]:
        self._log(name, reading.error)
        if reading.error is not None or reading.value is not None:
            documentation = f"1 if the {name} could be read for this scrape, within {SCRAPE_SECONDS:g} s."
            yield _gauge(f"{name}_up", documentation, reading.error is None)
        if reading.value is not None:
            yield from metrics(reading.value)

    def _log(self, name: str, error: BaseException | None) -> None:
        if error is not None and name not in self._failing:
            self._failing.add(name)
            reason = first_line(error)
            outage = isinstance(error, RedisError | HistoryError | OSError)
            logger.warning("cannot read %s: %s: %s", name, type(error).__name__, reason,
                           exc_info=None if outage else error)  # fmt: skip
        elif error is None and name in self._failing:
            self._failing.remove(name)
            logger.warning("%s can be read again", name)


def _ages() -> Ages:
    with read_transaction() as db:
        return newest_snapshot_ages(db, MOST_PORTFOLIOS)


def _database_metrics(ages: Ages) -> Iterator[Metric]:
    documentation = f"Age of each portfolio's newest snapshot; only the {MOST_PORTFOLIOS} lowest portfolio numbers."
    named = [(("none" if portfolio_id is None else str(portfolio_id),), seconds) for portfolio_id, seconds in ages]
    yield _family("newest_snapshot_age_seconds", documentation, ("portfolio_id",), named)


def _queue_metrics(queue: QueueHealth) -> Iterator[Metric]:
    # Absent if the front job has no enqueue time.
    oldest = queue.oldest_waiting_seconds if queue.queued else 0
    for name, documentation, value in (
        ("queue_jobs", "Jobs that wait in the queue.", queue.queued),
        ("reserved_jobs", "Jobs that workers have reserved.", queue.reserved),
        ("failed_jobs", "Jobs in RQ's failed registry: refused for good.", queue.failed),
        ("workers", "Workers of the queue that are alive, by their registration.", queue.workers),
        ("queue_oldest_age_seconds", "Age of the job at the front of the queue.", oldest),
    ):
        if value is not None:
            yield _gauge(name, documentation, value)


def _outbox_metrics(outbox: OutboxHealth) -> Iterator[Metric]:
    entries = [((state,), getattr(outbox, state)) for state in ("pending", "sent", "rejected")]
    documentation = "Entries of this machine's outbox by state: pending, sent, rejected."
    yield _family("outbox_entries", documentation, ("state",), entries)
    oldest = outbox.oldest_unacknowledged_seconds or 0
    yield _gauge("outbox_oldest_age_seconds", "Age of the oldest entry that no worker has acknowledged.", oldest)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"trading_history_{name}", documentation, value=float(value))


def _family(
    name: str,
    documentation: str,
    labels: tuple[str, ...],
    samples: Iterable[tuple[tuple[str, ...], float]],
    family: type[GaugeMetricFamily | CounterMetricFamily] = GaugeMetricFamily,
) -> Metric:
    made = family(f"trading_history_{name}", documentation, labels=labels)
    for values, value in samples:
        made.add_metric(values, value)
    return made


def _histogram(name: str, documentation: str, histogram: Histogram) -> Metric:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
    return HistogramMetricFamily(
        f"trading_history_{name}", documentation, buckets=buckets, sum_value=float(histogram.sum)
    )
