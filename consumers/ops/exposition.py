"""Metrics in Prometheus' format: the counters of this process, and the pipeline's health at the time of the scrape.

If a part cannot be read in time, its `..._up` is 0 and its other metrics are absent: a scrape neither fails nor hangs.
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
from consumers.ops.health import HealthReader
from consumers.ops.metrics import COUNTS, WAITED_FOR, Histogram
from consumers.ops.outbox_health import OutboxHealth
from consumers.ops.probes import Reading, Value
from consumers.ops.queue_health import QueueHealth, queue_of_settings
from producers.errors import HistoryError

logger = logging.getLogger(__name__)

MOST_PORTFOLIOS = 100
SCRAPE_SECONDS = 1.5

Ages = list[tuple[int | None, float]]


def worker_registry(waits_for: Callable[[], str | None], queue: Callable[[], QueueHealth]) -> CollectorRegistry:
    """Return the metrics of a worker. `waits_for` returns the server that it waits for, `queue` reads its queue."""
    registry = CollectorRegistry()
    registry.register(_CountsCollector(waits_for))
    registry.register(_PipelineCollector(queue))
    ProcessCollector(registry=registry)
    return registry


def pipeline_registry() -> CollectorRegistry:
    """Return the metrics of a process that is not a worker; it reads the queue of the settings."""
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
        documentation = "Deliveries that this process has decided, by event type and outcome."
        yield _family("events", documentation, ("type", "outcome"), results, CounterMetricFamily)
        yield _histogram("batch_events", "Deliveries per transaction.", counted.batch_events)
        yield _histogram(
            "insert_seconds", "Seconds from the start of a transaction to its commit.", counted.insert_seconds
        )
        yield _histogram(
            "lag_seconds",
            "Seconds from an event's own time to the commit of its row, without imports.",
            counted.lag_seconds,
        )
        yield CounterMetricFamily(
            "trading_history_recovered_jobs",
            "Jobs of crashed workers that this worker has requeued.",
            value=counted.recovered_jobs,
        )
        waited_for = self._waits_for()
        waiting = [((server,), float(waited_for == server)) for server in WAITED_FOR]
        yield _family("waiting", "1 while this worker waits for the database or for Redis.", ("for",), waiting)


class _PipelineCollector(Collector):
    """Collector of the health of database, queue and outbox. A failure is logged once, and once when it has ended."""

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
            documentation = f"1 if the {name} could be read within {SCRAPE_SECONDS:g} s, otherwise 0."
            yield _gauge(f"{name}_up", documentation, reading.error is None)
        if reading.value is not None:
            yield from metrics(reading.value)

    def _log(self, name: str, error: BaseException | None) -> None:
        if error is not None and name not in self._failing:
            self._failing.add(name)
            reason = first_line(error)
            outage = isinstance(error, RedisError | HistoryError | OSError)
            logger.warning("metrics cannot read %s: %s: %s", name, type(error).__name__, reason,
                           exc_info=None if outage else error)  # fmt: skip
        elif error is None and name in self._failing:
            self._failing.remove(name)
            logger.warning("metrics can read %s again", name)


def _ages() -> Ages:
    with read_transaction() as db:
        return newest_snapshot_ages(db, MOST_PORTFOLIOS)


def _database_metrics(ages: Ages) -> Iterator[Metric]:
    documentation = (
        f"Age of each portfolio's newest snapshot in seconds, for the {MOST_PORTFOLIOS} lowest portfolio numbers."
    )
    named = [(("none" if portfolio_id is None else str(portfolio_id),), seconds) for portfolio_id, seconds in ages]
    yield _family("newest_snapshot_age_seconds", documentation, ("portfolio_id",), named)


def _queue_metrics(queue: QueueHealth) -> Iterator[Metric]:
    # The age is absent if the job at the front has no enqueue time.
    oldest = queue.oldest_age_seconds if queue.queued else 0
    for name, documentation, value in (
        ("queue_jobs", "Jobs that wait in the queue.", queue.queued),
        ("reserved_jobs", "Jobs that workers have reserved.", queue.reserved),
        ("failed_jobs", "Jobs in RQ's failed registry: rejected events.", queue.failed),
        ("workers", "Live workers of the queue, as registered with RQ.", queue.workers),
        ("suspended", "1 while RQ's workers are suspended (rq suspend).", queue.suspended),
        ("quarantined_entries", "Unusable entries of the queue that workers have quarantined.", queue.quarantined),
        ("queue_oldest_age_seconds", "Age of the job at the front of the queue in seconds.", oldest),
    ):
        if value is not None:
            yield _gauge(name, documentation, value)


def _outbox_metrics(outbox: OutboxHealth) -> Iterator[Metric]:
    entries = [((state,), getattr(outbox, state)) for state in ("pending", "sent", "rejected")]
    documentation = "Entries of this machine's outbox by state: pending, sent or rejected."
    yield _family("outbox_entries", documentation, ("state",), entries)
    oldest = outbox.oldest_unacknowledged_seconds or 0
    yield _gauge(
        "outbox_oldest_age_seconds", "Age of the oldest entry that no worker has acknowledged, in seconds.", oldest
    )
    yield _gauge("outbox_used_bytes", "Bytes of this machine's outbox that are in use.", outbox.used_bytes)
    yield _gauge("outbox_max_bytes", "Bytes from which on this machine's outbox accepts no event.", outbox.max_bytes)
    documentation = "Quarantined files of this machine's outbox, salvaged ones included, until they are deleted."
    yield _gauge("outbox_damaged_files", documentation, outbox.damaged_files)


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
