"""HistoryProducer: it records without the network, and its relay sends the entries in the background."""

from __future__ import annotations

import multiprocessing
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fakeredis
import pytest

from producers import history_producer
from producers.acknowledgements import Outcome, acknowledgement_text
from producers.errors import EventRejected, InvalidEvent, OutboxError, ProducerClosed, SettingsError
from producers.fake_worker import FakeWorker
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox, Position
from producers.redis_keys import acknowledgement_key
from producers.testing import FakeHistory
from tests.factories import a_snapshot, an_archive
from tests.forking import in_child
from tests.unit.conftest import queue_of


@pytest.fixture
def producer(trading_history: FakeHistory) -> HistoryProducer:
    return trading_history.producer


def test_a_receipt_has_event_id_source_and_sequence(trading_history: FakeHistory) -> None:
    """The part of the source before the slash is the name of the producer."""
    producer = HistoryProducer(name="bot-7")
    snapshot = a_snapshot()
    receipts = [producer.record(snapshot), *producer.record_many([snapshot, an_archive()])]

    assert [receipt.sequence for receipt in receipts] == [1, 2, 3]
    assert receipts[0].event_id == receipts[1].event_id == snapshot.event_id
    assert {receipt.source.split("/")[0] for receipt in receipts} == {"bot-7"}


def test_recording_no_events_returns_no_receipts(producer: HistoryProducer) -> None:
    assert producer.record_many([]) == []


def test_events_reach_the_queue_without_another_call(trading_history: FakeHistory) -> None:
    """`flush` waits for that and returns the number of events that are left, here 0."""
    trading_history.producer.record(a_snapshot())
    assert (trading_history.producer.flush(5), queue_of(trading_history.redis).count) == (0, 1)


def test_wait_returns_the_row_id_or_raises_the_reason(trading_history: FakeHistory) -> None:
    """A stored event and a duplicate have the id of the row, a rejected event has a reason."""
    producer = trading_history.producer
    receipts = [producer.record(a_snapshot()) for _ in range(2)]
    trading_history.work()
    receipts.append(producer.record(a_snapshot()))
    trading_history.work(reject="balance: wrong")

    assert [receipt.wait(5) for receipt in receipts[:2]] == [1, 1]
    with pytest.raises(EventRejected, match=f"^event {receipts[2].event_id} was rejected: balance: wrong$"):
        receipts[2].wait(5)


def test_wait_times_out_without_a_worker_and_the_entry_stays(producer: HistoryProducer) -> None:
    receipt = producer.record(a_snapshot())
    with pytest.raises(TimeoutError, match="was not acknowledged within 0.05 s"):
        receipt.wait(0.05)
    assert producer.status().depth == 1


def test_waiting_for_an_event_that_the_outbox_no_longer_keeps_is_an_error(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """It was stored and then deleted. Without an outcome, the wait could not end."""
    producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
    receipt = producer.record(a_snapshot())
    producer.flush(5)
    FakeWorker(redis, "history").work()
    assert receipt.wait(5) == 1
    producer.close()
    Outbox(tmp_path / "outbox.db").deliveries.prune(keep_seconds=-1)
    with pytest.raises(OutboxError, match="entry 1 is no longer kept"):
        receipt.wait(5)


def test_an_argument_that_is_not_an_event_is_invalid_and_records_nothing(producer: HistoryProducer) -> None:
    """Also if the other arguments are events. The message names the type and not the value."""
    for given in ({"balance": 1}, None, "pa55"):
        with pytest.raises(InvalidEvent, match="^event: must be a PortfolioSnapshot or SignalArchive, not ") as caught:
            producer.record_many([a_snapshot(), given])  # type: ignore[list-item]
        assert "pa55" not in str(caught.value)
    assert producer.status().depth == 0


def test_events_recorded_while_redis_is_down_are_sent_when_it_is_back(trading_history: FakeHistory) -> None:
    """The calls succeed, and `flush` returns the number of events that wait."""
    producer = trading_history.producer
    with trading_history.redis_down():
        for n in range(5):
            producer.record(a_snapshot(after=timedelta(n)))
        assert producer.flush(0.2) == 5
    assert producer.flush(10) == 0
    assert queue_of(trading_history.redis).count == 5


def test_a_new_producer_sends_the_entries_that_an_earlier_one_left(trading_history: FakeHistory) -> None:
    """Closing ends at its time limit and leaves the entry in the outbox."""
    with trading_history.redis_down():
        first = HistoryProducer()
        first.record(a_snapshot())
        first.close(timeout=0.1)
    with HistoryProducer() as second:
        assert second.flush(5) == 0
    assert queue_of(trading_history.redis).count == 1


def test_a_receipt_has_the_state_of_its_event(
    server: fakeredis.FakeServer, redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """It is pending, sent, then stored or rejected. Reading it fails once the outbox no longer keeps the entry."""
    worker = FakeWorker(redis, "history")
    server.connected = False
    producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
    stored = producer.record(a_snapshot())
    states = [stored.state]
    server.connected = True
    producer.flush(5)
    states.append(stored.state)
    worker.work()
    stored.wait(5)
    rejected = producer.record(a_snapshot(after=timedelta(1)))
    producer.flush(5)
    worker.work(reject="no")
    with pytest.raises(EventRejected):
        rejected.wait(5)
    producer.close()

    assert [*states, stored.state, rejected.state] == ["pending", "sent", "stored", "rejected"]
    Outbox(tmp_path / "outbox.db").deliveries.prune(keep_seconds=-1)
    with pytest.raises(OutboxError, match="entry 1 is no longer kept"):
        _ = stored.state


def test_flush_waits_only_for_events_recorded_before_the_call(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may continue to record meanwhile."""
    monkeypatch.setattr("producers.entry_sender._BATCH_ENTRIES", 1)
    monkeypatch.setattr("producers.entry_sender._FULL_QUEUE_JOBS", 1)  # the second entry stays in the outbox
    producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
    receipt = producer.record(a_snapshot())
    last_position = Outbox.last_position

    def another_one_meanwhile(outbox: Outbox) -> Position:
        position = last_position(outbox)
        producer.record(a_snapshot(after=timedelta(1)))
        return position

    monkeypatch.setattr(Outbox, "last_position", another_one_meanwhile)
    began = time.monotonic()
    assert producer.flush(20) == 0
    assert time.monotonic() - began < 10
    assert receipt.state == "sent"
    assert producer.status().pending == 1
    producer.close(timeout=0)


def test_settle_checks_sent_events_at_once(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If Redis lost them, they are sent again before their next check is due. `progress` gets the number left."""
    monkeypatch.setattr("producers.entry_sender._FIRST_CHECK_SECONDS", 100.0)
    reported: list[int] = []
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        producer.record_many([a_snapshot(after=timedelta(n)) for n in range(3)])
        producer.flush(5)
        assert producer.settle(0.05) == 3
        redis.flushall()
        monkeypatch.setattr("producers.transport._CHECK_NOW_SECONDS", 0.02)
        stop = threading.Event()
        worker = threading.Thread(target=_work_until, args=(FakeWorker(redis, "history"), stop))
        worker.start()
        assert producer.settle(10, progress=reported.append) == 0
        stop.set()
        worker.join()
        assert producer.status().stored == 3
    assert (reported[0], reported[-1]) == (3, 0)


def _work_until(worker: FakeWorker, stop: threading.Event) -> None:
    while not stop.wait(0.005):
        worker.work()


def test_close_waits_until_the_producers_own_events_are_settled(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """A controller that exits after each event leaves no unsettled entries."""
    stop = threading.Event()
    worker = threading.Thread(target=_work_until, args=(FakeWorker(redis, "history"), stop))
    worker.start()
    for n in range(5):
        producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
        producer.record(a_snapshot(after=timedelta(n)))
        producer.close(timeout=30)
        with Outbox(tmp_path / "outbox.db") as outbox:
            assert (outbox.status().depth, outbox.status().stored) == (0, n + 1)
    stop.set()
    worker.join()


def test_close_sends_events_of_other_producers_without_waiting_for_their_outcome(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """No worker runs, so waiting would take the whole time limit."""
    other = Outbox(tmp_path / "outbox.db")
    other.append("other", [a_snapshot()], producer_id=1)
    began = time.monotonic()
    HistoryProducer(redis, outbox=other.path).close(timeout=20)
    assert time.monotonic() - began < 10
    assert (other.status().pending, other.status().sent) == (0, 1)


def test_close_does_not_wait_while_a_relay_process_serves_the_outbox(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """The relay process sends the event later."""
    with Outbox(tmp_path / "outbox.db") as outbox:
        outbox.header.heartbeat("relay-1")
        producer = HistoryProducer(redis, outbox=outbox.path)
        producer.record(a_snapshot())
        began = time.monotonic()
        producer.close(timeout=20)
        assert time.monotonic() - began < 10
        assert (outbox.status().pending, queue_of(redis).count) == (1, 0)


def test_all_producers_of_a_process_share_the_time_limit_at_exit(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four producers without acknowledgements take as long as one."""
    monkeypatch.setattr(history_producer, "_live", set())
    monkeypatch.setattr(history_producer, "EXIT_SECONDS", 0.5)
    producers = [HistoryProducer(redis, outbox=tmp_path / f"{n}.db") for n in range(4)]
    for producer in producers:
        producer.record(a_snapshot())
        producer.flush(5)
    began = time.monotonic()
    history_producer._close_all()

    assert 0.3 <= time.monotonic() - began < 1.5
    assert all(producer.closed for producer in producers)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_multiprocessing_child_closes_its_producers_when_it_ends(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """It does not run atexit functions. It has a worker, because the fake Redis in the child is a copy."""

    def record() -> None:
        worker = FakeWorker(redis, "history")
        threading.Thread(target=_work_until, args=(worker, threading.Event()), daemon=True).start()
        HistoryProducer(redis, outbox=tmp_path / "outbox.db").record(a_snapshot())

    child = multiprocessing.get_context("fork").Process(target=record, daemon=True)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert Outbox(tmp_path / "outbox.db").status().stored == 1


def test_a_closed_producer_records_nothing_and_may_be_closed_again(producer: HistoryProducer) -> None:
    producer.close()
    producer.close()
    with pytest.raises(ProducerClosed, match="^the HistoryProducer is closed; make a new one$"):
        producer.record(a_snapshot())


def test_many_threads_record_through_one_producer(trading_history: FakeHistory) -> None:
    """Each event has a separate sequence and a separate job."""
    producer = trading_history.producer
    threads = [threading.Thread(target=lambda: [producer.record(a_snapshot()) for _ in range(25)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    producer.flush(10)

    job_ids = queue_of(trading_history.redis).job_ids
    assert sorted(int(job_id.split("-")[1]) for job_id in job_ids) == list(range(1, 201))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_continues_to_record(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """The child opens a new connection to the same outbox, and the parent continues too."""
    producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
    producer.record(a_snapshot())

    def record() -> None:
        assert producer.record(a_snapshot(after=timedelta(1))).sequence == 2

    assert in_child(record) == 0
    assert producer.record(a_snapshot(after=timedelta(2))).sequence == 3
    assert producer.flush(5) == 0
    assert Outbox(tmp_path / "outbox.db").status().sent == 3
    producer.close(timeout=0)


def test_a_forked_child_that_recorded_nothing_leaves_the_outbox_alone(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """Its parent sends the entries and waits for them. Here, a child that opened the outbox would get an error."""
    path, moved = tmp_path / "outbox.db", tmp_path / "moved.db"
    producer = HistoryProducer(redis, outbox=path)
    producer.record(a_snapshot())
    producer.flush(5)
    path.rename(moved)
    path.mkdir()
    try:
        assert in_child(lambda: producer.close(timeout=0)) == 0
    finally:
        path.rmdir()
        moved.rename(path)
    producer.close(timeout=0)


def test_queue_and_outbox_come_from_the_settings_unless_given(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument takes precedence over HISTORY_QUEUE or HISTORY_OUTBOX."""
    monkeypatch.setenv("HISTORY_QUEUE", "evening")
    monkeypatch.setenv("HISTORY_OUTBOX", str(tmp_path / "evening.db"))
    with HistoryProducer(redis) as producer:
        producer.record(a_snapshot())
        producer.flush(5)
        producer.close(timeout=0)
    with HistoryProducer(redis, queue="night", outbox=tmp_path / "night.db") as producer:
        producer.record(a_snapshot())
        producer.flush(5)
        producer.close(timeout=0)

    assert (queue_of(redis, "evening").count, queue_of(redis, "night").count) == (1, 1)
    assert {path.name for path in tmp_path.glob("*.db")} == {"evening.db", "night.db"}


def test_a_producer_without_redis_cannot_be_made_and_the_error_names_the_setting() -> None:
    """The error is raised before the first event, and no file is made."""
    with pytest.raises(SettingsError, match="^REDIS_URL is not set"):
        HistoryProducer()
    assert list(Path().rglob("*")) == []


@pytest.mark.parametrize("name", ["my bot/1", "", "x" * 101, b"bot"])
def test_a_name_with_other_characters_is_a_settings_error(redis: fakeredis.FakeRedis, name: str) -> None:
    """The name is part of a Redis key and of the CloudEvents source."""
    with pytest.raises(SettingsError, match="^name: "):
        HistoryProducer(redis, name=name)


def test_now_and_naive_times_are_in_the_configured_zone(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a snapshot has the local date of that zone."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Pacific/Kiritimati")
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        assert producer.now().utcoffset() == timedelta(hours=14)
        assert producer.localized(datetime(2026, 1, 1, 10), "timestamp") == datetime(2025, 12, 31, 20, tzinfo=UTC)
        assert producer.localized(datetime(2026, 1, 1, tzinfo=UTC), "timestamp").utcoffset() == timedelta(0)


def test_a_resend_of_an_empty_outbox_sends_nothing(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """It has no source whose acknowledgements could be deleted."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        assert producer.resend(datetime(2020, 1, 1, tzinfo=UTC)) == 0


def test_a_resend_deletes_the_acknowledgements_of_the_old_database(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """If the event was stored while the controller was down, and the database was then restored, it is sent again."""
    outbox = tmp_path / "outbox.db"
    with HistoryProducer(redis, outbox=outbox) as first:
        receipt = first.record(a_snapshot())
        first.flush(5)
        first.close(timeout=0)
    FakeWorker(redis, "history").work()
    key = acknowledgement_key(receipt.source)
    foreign = f"{receipt.source.split('/')[1]}-1-{'0' * 16}"  # an acknowledgement for a copy of this outbox
    redis.hset(key, foreign, acknowledgement_text(int(redis.time()[0]), None, Outcome("stored", row_id=9)))
    again = HistoryProducer(redis, outbox=outbox)
    again.resend(datetime(2020, 1, 1, tzinfo=UTC))
    again.resend(datetime(2020, 1, 1, tzinfo=UTC))  # there is nothing left to delete
    again.flush(5)
    again.close(timeout=0)

    state = Outbox(outbox).status()
    # If the relay had read the old acknowledgement, the resend made the entry pending; if not, it is deleted.
    assert (state.stored, state.sent) == (0, 1)
    assert redis.hkeys(key) == [foreign.encode()]
