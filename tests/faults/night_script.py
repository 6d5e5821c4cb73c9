"""The script of a night: faults, the alerts that each of them must raise, and when it begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tests.faults.night_judgement import Expected
from tests.faults.night_pipeline import Pipeline

_LEASE_SECONDS = 30.0  # a lease ends after 20 s, and another worker notices it within 6 s


@dataclass(frozen=True)
class Fault:
    """A fault of the script.

    It begins `quiet_seconds` after the faults `after` are over, or, for a fault `during` another one, when the alerts
    of that one fire. It is repaired when its alerts fire, `least_seconds` have passed and the faults `outlasts` are
    repaired. The alerts of `consequences` may fire too. The function `begin` may return the time of the beginning.
    """

    name: str
    begin: Callable[[Pipeline], float | None]
    repair: Callable[[Pipeline], None]
    expected: tuple[Expected, ...] = ()
    consequences: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    during: str | None = None
    outlasts: tuple[str, ...] = ()
    quiet_seconds: float = 20.0
    least_seconds: float = 0.0


_LATE = "HistoryEventsAreLate"
_OUTBOX = "HistoryOutboxIsLate"
_QUEUE = "HistoryQueueIsLate"

# Events that wait for a worker are late, and so is their outbox if they wait long enough.
_NOTHING_STORED = (_LATE, _QUEUE, _OUTBOX)

_DATABASE_STOPPED = Fault(
    "database stopped",
    Pipeline.stop_database,
    lambda pipeline: pipeline.servers.bring_back(),
    (
        Expected("HistoryWorkerWaits", {"for": "the database"}, notice_seconds=5),
        Expected("HistoryDatabaseIsAway", notice_seconds=5),
    ),
    _NOTHING_STORED,
    after=("worker killed with reserved jobs",),
)
_EVENT_REJECTED = Fault(
    "event rejected",
    Pipeline.record_a_conflict,
    Pipeline.discard_rejected,
    (Expected("HistoryHasFailedJobs", notice_seconds=5),),
    quiet_seconds=30,
    outlasts=("database stopped",),
)
_OLD_PORTFOLIO = Fault(
    "portfolio without a new snapshot",
    Pipeline.record_an_old_snapshot,
    Pipeline.record_a_new_snapshot,
    (Expected("PortfolioHasNoNewSnapshot", {"portfolio_id": "6"}, notice_seconds=5, is_old=True),),
    quiet_seconds=35,
)

# The faults of the first site concern its workers and outboxes.
_FIRST = (
    _EVENT_REJECTED,
    _OLD_PORTFOLIO,
    Fault(
        "unusable entry in the queue",
        Pipeline.enqueue_an_unusable_entry,
        Pipeline.delete_quarantined,
        (Expected("HistoryHasQuarantinedEntries", notice_seconds=5),),
        quiet_seconds=40,
    ),
    Fault(
        "outbox nearly full",
        Pipeline.lower_the_limit_of_the_spare_outbox,
        Pipeline.raise_the_limit_of_the_spare_outbox,
        (Expected("HistoryOutboxIsNearlyFull"),),
        quiet_seconds=30,
    ),
    Fault(
        "outbox damaged",
        Pipeline.damage_the_spare_outbox,
        Pipeline.repair_the_spare_outbox,
        (Expected("HistoryOutboxCannotBeRead", notice_seconds=5),),
        after=("outbox nearly full",),
    ),
    Fault(
        "outbox damaged under a controller",
        Pipeline.damage_the_spare_outbox_under_a_controller,
        Pipeline.delete_the_quarantined_spare_outbox,
        (Expected("HistoryOutboxIsDamaged", notice_seconds=5),),
        after=("outbox damaged",),
    ),
    Fault(
        "worker killed with reserved jobs",
        Pipeline.kill_a_worker_with_reserved_jobs,
        lambda _: None,  # the pool has started another worker
        (Expected("HistoryWorkerCrashed", notice_seconds=_LEASE_SECONDS),),
        after=("portfolio without a new snapshot", "unusable entry in the queue"),
        quiet_seconds=10,
    ),
    _DATABASE_STOPPED,
    Fault(
        "workers suspended",
        Pipeline.suspend_workers,
        Pipeline.resume_workers,
        (Expected("HistoryWorkersAreSuspended", notice_seconds=5), Expected(_QUEUE, notice_seconds=5)),
        _NOTHING_STORED,
        after=("database stopped", "event rejected"),
    ),
    Fault(
        "all workers stopped",
        Pipeline.stop_workers,
        Pipeline.start_workers,
        (Expected("HistoryHasNoWorker", notice_seconds=10),),  # they finish their batches first
        _NOTHING_STORED,
        after=("database stopped", "event rejected"),
        quiet_seconds=200,
    ),
    Fault(
        "relay killed, controllers only record",
        Pipeline.kill_relay,
        Pipeline.start_relay,
        # An event is recorded every 30 s.
        (Expected(_OUTBOX, {"job": "trading-history-api"}, notice_seconds=35),),
        (_LATE,),
        after=("database stopped", "event rejected"),
        quiet_seconds=25,
        outlasts=("workers suspended",),
    ),
)
# The faults of the second site concern its servers and processes, while late events are stored as long as possible.
_SECOND = (
    Fault(
        "events late",
        Pipeline.start_late_controller,
        Pipeline.stop_late_controller,
        (Expected(_LATE, notice_seconds=10),),
        quiet_seconds=40,
    ),
    Fault(
        "API killed",
        Pipeline.kill_api,
        Pipeline.start_api_again,
        (Expected("HistoryTargetIsDown", {"job": "trading-history-api"}),),
        least_seconds=60,
    ),
    Fault(
        "Redis stopped",
        Pipeline.stop_redis,
        lambda pipeline: pipeline.servers.bring_back(),
        (
            Expected("HistoryWorkerWaits", {"for": "Redis"}, notice_seconds=5),
            Expected("HistoryRedisIsAway", notice_seconds=5),
        ),
        ("HistoryHasNoWorker", *_NOTHING_STORED),
        after=("events late", "API killed"),
        outlasts=("database stopped too",),
    ),
    Fault(
        "database stopped too",
        Pipeline.stop_database,
        lambda pipeline: pipeline.servers.bring_back(),
        (),
        ("HistoryWorkerWaits", "HistoryRedisIsAway", "HistoryHasNoWorker", *_NOTHING_STORED),
        during="Redis stopped",
        least_seconds=15,
    ),
    Fault(
        "workers and API frozen by SIGSTOP",
        Pipeline.freeze,
        Pipeline.unfreeze,
        (Expected("HistoryIsNotScraped", notice_seconds=5),),
        # Their leases end meanwhile, and a worker leaves RQ's list after 2 minutes.
        ("HistoryHasNoWorker", "HistoryWorkerCrashed", *_NOTHING_STORED),
        after=("Redis stopped",),
    ),
)


def _beside_other_tests(fault: Fault) -> Fault:
    """Return a fault whose alerts have 10 s more: other tests use the processors too."""
    more = tuple(replace(one, notice_seconds=one.notice_seconds + 10) for one in fault.expected)
    return replace(fault, expected=more)


_SHORT = (
    _beside_other_tests(replace(_EVENT_REJECTED, outlasts=())),
    _beside_other_tests(_OLD_PORTFOLIO),
    _beside_other_tests(replace(_DATABASE_STOPPED, after=(_EVENT_REJECTED.name, _OLD_PORTFOLIO.name))),
)
SITES = {"first": _FIRST, "second": _SECOND, "short": _SHORT}
"""Faults of each site. The first two are a night: each is a pipeline with its Prometheus, and both run at a time."""
SCRIPT = (*_FIRST, *_SECOND)
