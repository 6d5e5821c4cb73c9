"""The producer: records without the network, and its relay does the rest in the background."""

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
from producers.errors import EventRejected, OutboxError, ProducerClosed, SettingsError
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


def test_a_receipt_names_the_event_its_source_and_its_number(trading_history: FakeHistory) -> None:
    """The name before the slash is the caller's."""
    producer = HistoryProducer(name="bot-7")
    snapshot = a_snapshot()
    receipts = [producer.record(snapshot), *producer.record_many([snapshot, an_archive()])]

    assert [receipt.sequence for receipt in receipts] == [1, 2, 3]
    assert receipts[0].event_id == receipts[1].event_id == snapshot.event_id
    assert {receipt.source.split("/")[0] for receipt in receipts} == {"bot-7"}


def test_recording_nothing_is_fine(producer: HistoryProducer) -> None:
    """An empty batch gives no receipts."""
    assert producer.record_many([]) == []


def test_events_reach_the_queue_without_another_call(trading_history: FakeHistory) -> None:
    """flush waits for that and returns how many are left: none."""
    trading_history.producer.record(a_snapshot())
    assert (trading_history.producer.flush(5), queue_of(trading_history.redis).count) == (0, 1)


def test_waiting_ends_with_the_row_id_or_the_reason(trading_history: FakeHistory) -> None:
    """stored and duplicate give the row's id, rejected raises with the reason."""
    producer = trading_history.producer
    receipts = [producer.record(a_snapshot()) for _ in range(2)]
    trading_history.work()
    receipts.append(producer.record(a_snapshot()))
    trading_history.work(reject="balance: wrong")

    assert [receipt.wait(5) for receipt in receipts[:2]] == [1, 1]
    with pytest.raises(EventRejected, match=f"^event {receipts[2].event_id} was rejected: balance: wrong$"):
        receipts[2].wait(5)


def test_waiting_in_vain_times_out_and_loses_nothing(producer: HistoryProducer) -> None:
    """No worker, no acknowledgement."""
    receipt = producer.record(a_snapshot())
    with pytest.raises(TimeoutError, match="was not acknowledged within 0.05 s"):
        receipt.wait(0.05)
    assert producer.status().depth == 1


def test_recording_works_while_redis_is_away_and_is_sent_when_it_is_back(trading_history: FakeHistory) -> None:
    """The caller notices nothing; flush tells how many are waiting."""
    producer = trading_history.producer
    with trading_history.redis_down():
        for n in range(5):
            producer.record(a_snapshot(after=timedelta(n)))
        assert producer.flush(0.2) == 5
    assert producer.flush(10) == 0
    assert queue_of(trading_history.redis).count == 5


def test_a_new_producer_sends_what_an_earlier_one_left(trading_history: FakeHistory) -> None:
    """Closing ends at its time limit and loses nothing."""
    with trading_history.redis_down():
        first = HistoryProducer()
        first.record(a_snapshot())
        first.close(timeout=0.1)
    with HistoryProducer() as second:
        assert second.flush(5) == 0
    assert queue_of(trading_history.redis).count == 1


def test_a_receipt_knows_the_state_of_its_event(
    server: fakeredis.FakeServer, redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """pending, sent, then stored or rejected; an error when the entry was settled so long ago that it is dropped."""
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


def test_flushing_covers_what_was_recorded_before_the_call_and_no_more(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that goes on recording does not keep another one from its end."""
    monkeypatch.setattr("producers.entry_sender._BATCH_ENTRIES", 1)
    monkeypatch.setattr("producers.entry_sender._FULL_QUEUE_JOBS", 1)  # so that the second one stays in the outbox
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


def test_settling_asks_at_once_for_what_is_under_way(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis lost it: it is sent again now, not at its next check, and the caller hears how many are left."""
    monkeypatch.setattr("producers.entry_sender._FIRST_CHECK_SECONDS", 100.0)
    heard: list[int] = []
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        producer.record_many([a_snapshot(after=timedelta(n)) for n in range(3)])
        producer.flush(5)
        assert producer.settle(0.05) == 3
        redis.flushall()
        monkeypatch.setattr("producers.transport._CHECK_NOW_SECONDS", 0.02)
        stop = threading.Event()
        worker = threading.Thread(target=_work_until, args=(FakeWorker(redis, "history"), stop))
        worker.start()
        assert producer.settle(10, progress=heard.append) == 0
        stop.set()
        worker.join()
        assert producer.status().stored == 3
    assert (heard[0], heard[-1]) == (3, 0)


def _work_until(worker: FakeWorker, stop: threading.Event) -> None:
    while not stop.wait(0.005):
        worker.work()


def test_closing_waits_until_its_own_events_are_settled(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """A controller that exits after every event leaves nothing for the next one to find."""
    stop = threading.Event()
    worker = threading.Thread(target=_work_until, args=(FakeWorker(redis, "history"), stop))
    worker.start()
    for n in range(5):
        with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
            producer.record(a_snapshot(after=timedelta(n)))
        with Outbox(tmp_path / "outbox.db") as outbox:
            assert (outbox.status().depth, outbox.status().stored) == (0, n + 1)
    stop.set()
    worker.join()


def test_closing_hands_over_events_of_others_and_does_not_wait_for_their_end(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """No worker runs: another producer's event would take all of the time that closing has."""
    other = Outbox(tmp_path / "outbox.db")
    other.append("other", [a_snapshot()], producer_id=1)
    began = time.monotonic()
    HistoryProducer(redis, outbox=other.path).close(timeout=20)
    assert time.monotonic() - began < 10
    assert (other.status().pending, other.status().sent) == (0, 1)


def test_closing_takes_no_time_when_a_relay_process_looks_after_the_outbox(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """It has the event when the process is gone."""
    with Outbox(tmp_path / "outbox.db") as outbox:
        outbox.header.heartbeat("relay-1")
        producer = HistoryProducer(redis, outbox=outbox.path)
        producer.record(a_snapshot())
        began = time.monotonic()
        producer.close(timeout=20)
        assert time.monotonic() - began < 10
        assert (outbox.status().pending, queue_of(redis).count) == (1, 0)


def test_all_producers_of_a_process_share_the_time_that_its_end_has(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that wait for an acknowledgement in vain take as long as one."""
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
def test_a_child_of_multiprocessing_closes_its_producers_when_it_ends(
    redis: fakeredis.FakeRedis, tmp_path: Path
) -> None:
    """It ends without atexit. A worker of its own settles its event, since Redis is the child's own here."""

    def record() -> None:
        worker = FakeWorker(redis, "history")
        threading.Thread(target=_work_until, args=(worker, threading.Event()), daemon=True).start()
        HistoryProducer(redis, outbox=tmp_path / "outbox.db").record(a_snapshot())

    child = multiprocessing.get_context("fork").Process(target=record, daemon=True)
    child.start()
    child.join(20)
    assert child.exitcode == 0
    assert Outbox(tmp_path / "outbox.db").status().stored == 1


def test_a_closed_producer_refuses_and_may_be_closed_again(producer: HistoryProducer) -> None:
    """Nothing is recorded after close."""
    producer.close()
    producer.close()
    with pytest.raises(ProducerClosed):
        producer.record(a_snapshot())


def test_many_threads_record_through_one_producer(trading_history: FakeHistory) -> None:
    """Every event gets its own number and its own job."""
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
def test_a_forked_child_goes_on_recording(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """The child appends to the same outbox with a connection of its own; the parent is not disturbed."""
    producer = HistoryProducer(redis, outbox=tmp_path / "outbox.db")
    producer.record(a_snapshot())

    def record() -> None:
        assert producer.record(a_snapshot(after=timedelta(1))).sequence == 2

    assert in_child(record) == 0
    assert producer.record(a_snapshot(after=timedelta(2))).sequence == 3
    assert producer.flush(5) == 0
    assert Outbox(tmp_path / "outbox.db").status().sent == 3
    producer.close(timeout=0)


def test_queue_and_outbox_come_from_the_settings_unless_given(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HISTORY_QUEUE and HISTORY_OUTBOX; an argument goes before them."""
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


def test_without_redis_the_construction_fails_and_names_the_setting() -> None:
    """Not at the first event, at the start."""
    with pytest.raises(SettingsError, match="^REDIS_URL is not set"):
        HistoryProducer()
    assert list(Path().rglob("*")) == []


def test_an_unfit_name_is_refused(redis: fakeredis.FakeRedis) -> None:
    """It becomes part of a key and of a CloudEvents source."""
    with pytest.raises(SettingsError, match="^name: "):
        HistoryProducer(redis, name="my bot/1")


def test_now_and_naive_times_are_in_the_configured_zone(
    redis: fakeredis.FakeRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The date that a snapshot gets is the local one there."""
    monkeypatch.setenv("HISTORY_TIMEZONE", "Pacific/Kiritimati")
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        assert producer.now().utcoffset() == timedelta(hours=14)
        assert producer.localized(datetime(2026, 1, 1, 10), "timestamp") == datetime(2025, 12, 31, 20, tzinfo=UTC)
        assert producer.localized(datetime(2026, 1, 1, tzinfo=UTC), "timestamp").utcoffset() == timedelta(0)


def test_a_resend_of_an_empty_outbox_sends_nothing(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """There is no source yet whose acknowledgements could be forgotten."""
    with HistoryProducer(redis, outbox=tmp_path / "outbox.db") as producer:
        assert producer.resend(datetime(2020, 1, 1, tzinfo=UTC)) == 0


def test_a_resend_forgets_what_workers_said_of_the_old_database(redis: fakeredis.FakeRedis, tmp_path: Path) -> None:
    """The controller was down, its event was stored, the database was restored to before: the event is sent again."""
    outbox = tmp_path / "outbox.db"
    with HistoryProducer(redis, outbox=outbox) as first:
        receipt = first.record(a_snapshot())
        first.flush(5)
        first.close(timeout=0)
    FakeWorker(redis, "history").work()
    key = acknowledgement_key(receipt.source)
    foreign = f"{receipt.source.split('/')[1]}-1-{'0' * 16}"  # of a copy of this outbox
    redis.hset(key, foreign, acknowledgement_text(int(redis.time()[0]), None, Outcome("stored", row_id=9)))
    again = HistoryProducer(redis, outbox=outbox)
    again.resend(datetime(2020, 1, 1, tzinfo=UTC))
    again.flush(5)
    again.close(timeout=0)

    state = Outbox(outbox).status()
    # Either its relay had read the old answer, and the resend undid that; or it had not, and never will.
    assert (state.stored, state.sent) == (0, 1)
    assert redis.hkeys(key) == [foreign.encode()]
