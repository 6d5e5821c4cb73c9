"""An exception that one event causes, at any step, affects only that event and ends no worker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from redis import Redis
from rq.utils import as_text
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import InvalidRequestError

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from consumers.operations import get_portfolio_history
from consumers.ops.metrics import COUNTS
from consumers.worker import batch, completion, worker_thread
from consumers.worker.batch import acknowledgements
from consumers.worker.completion import Completion
from consumers.worker.deliveries import decompressed_call, parse_job
from producers.errors import EventRejected
from producers.events import decode, event_of
from producers.history_producer import HistoryProducer, Receipt
from tests.deliveries import burst, history_queue
from tests.factories import a_snapshot

pytestmark = pytest.mark.usefixtures("database_url")

POISON = "666.66"


class LibraryPanicError(BaseException):
    """An exception of a library in another language, which is not an Exception."""


class _UnprintableError(ValueError):
    """An exception whose text cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def _encode_error() -> UnicodeEncodeError:
    return UnicodeEncodeError("latin-1", "€", 0, 1, "ordinal not in range")


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("a defect"),
    "UnicodeEncodeError": _encode_error,
    "KeyError": lambda: KeyError("a defect"),
    "MemoryError": MemoryError,
    "RecursionError": lambda: RecursionError("a defect"),
    "StopIteration": StopIteration,
    "GeneratorExit": GeneratorExit,
    "SystemExit": lambda: SystemExit(3),
    "unprintable": _UnprintableError,
    "panic": lambda: LibraryPanicError("a defect"),
    "NUL and a lone surrogate": lambda: ValueError("\0\ud800"),
}


def _record(producer: HistoryProducer, poisoned: int, good: int = 3) -> tuple[list[Receipt], list[Receipt]]:
    """Record good events before and after the poisoned ones. Returns the receipts of both kinds."""
    events = [a_snapshot(after=timedelta(seconds=n)) for n in range(good)]
    bad = [a_snapshot(after=timedelta(hours=1, seconds=n), balance=POISON) for n in range(poisoned)]
    receipts = producer.record_many([*events[:1], *bad, *events[1:]])
    producer.flush(10)
    return receipts[: min(good, 1)] + receipts[min(good, 1) + poisoned :], receipts[min(good, 1) :][:poisoned]


def _outcomes() -> list[tuple[Any, ...]]:
    with get_db() as db:
        rows = db.execute(text("SELECT outcome, reason, event FROM event_outcomes WHERE outcome = 'rejected'"))
        return [tuple(row) for row in rows]


Plant = Callable[[pytest.MonkeyPatch, Callable[[], BaseException]], None]


def _reading(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def failing(job: Any, crashes: int = 0) -> Any:
        found = parse_job(job, crashes)
        if POISON in found.text:
            raise error()
        return found

    monkeypatch.setattr(worker_thread, "parse_job", failing)


def _decoding(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def failing(given: Any, model: Any) -> Any:
        if POISON in given:
            raise error()
        return decode(given, model)

    monkeypatch.setattr(batch, "decode", failing)


def _making_the_row(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def failing(db: Any, events: Any) -> Any:
        if any(str(one.data.balance) == POISON for one in events):
            raise error()
        return insert_events(db, events)

    monkeypatch.setattr(batch, "insert_events", failing)


def _in_a_statement(part: str) -> Plant:
    """Raise an error just before the driver sends a statement that has this part and the poisoned event."""

    def plant(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
        del monkeypatch

        def failing(_db: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            values = str(parameters)
            if part in statement and _poisoned_id in values and "rejected" not in values:
                raise error()

        event.listen(Engine, "before_cursor_execute", failing)
        _planted.append(failing)

    return plant


_poisoned_id = str(event_of(a_snapshot(after=timedelta(hours=1), balance=POISON), source="x/1", sequence=1).id)
_planted: list[Any] = []


@pytest.fixture(autouse=True)
def _remove_planted() -> Iterator[None]:
    yield
    batch.logger.setLevel(logging.NOTSET)
    while _planted:
        event.remove(Engine, "before_cursor_execute", _planted.pop())


UNDECIDED: dict[str, Plant] = {
    "reading": _reading,
    "decoding": _decoding,
    "making the row": _making_the_row,
    "insert": _in_a_statement("INSERT INTO portfolio_history"),
    "comparing": _in_a_statement("SELECT given.number"),
    "outcome": _in_a_statement("INSERT INTO event_outcomes"),
}


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit


def _assert_rejected(receipt: Receipt) -> None:
    """Check that the receipt raises the rejection as a poison event."""
    with pytest.raises(EventRejected, match=r"poison event: 3 workers crashed or failed .*; last error: \w+"):
        receipt.wait(20)


@pytest.mark.parametrize("exception", ["ValueError", "panic"])
@pytest.mark.parametrize("step", UNDECIDED)
def test_an_exception_before_the_commit_rejects_only_that_event(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, step: str, exception: str
) -> None:
    """It is rejected after three attempts; the other events are stored."""
    if step in ("comparing", "outcome"):  # these steps need an event that is stored already
        with get_db() as db:
            same = a_snapshot(after=timedelta(hours=1), balance=POISON)
            insert_events(db, [event_of(same, source="other/1", sequence=1)])
    UNDECIDED[step](monkeypatch, EXCEPTIONS[exception])
    good, (poisoned,) = _record(producer, 1)
    with _seconds(30):
        burst(redis)

    for receipt in good:
        assert receipt.wait(20) > 0
    _assert_rejected(poisoned)
    ((outcome, reason, kept),) = _outcomes()
    assert (outcome, POISON in kept) == ("rejected", True)
    assert reason.startswith("poison event: 3 workers crashed or failed while processing it alone; last error: ")
    assert history_queue(redis).failed_job_registry.count == 1


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_an_exception_of_any_class_rejects_only_that_event(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, exception: str
) -> None:
    """Also one that normally ends a thread, a generator or a process, and one whose text cannot be read."""
    # pytest sends log lines between processes, which fails for a lone surrogate.
    monkeypatch.setattr(logging.getLogger("rq"), "disabled", True)
    for name in ("consumers.worker.worker_thread", "rq.worker", "rq.worker.history"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    _decoding(monkeypatch, EXCEPTIONS[exception])
    good, (poisoned,) = _record(producer, 1, good=1)
    with _seconds(30):
        burst(redis)

    assert good[0].wait(20) > 0
    _assert_rejected(poisoned)
    assert (len(_outcomes()), history_queue(redis).failed_job_registry.count) == (1, 1)


@pytest.mark.parametrize("exception", ["KeyError", "panic"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_events_that_raise_exceptions_are_rejected_without_others_beside_them(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, count: int, exception: str
) -> None:
    """That no event is stored does not count as an outage. A later event is stored at once."""
    _decoding(monkeypatch, EXCEPTIONS[exception])
    _, poisoned = _record(producer, count, good=0)
    with _seconds(60):
        burst(redis)

    for receipt in poisoned:
        _assert_rejected(receipt)
    assert (len(_outcomes()), history_queue(redis).failed_job_registry.count) == (count, count)
    later = producer.record(a_snapshot(after=timedelta(days=1)))
    producer.flush(10)
    burst(redis)
    assert later.wait(20) > 0


@pytest.mark.parametrize("exception", ["ValueError", "unprintable"])
def test_an_event_that_can_neither_be_stored_nor_rejected_stays_in_the_failed_registry(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, exception: str
) -> None:
    """Without details, if RQ's records of the failure cannot be made. Its producer gets no acknowledgement."""

    def failing(_db: Any, _cursor: Any, _statement: str, parameters: Any, *_: Any) -> None:
        if _poisoned_id in str(parameters):
            raise EXCEPTIONS[exception]()

    monkeypatch.setattr(worker_thread, "WAIT_SECONDS", 0.05)
    event.listen(Engine, "before_cursor_execute", failing)
    _planted.append(failing)
    good, (poisoned,) = _record(producer, 1)
    job_ids = history_queue(redis).get_job_ids()
    with _seconds(20):
        burst(redis)
    assert [receipt.wait(20) > 0 for receipt in good] == [True] * 3
    assert (poisoned.state, _outcomes(), history_queue(redis).count) == ("sent", [], 0)
    assert history_queue(redis).failed_job_registry.get_job_ids() == [job_ids[1]]


def test_a_rejection_that_cannot_be_recorded_now_is_recorded_later(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger refuses it once. The job moves to the tail of the queue meanwhile."""
    with get_db() as db:
        db.exec_driver_sql("""
            CREATE SEQUENCE attempts;
            CREATE FUNCTION refuse_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF nextval('attempts') = 1 THEN RAISE 'locked' USING ERRCODE = 'lock_not_available'; END IF; RETURN NEW;
            END $$;
            CREATE TRIGGER once BEFORE INSERT ON event_outcomes FOR EACH ROW EXECUTE FUNCTION refuse_once()
        """)
    _decoding(monkeypatch, EXCEPTIONS["ValueError"])
    good, (poisoned,) = _record(producer, 1)
    redis.hset("history:crashes:history", history_queue(redis).get_job_ids()[1], 2)
    with _seconds(20):
        burst(redis)
    assert [receipt.wait(20) > 0 for receipt in good] == [True] * 3
    _assert_rejected(poisoned)
    with get_db() as db:
        assert db.exec_driver_sql("SELECT last_value FROM attempts").scalar() == 2


def test_a_statement_that_cannot_be_sent_is_a_defect_and_not_an_outage() -> None:
    """After an outage a worker would send it again and again."""
    with pytest.raises(InvalidRequestError, match="A value is required for bind parameter 'missing'"), get_db() as db:
        db.execute(text("SELECT :missing"))


def _logging(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def failing(record: logging.LogRecord) -> bool:
        if _poisoned_id in str(record.__dict__.get("event_id")):
            raise error()
        return True

    batch.logger.setLevel(logging.DEBUG)  # so that each event has its own line
    for logger in (batch.logger, completion.logger):
        monkeypatch.setattr(logger, "filters", [failing])


def _counting(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    def failing(*_: Any) -> None:
        raise error()

    monkeypatch.setattr(COUNTS, "batch", failing)


def _completing(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> None:
    finished = Completion._finished

    def failing(self: Any, results: Any, jobs: Any, run: Any) -> Any:
        if any(POISON.encode() in decompressed_call(jobs[result.job_id].data) for result in results):
            raise error()
        return finished(self, results, jobs, run)

    monkeypatch.setattr(Completion, "_finished", failing)


@pytest.mark.parametrize("exception", ["ValueError", "panic", "SystemExit"])
@pytest.mark.parametrize("plant", [_logging, _counting, _completing])
def test_an_exception_after_the_commit_does_not_change_the_outcome(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, plant: Plant, exception: str
) -> None:
    """The row is committed and acknowledged as stored, and no event is rejected."""
    plant(monkeypatch, EXCEPTIONS[exception])
    good, (poisoned,) = _record(producer, 1)
    with _seconds(20):
        burst(redis)

    for receipt in [*good, poisoned]:
        assert receipt.wait(20) > 0
    assert (_outcomes(), len(get_portfolio_history()), history_queue(redis).count) == ([], 4, 0)
    assert redis.keys("history:reserved:*") == []


@pytest.mark.parametrize("exception", ["ValueError", "panic"])
def test_an_event_that_cannot_be_acknowledged_does_not_delay_others(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch, exception: str
) -> None:
    """It is stored, and its job goes to the failed registry. When the job runs again, it is acknowledged."""

    def failing(results: Any) -> Any:
        if any(str(result.event_id) == _poisoned_id for result in results):
            raise EXCEPTIONS[exception]()
        return acknowledgements(results)

    monkeypatch.setattr(completion, "acknowledgements", failing)
    good, (poisoned,) = _record(producer, 1)
    with _seconds(20):
        burst(redis)

    for receipt in good:
        assert receipt.wait(20) > 0
    assert (_outcomes(), len(get_portfolio_history()), history_queue(redis).count) == ([], 4, 0)
    (job_id,) = history_queue(redis).failed_job_registry.get_job_ids()
    monkeypatch.setattr(completion, "acknowledgements", acknowledgements)
    redis.zrem(history_queue(redis).failed_job_registry.key, job_id)
    redis.rpush(history_queue(redis).key, as_text(job_id))
    burst(redis)
    assert poisoned.wait(20) > 0


def test_an_event_that_was_stored_before_its_workers_crashed_is_not_rejected(
    redis: Redis, producer: HistoryProducer
) -> None:
    """Three workers crashed between commit and acknowledgement: the event has its row, and no rejection."""
    _, (receipt,) = _record(producer, 1, good=0)
    (job_id,) = history_queue(redis).job_ids
    source, sequence = receipt.source, receipt.sequence
    with get_db() as db:
        stored = event_of(a_snapshot(after=timedelta(hours=1), balance=POISON), source=source, sequence=sequence)
        insert_events(db, [stored])
    redis.hset("history:crashes:history", job_id, 3)
    burst(redis)

    assert receipt.wait(20) == get_portfolio_history()[0]["id"]
    assert _outcomes() == []


def test_a_defect_that_ends_after_two_attempts_rejects_no_event(
    redis: Redis, producer: HistoryProducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event is processed again, and stored."""

    fixed = threading.Event()

    def failing(given: Any, model: Any) -> Any:
        if redis.hvals("history:crashes:history") == [b"1"] * 3:
            fixed.set()
        if not fixed.is_set():
            raise ValueError("a defect")
        return decode(given, model)

    monkeypatch.setattr(batch, "decode", failing)
    _, receipts = _record(producer, 3, good=0)
    burst(redis)
    assert [receipt.wait(20) > 0 for receipt in receipts] == [True] * 3
    assert (_outcomes(), redis.hgetall("history:crashes:history")) == ([], {})
