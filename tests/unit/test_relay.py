"""The relay: it sends each entry once, sends it again only if its job is lost, and reads acknowledgements."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producers import acknowledgement_reader, entry_sender, outbox_clock
from producers import relay as relay_module
from producers.acknowledgement_reader import AcknowledgementReader
from producers.acknowledgements import Acknowledgement, Outcome, acknowledgement_text, shown
from producers.entries import Accepted, Entry, EntryStatus, SettledKeys
from producers.entry_sender import EntrySender
from producers.errors import OutboxError, RelayRefused
from producers.events import SignalArchive
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key, job_id_of
from producers.redis_url import place_of
from producers.relay import Relay
from producers.rq_queue import enqueue
from tests.factories import a_signal, a_snapshot, an_archive
from tests.unit.conftest import queue_of, sent_commands

NAME = "trading-controller"
KEEP_SECONDS = 3600.0


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox.db")


@pytest.fixture
def relay(outbox: Outbox, redis: fakeredis.FakeRedis) -> Iterator[Relay]:
    """Relay without a thread; each test calls `sweep`."""
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS, last_backoff_seconds=0.4)
    yield relay
    relay.stop()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sent entry is overdue at the next sweep."""
    monkeypatch.setattr(entry_sender, "_check_interval", lambda checks: -1.0)


def _field(one: Accepted | Entry) -> str:
    return job_id_of(one.source_id, one.sequence, one.nonce)


def _acknowledge(redis: fakeredis.FakeRedis, one: Accepted | Entry, outcome: str) -> None:
    """Acknowledge one entry as a worker does."""
    text = acknowledgement_text(int(redis.time()[0]), None, Outcome.parse(outcome))
    redis.hset(acknowledgement_key(one.source), _field(one), text)


def _job(redis: fakeredis.FakeRedis) -> Job:
    (job_id,) = set(queue_of(redis).job_ids)
    return Job.fetch(job_id, connection=redis, serializer=JSONSerializer)


def test_a_sweep_sends_everything_pending_in_order(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """More than one batch is sent; each kind has its job function, and RQ keeps failed jobs for ever."""
    count = 2 * entry_sender._BATCH_ENTRIES + 1
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(count)])
    outbox.append(NAME, [an_archive()])

    assert relay.sweep()

    job_ids = queue_of(redis).job_ids
    assert [int(job_id.split("-")[1]) for job_id in job_ids] == list(range(1, count + 2))
    jobs = [Job.fetch(job_id, connection=redis, serializer=JSONSerializer) for job_id in (job_ids[0], job_ids[-1])]
    assert [job.func_name for job in jobs] == [
        "consumers.handlers.record_portfolio_snapshot",
        "consumers.handlers.record_signal_archive",
    ]
    assert [job.failure_ttl for job in jobs] == [-1, -1]
    assert (outbox.status().pending, outbox.status().sent) == (0, count + 1)
    assert not relay.sweep()


@pytest.mark.parametrize(
    ("settle_seconds", "counts"),
    [(0.0, [(15, 0), (5, 0), (0, 0)]), (60.0, [(15, 0), (5, 10), (0, 0)])],
)
def test_acknowledgements_are_read_at_times_while_there_is_more_to_send_and_always_when_not(
    outbox: Outbox,
    relay: Relay,
    redis: fakeredis.FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
    *,
    settle_seconds: float,
    counts: list[tuple[int, int]],
) -> None:
    """Workers are as fast as the relay, so the queue never fills. Each sweep ends nevertheless."""
    monkeypatch.setattr(relay_module, "_SETTLE_SECONDS", settle_seconds)
    monkeypatch.setattr(entry_sender, "_BATCH_ENTRIES", 2)
    monkeypatch.setattr(entry_sender, "_MOST_ENTRIES", 10)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(25)])
    send = relay._sender._send

    def stored_at_once(entries: Any) -> None:
        send(entries)
        for entry in entries:
            _acknowledge(redis, entry, f"stored:{entry.sequence}")
        redis.delete(queue_of(redis).key)

    monkeypatch.setattr(relay._sender, "_send", stored_at_once)
    sent = []
    for _ in counts:
        relay.sweep()
        sent.append((outbox.status().pending, outbox.status().sent))
    assert sent == counts


def _large_archive(number: int, mebibytes: float = 1.5) -> SignalArchive:
    return an_archive(after=timedelta(number), signals=[a_signal(reason="ü" * round(mebibytes * 2**19))])


@pytest.fixture
def batches(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """List that grows by each batch sent: the size of each event in bytes."""
    found: list[list[int]] = []
    send = relay._sender._send

    def counted(entries: Sequence[Entry]) -> None:
        found.append([len(entry.event.encode()) for entry in entries])
        send(entries)

    monkeypatch.setattr(relay._sender, "_send", counted)
    return found


def test_jobs_have_the_time_of_redis_clock(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts may have different times; a worker computes the age of a job from this one."""
    redis_now = datetime(2031, 5, 6, 7, 8, 9, 500_000)
    seconds = redis_now.replace(tzinfo=UTC).timestamp()
    monkeypatch.setattr(redis, "time", lambda: (int(seconds), 500_000))
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    enqueued_at = _job(redis).enqueued_at
    assert enqueued_at is not None
    assert timedelta(0) <= enqueued_at.replace(tzinfo=None) - redis_now < timedelta(seconds=5)


def test_large_archives_are_sent_in_small_batches(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, batches: list[list[int]]
) -> None:
    """A batch has at most 4 MiB, or one larger event. The next sweep continues, and the order is kept."""
    small = [a_snapshot(after=timedelta(n)) for n in range(3)]
    archives = [_large_archive(n) for n in range(5)]
    outbox.append(NAME, [*small, *archives, _large_archive(5, 6.0), *small])
    while outbox.status().pending:
        assert relay.sweep()

    assert [len(batch) for batch in batches] == [5, 2, 1, 1, 3]
    assert all(sum(batch) <= 4 * 2**20 or len(batch) == 1 for batch in batches)
    assert [int(job_id.split("-")[1]) for job_id in queue_of(redis).job_ids] == list(range(1, 13))


def test_large_archives_that_redis_lost_are_sent_again_in_small_batches(
    outbox: Outbox,
    relay: Relay,
    redis: fakeredis.FakeRedis,
    batches: list[list[int]],
    later: Callable[[float], None],
) -> None:
    """Each is sent once, and entries that are queued again meanwhile are not among them."""
    outbox.append(NAME, [_large_archive(n) for n in range(5)])
    while outbox.status().pending:
        relay.sweep()
    sent = queue_of(redis).job_ids
    redis.flushall()
    batches.clear()
    later(6)
    while relay.sweep():
        pass

    assert [len(batch) for batch in batches if batch] == [2, 2, 1]
    assert sorted(queue_of(redis).job_ids) == sorted(sent)


@pytest.mark.usefixtures("at_once")
def test_checking_a_queued_entry_does_not_read_its_event(outbox: Outbox, relay: Relay) -> None:
    """Workers may be down for a long time, and large archives are checked all that time."""
    outbox.append(NAME, [an_archive()])
    relay.sweep()
    with closing(sqlite3.connect(outbox.path)) as db:
        db.execute("UPDATE entries SET event = CAST(x'ff' AS TEXT)")  # invalid UTF-8: reading it fails
        db.commit()
    for _ in range(5):
        assert not relay.sweep()


@pytest.mark.parametrize("most", [250, 300], ids=["more than full", "exactly full"])
def test_a_full_queue_gets_no_more_jobs_until_workers_have_made_room(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The other entries stay in the outbox, where they are durable."""
    monkeypatch.setattr(entry_sender, "_FULL_QUEUE_JOBS", most)
    monkeypatch.setattr(entry_sender, "_BATCH_ENTRIES", 100)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(500)])
    for _ in range(3):
        relay.sweep()
    assert (queue_of(redis).count, outbox.status().pending) == (300, 200)

    redis.ltrim(queue_of(redis).key, 100, -1)  # a worker took a hundred
    relay.sweep()
    assert (queue_of(redis).count, outbox.status().pending) == (300, 100)


def test_a_relay_that_is_stopped_sends_no_further_batch(
    outbox: Outbox, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that it belongs to waits for it at its end."""
    monkeypatch.setattr(entry_sender, "_BATCH_ENTRIES", 2)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(5)])
    sender = EntrySender(outbox, redis, "history")
    assert sender.send_pending(probe=False, stopped=lambda: True) == 2
    assert sender.send_pending(probe=False, stopped=lambda: False) == 3
    assert queue_of(redis).count == 5


def test_the_first_batch_after_a_failure_is_one_entry(
    outbox: Outbox, relay: Relay, monkeypatch: pytest.MonkeyPatch, redis: fakeredis.FakeRedis
) -> None:
    """Preparing a whole batch for each failing try would delay the caller's thread."""
    monkeypatch.setattr(entry_sender, "_BATCH_ENTRIES", 100)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(150)])
    tried: list[int] = []

    def fail(pipe: Any, queue: Any, entries: Any, at: Any = None) -> None:
        tried.append(len(entries))
        if len(tried) < 4:
            raise RedisConnectionError("failed")
        enqueue(pipe, queue, entries)

    monkeypatch.setattr(entry_sender, "enqueue", fail)
    relay.start()
    deadline = time.monotonic() + 10
    while outbox.status().pending and time.monotonic() < deadline:
        time.sleep(0.01)

    assert tried[:4] == [100, 1, 1, 1]
    assert queue_of(redis).count == 150


def test_a_batch_that_redis_got_although_sending_failed_is_not_sent_again(
    outbox: Outbox, relay: Relay, monkeypatch: pytest.MonkeyPatch, redis: fakeredis.FakeRedis
) -> None:
    """The connection is lost after Redis has executed the transaction. The next try is a batch of one entry."""
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(20)])
    send, tried = relay._sender._send, list[int]()

    def lost(entries: Any) -> None:
        tried.append(len(entries))
        send(entries)
        if len(tried) == 1:
            raise RedisConnectionError("no answer")

    monkeypatch.setattr(relay._sender, "_send", lost)
    relay.start()
    deadline = time.monotonic() + 10
    while outbox.status().pending and time.monotonic() < deadline:
        time.sleep(0.01)

    assert tried == [20, 0, 0]
    assert queue_of(redis).count == 20


def test_acknowledgements_are_read_although_redis_refuses_new_jobs(
    outbox: Outbox, relay: Relay, monkeypatch: pytest.MonkeyPatch, redis: fakeredis.FakeRedis
) -> None:
    """A full Redis gets memory back only when acknowledgements are deleted."""
    first, _ = outbox.append(NAME, [a_snapshot(), an_archive()])
    relay.sweep()
    _acknowledge(redis, first, "stored:1")
    outbox.append(NAME, [a_snapshot(after=timedelta(1))])

    def refuse(*_: Any, **__: Any) -> None:
        raise ResponseError("OOM command not allowed when used memory > 'maxmemory'.")

    monkeypatch.setattr(entry_sender, "enqueue", refuse)
    with pytest.raises(ResponseError, match="OOM"):
        relay.sweep()
    assert outbox.status_of(first).state == "stored"
    assert redis.keys("history:ack:*") == []


@pytest.mark.parametrize("decode", [False, True])
def test_acknowledgements_settle_entries_and_are_removed(outbox: Outbox, server: Any, decode: bool) -> None:
    """With and without `decode_responses`. Fields that are not acknowledgements are removed and logged."""
    redis = fakeredis.FakeRedis(server=server, decode_responses=decode)
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    first, second, third = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    relay.sweep()
    key = acknowledgement_key(first.source)
    _acknowledge(redis, first, "stored:42")
    _acknowledge(redis, second, "rejected:balance: wrong")
    redis.hset(key, mapping={_field(third): "who knows", "x": "17 - stored:1"})
    assert relay.sweep()

    assert [outbox.status_of(one) for one in (first, second, third)] == [
        EntryStatus("stored", 42, None),
        EntryStatus("rejected", None, "balance: wrong"),
        EntryStatus("sent", None, None),
    ]
    assert redis.hgetall(key) == {}
    relay.stop()


def test_reading_acknowledgements_returns_the_number_of_entries_that_they_settle(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """An entry without an acknowledgement does not count, and a settled one counts once."""
    first, second, _ = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    relay.sweep()
    _acknowledge(redis, first, "stored:1")
    _acknowledge(redis, second, "duplicate:1")
    reader = AcknowledgementReader(outbox, redis)
    assert [reader.apply() for _ in range(2)] == [2, 0]


def test_a_sweep_reads_all_acknowledgements_however_many_they_are(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """Redis returns a large hash in several parts."""
    accepted = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(1200)])
    for _ in range(2):
        relay.sweep()
    for one in accepted:
        _acknowledge(redis, one, "stored:1")
    assert len(redis.hscan(acknowledgement_key(accepted[0].source), count=500)[1]) < 1200
    relay.sweep()
    assert outbox.status().stored == 1200
    assert redis.keys("history:ack:*") == []


def test_only_the_acknowledgements_of_own_entries_are_deleted_before_a_resend(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """Others may be those of a copy of the outbox, which awaits them. A field that is no job id stays too."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    key, other = acknowledgement_key(accepted.source), job_id_of(accepted.source_id, 1, "0" * 16)
    for field in (_field(accepted), other, "x"):
        redis.hset(key, field, "17 - stored:1")
    relay.delete_acknowledgements()
    assert {shown(field) for field in redis.hkeys(key)} == {other, "x"}


def test_a_rejection_is_logged_with_its_identifiers(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, when it settles the entry."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    text = acknowledgement_text(int(redis.time()[0]), accepted.event_id, Outcome("rejected", reason="no"))
    for _ in range(2):
        redis.hset(acknowledgement_key(accepted.source), _field(accepted), text)
        relay._reader._rejected_at = 0.0
        relay.sweep()

    (record,) = caplog.records
    assert record.getMessage() == f"event {accepted.event_id} was rejected: no"
    named = {name: vars(record)[name] for name in ("event_id", "source", "sequence", "job_id", "outcome")}
    assert named == {
        "event_id": str(accepted.event_id),
        "source": accepted.source,
        "sequence": 1,
        "job_id": _field(accepted),
        "outcome": "rejected",
    }


def test_acknowledgements_of_rejected_entries_are_read_every_five_seconds(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator may requeue a rejected event, which is then stored."""
    clock = [1000.0]
    monkeypatch.setattr(acknowledgement_reader, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reader = AcknowledgementReader(outbox, redis)
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    _acknowledge(redis, accepted, "rejected:no")
    assert reader.apply() == 1
    _acknowledge(redis, accepted, "stored:1")
    settled = []
    for clock[0] in (1000.1, 1004.9, 1005.0):
        settled.append(reader.apply())
    assert settled == [0, 0, 1]


def test_the_acknowledgements_stay_if_redis_refuses_to_read_them(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a key of another type is renamed. A missing permission, for example, is an error of each sweep."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    _acknowledge(redis, accepted, "stored:1")

    def refuse(*_: Any, **__: Any) -> None:
        raise ResponseError("NOPERM this user has no permissions to run the 'hscan' command")

    monkeypatch.setattr(redis, "hscan", refuse)
    with pytest.raises(ResponseError, match="NOPERM"):
        relay.sweep()
    assert [shown(key) for key in redis.keys("history:ack:*")] == [acknowledgement_key(accepted.source)]


def test_an_acknowledgement_that_replaces_a_rejection_is_not_removed_unread(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued event is stored between reading and removing the rejection; the next sweep reads the new value."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    key = acknowledgement_key(accepted.source)
    _acknowledge(redis, accepted, "rejected:no")
    settle = outbox.deliveries.settle

    def stored_meanwhile(*arguments: Any) -> SettledKeys:
        settled = settle(*arguments)
        _acknowledge(redis, accepted, "stored:42")
        return settled

    monkeypatch.setattr(outbox.deliveries, "settle", stored_meanwhile)
    relay.sweep()
    monkeypatch.undo()
    assert outbox.status_of(accepted).state == "rejected"
    (left,) = redis.hvals(key)
    assert shown(left).endswith(" - stored:42")
    relay._reader._rejected_at = 0.0
    relay.sweep()

    assert (outbox.status_of(accepted), redis.hgetall(key)) == (EntryStatus("stored", 42, None), {})


def test_an_acknowledgement_written_while_a_rejection_is_removed_is_not_lost(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written between comparison and removal, which makes their transaction fail."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    _acknowledge(redis, accepted, "rejected:no")
    hmget = fakeredis.FakeRedis.hmget

    def acknowledged_meanwhile(pipe: Any, *arguments: Any) -> Any:
        found = hmget(pipe, *arguments)
        _acknowledge(redis, accepted, "stored:42")
        return found

    monkeypatch.setattr("redis.client.Pipeline.hmget", acknowledged_meanwhile)
    relay.sweep()
    monkeypatch.undo()

    (left,) = redis.hvals(acknowledgement_key(accepted.source))
    assert shown(left).endswith(" - stored:42")


def test_an_acknowledgement_that_is_not_text_is_removed(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """The other acknowledgements in the hash settle their entries."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    redis.hset(acknowledgement_key(accepted.source), b"\xff", b"\xfe")
    _acknowledge(redis, accepted, "stored:42")
    relay.sweep()

    assert outbox.status_of(accepted) == EntryStatus("stored", 42, None)
    assert redis.hgetall(acknowledgement_key(accepted.source)) == {}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "field_and_value",
    [
        ("{source_id}-" + "9" * 25, "17 - stored:1"),
        ("{source_id}-" + "9" * 19, "17 - stored:1"),
        ("{second}", f"17 - stored:{'9' * 25}"),
        ("{second}", f"{'9' * 25} - stored:1"),
        ("9" * 5000, "17 - stored:1"),
        ("{source_id}--1", "17 - stored:1"),
    ],
    ids=[
        "sequence of 25 digits",
        "sequence beyond 2^63",
        "row id of 25 digits",
        "time of 25 digits",
        "field of 5000 digits",
        "negative sequence",
    ],
)
def test_an_acknowledgement_with_an_impossible_number_is_removed(
    outbox: Outbox,
    relay: Relay,
    redis: fakeredis.FakeRedis,
    caplog: pytest.LogCaptureFixture,
    field_and_value: tuple[str, str],
) -> None:
    """Acknowledgements beside it and after it settle their entries."""
    first, second, third = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    relay.sweep()
    key = acknowledgement_key(first.source)
    field = field_and_value[0].format(source_id=first.source_id, second=_field(second))
    redis.hset(key, field, field_and_value[1])
    _acknowledge(redis, first, "stored:42")
    relay.sweep()
    _acknowledge(redis, third, "stored:43")
    relay.sweep()

    assert [outbox.status_of(one) for one in (first, second, third)] == [
        EntryStatus("stored", 42, None),
        EntryStatus("sent", None, None),
        EntryStatus("stored", 43, None),
    ]
    assert redis.hgetall(key) == {}
    (record,) = caplog.records
    assert record.getMessage() == f"removed field {field[:80]} of {first.source}: it is not an acknowledgement"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.STARTED, JobStatus.SCHEDULED, JobStatus.DEFERRED])
def test_entries_with_an_active_job_are_not_sent_again(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, status: JobStatus
) -> None:
    """The queue has one entry after any number of checks."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    _job(redis).set_status(status)
    for _ in range(5):
        relay.sweep()

    assert queue_of(redis).count == 1


@pytest.mark.usefixtures("at_once")
def test_jobs_that_redis_lost_are_sent_again_with_the_same_bytes(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """After FLUSHALL, the job has the same id and data."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    before = _job(redis)
    redis.flushall()
    relay.sweep()

    assert (_job(redis).id, _job(redis).data) == (before.id, before.data)
    assert queue_of(redis).count == 1


@pytest.mark.usefixtures("at_once")
def test_a_job_that_failed_without_a_rejection_is_sent_again_and_leaves_the_failed_registry(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """RQ's own worker fails a job after a crash or an outage."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    job = _job(redis)
    redis.delete(queue_of(redis).key)
    job.set_status(JobStatus.FAILED)
    queue_of(redis).failed_job_registry.add(job, ttl=-1, exc_string="boom")
    relay.sweep()

    assert queue_of(redis).job_ids == [job.id]
    assert queue_of(redis).failed_job_registry.get_job_ids() == []
    assert job.get_status() == JobStatus.QUEUED


@pytest.mark.usefixtures("at_once")
def test_a_job_that_is_queued_for_long_but_in_no_list_is_sent_again(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """A worker died with the job, whose status remains. The lists are searched from the third check on: after 35 s."""
    outbox.append(NAME, [a_snapshot(), a_snapshot(after=timedelta(1))])
    relay.sweep()
    job_ids = queue_of(redis).job_ids
    redis.lpop(queue_of(redis).key)
    counts = []
    for _ in range(3):  # the first sweep has checked it too
        relay.sweep()
        counts.append(queue_of(redis).count)
    assert counts == [1, 2, 2]
    assert queue_of(redis).job_ids == [job_ids[1], job_ids[0]]


def test_a_batch_is_enqueued_in_one_transaction_of_redis(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the connection breaks, Redis has the whole batch or nothing: no job is queued and in no list."""
    outbox.append(NAME, [a_snapshot(), a_snapshot(after=timedelta(1))])
    sent = sent_commands(redis, monkeypatch)
    relay.sweep()
    (batch,) = [commands for commands in sent if b"RPUSH" in commands]
    assert batch.index(b"MULTI") < batch.index(b"HSET") < batch.index(b"RPUSH") < batch.index(b"EXEC")


def test_a_relay_that_waits_for_its_turn_pauses_between_sweeps(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes hardly any time from the caller's program."""
    relay.sweep()
    waiting = Relay(Outbox(outbox.path), redis, "history", keep_seconds=KEEP_SECONDS)
    sweeps = _counted(waiting, monkeypatch, waiting.sweep)
    waiting.start()
    time.sleep(0.2)
    assert waiting.running
    waiting.stop()
    assert 1 <= len(sweeps) <= 20


@pytest.mark.usefixtures("at_once")
def test_an_acknowledged_entry_is_never_sent_again(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """Neither a stored nor a rejected entry, even after Redis lost everything."""
    first, second = outbox.append(NAME, [a_snapshot(), a_snapshot(after=timedelta(1))])
    relay.sweep()
    redis.flushall()
    _acknowledge(redis, first, "stored:1")
    _acknowledge(redis, second, "rejected:no")
    for _ in range(3):
        relay.sweep()

    assert queue_of(redis).count == 0


@pytest.mark.usefixtures("at_once")
def test_an_entry_that_is_acknowledged_during_a_sweep_is_not_sent_again(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stores it after the relay read acknowledgements and before it reads the jobs' states."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    send_pending = relay._sender.send_pending

    def acknowledged_meanwhile(**options: Any) -> int:
        redis.delete(_job(redis).key, queue_of(redis).key)
        _acknowledge(redis, accepted, "stored:1")
        return send_pending(**options)

    monkeypatch.setattr(relay._sender, "send_pending", acknowledged_meanwhile)
    relay.sweep()
    assert queue_of(redis).count == 0


@pytest.mark.parametrize("earlier", [0, 1], ids=["first send", "later send"])
def test_a_send_without_an_answer_is_not_repeated_unchecked(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, earlier: int
) -> None:
    """Redis got the jobs, but the connection broke before the answer: the next sweep finds the jobs."""
    for number in range(earlier):
        outbox.append(NAME, [a_snapshot(after=timedelta(1 + number))])
        relay.sweep()
    outbox.append(NAME, [a_snapshot()])

    def lose_the_answer(pipe: Any, queue: Any, entries: Any, at: Any = None) -> None:
        enqueue(pipe, queue, entries)
        pipe.execute()
        raise RedisConnectionError("connection closed by server")

    monkeypatch.setattr(entry_sender, "enqueue", lose_the_answer)
    with pytest.raises(RedisConnectionError):
        relay.sweep()
    monkeypatch.undo()
    assert (outbox.status().pending, queue_of(redis).count) == (1, earlier + 1)
    relay.sweep()

    assert (outbox.status().sent, queue_of(redis).count) == (earlier + 1, earlier + 1)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_marked", [True, False])
def test_an_entry_whose_acknowledgement_waits_in_redis_is_not_enqueued(
    outbox: Outbox, redis: fakeredis.FakeRedis, is_marked: bool
) -> None:
    """Its job is gone because a worker has stored it. It may not be marked as sent yet: its relay died before that."""
    (accepted,) = outbox.append(NAME, [a_snapshot()])
    sender = EntrySender(outbox, redis, "history")
    if is_marked:
        sender.send_pending(probe=False, stopped=lambda: False)
        redis.flushall()
    _acknowledge(redis, accepted, "stored:1")
    sender.send_pending(probe=False, stopped=lambda: False)
    sender.send_overdue()
    assert (queue_of(redis).count, outbox.status().sent) == (0, 1)


def test_a_send_that_could_not_be_marked_is_not_repeated_unchecked(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the state is written: after any number of tries, one entry is in the queue."""
    outbox.append(NAME, [a_snapshot()])

    def full(check_at: Any) -> None:
        raise OutboxError("full")

    monkeypatch.setattr(outbox.deliveries, "mark_sent", full)
    for _ in range(4):
        with pytest.raises(OutboxError):
            relay.sweep()

    assert queue_of(redis).count == 1


def test_a_batch_of_a_file_that_is_replaced_before_it_is_marked_is_enqueued_once(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entries are carried over as pending. The same sweep finds their jobs."""
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(250)])
    mark_sent = outbox.deliveries.mark_sent

    def replace_before(check_after: Any) -> bool:
        monkeypatch.undo()
        outbox.path.unlink()
        outbox.append(NAME, [a_snapshot(after=timedelta(999))])
        return mark_sent(check_after)

    monkeypatch.setattr(outbox.deliveries, "mark_sent", replace_before)
    while relay.sweep():
        pass
    assert (queue_of(redis).count, outbox.status().sent) == (251, 251)


@pytest.mark.parametrize(("at_once", "most"), [(1, 40), (10, 14)])
def test_a_relay_lets_batches_form_if_many_entries_are_recorded(
    outbox: Outbox, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch, at_once: int, most: int
) -> None:
    """Sweeps begin at least 5 ms apart, or 20 ms after one that has sent many entries."""
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    began: list[float] = []

    def sweep() -> bool:
        began.append(time.monotonic())
        relay._sent = at_once
        return True

    monkeypatch.setattr(relay, "sweep", sweep)
    relay.start()
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        relay.wake()
        time.sleep(0.001)
    relay.stop()
    assert 2 <= len(began) <= most + 2


def test_an_idle_relay_sweeps_less_and_less_often(
    outbox: Outbox, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an entry was sent, pauses grow from 5 to 50 ms, so that it takes little time from the caller's program."""
    waits: list[float] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Recorded)
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    results = iter([True])
    monkeypatch.setattr(relay, "sweep", lambda: next(results, False))
    relay.start()
    _until(lambda: waits.count(0.05) >= 3)
    relay.stop()
    pauses = [wait for wait in waits if wait >= 0.005]  # shorter waits keep the sweeps 5 ms apart
    growing = pauses[: pauses.index(0.05) + 1]
    assert growing[0] == 0.005
    assert len(growing) > 3
    assert all(pause < after for pause, after in pairwise(growing))
    assert set(pauses[len(growing) :]) == {0.05}


def test_a_relay_does_not_pause_while_there_is_more_to_send(
    outbox: Outbox, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep ends although more entries are pending. The next one begins at once."""
    monkeypatch.setattr(entry_sender, "_BATCH_ENTRIES", 2)
    monkeypatch.setattr(entry_sender, "_MOST_ENTRIES", 10)
    sent_before_pauses: list[int] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                sent_before_pauses.append(queue_of(redis).count)
            return super().wait(timeout)

    monkeypatch.setattr(threading, "Event", Recorded)
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(25)])
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    relay.start()
    _until(lambda: len(sent_before_pauses) > 0)
    relay.stop()
    assert sent_before_pauses[0] == 25


def test_relays_that_die_before_they_mark_an_entry_enqueue_it_once(
    outbox: Outbox, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several relays die in a row; each finds the job of the first one."""
    outbox.append(NAME, [a_snapshot()])

    def die(check_at: Any) -> None:
        raise SystemExit

    for _ in range(4):
        dying = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
        monkeypatch.setattr(outbox.deliveries, "mark_sent", die)
        with pytest.raises(SystemExit):
            dying.sweep()
        monkeypatch.undo()
        dying.stop()

    assert queue_of(redis).count == 1


def test_only_one_relay_relays_an_outbox(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """The other one takes over when the first one stops."""
    second = Relay(Outbox(outbox.path), redis, "history", keep_seconds=KEEP_SECONDS)
    relay.sweep()
    outbox.append(NAME, [a_snapshot()])
    assert (second.sweep(), queue_of(redis).count) == (False, 0)
    relay.stop()
    assert (second.sweep(), queue_of(redis).count) == (True, 1)
    second.stop()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that advances the clocks of the outbox and of the relays by a number of seconds."""
    running, monotonic, passed = outbox_clock.running_seconds, time.monotonic, [0.0]
    monkeypatch.setattr(outbox_clock, "running_seconds", lambda: running() + passed[0])
    monkeypatch.setattr(entry_sender, "time", SimpleNamespace(monotonic=lambda: monotonic() + passed[0]))

    def wait(seconds: float) -> None:
        passed[0] += seconds

    return wait


def _relay_process(outbox: Outbox, redis: fakeredis.FakeRedis, queue: str = "history") -> Relay:
    other = Outbox(outbox.path, repair=True)
    return Relay(other, redis, queue, keep_seconds=KEEP_SECONDS, process_name="relay on here")


def test_a_sent_entry_is_checked_after_about_five_seconds(
    outbox: Outbox, relay: Relay, later: Callable[[float], None]
) -> None:
    """By up to 10 % earlier or later, so that outboxes that were started together do not check together."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    later(4.4)
    assert outbox.deliveries.overdue(10) == []
    later(1.2)
    assert len(outbox.deliveries.overdue(10)) == 1


def test_producers_leave_relaying_to_a_relay_process(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, later: Callable[[float], None]
) -> None:
    """They release the lock at their next sweep, and take over at once when the process ends."""
    outbox.append(NAME, [a_snapshot()])
    process = _relay_process(outbox, redis)
    relay.sweep()
    outbox.append(NAME, [a_snapshot(after=timedelta(1))])
    assert not process.sweep()  # it sent its heartbeat, but the producer's relay has the lock
    assert not relay.sweep()
    assert (outbox.status().pending, queue_of(redis).count) == (1, 1)
    assert process.sweep()
    assert (outbox.status().pending, queue_of(redis).count) == (0, 2)
    for _ in range(3):
        later(9)
        outbox.append(NAME, [a_snapshot()])
        assert (process.sweep(), relay.sweep()) == (True, False)

    outbox.append(NAME, [a_snapshot()])
    process.stop()
    assert relay.sweep()
    assert outbox.status().pending == 0


def test_producers_take_over_ten_seconds_after_a_relay_process_has_died(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, later: Callable[[float], None]
) -> None:
    """The kernel has released its lock."""
    process = _relay_process(outbox, redis)
    process.sweep()
    process.turn._lock.release()
    outbox.append(NAME, [a_snapshot()])
    later(9)
    assert not relay.sweep()
    later(2)
    assert relay.sweep()
    assert queue_of(redis).count == 1


def test_producers_take_over_from_a_relay_process_that_is_stopped_and_keeps_its_lock(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, later: Callable[[float], None]
) -> None:
    """When it continues, nothing is lost or sent twice, and the producer leaves relaying to it."""
    process = _relay_process(outbox, redis)
    (first,) = outbox.append(NAME, [a_snapshot()])
    process.sweep()
    later(11)
    token = outbox.header.read().token
    outbox.append(NAME, [a_snapshot(after=timedelta(1))])
    assert relay.sweep()
    assert outbox.header.read().token != token
    token = outbox.header.read().token
    for _ in range(3):
        relay.sweep()
    assert outbox.header.read().token == token  # taken over once, not at each sweep
    assert queue_of(redis).count == 2
    outbox.append(NAME, [a_snapshot(after=timedelta(2))])
    assert process.sweep()
    assert not relay.sweep()

    assert (outbox.status().pending, queue_of(redis).count) == (0, 3)
    assert outbox.append(NAME, [a_snapshot()])[0].source == first.source
    process.stop()


def test_a_second_relay_process_waits_until_the_first_one_ends(
    outbox: Outbox, redis: fakeredis.FakeRedis, later: Callable[[float], None]
) -> None:
    """Two processes are started for one outbox."""
    first, second = _relay_process(outbox, redis), _relay_process(outbox, redis)
    for _ in range(3):
        outbox.append(NAME, [a_snapshot()])
        assert (first.sweep(), second.sweep()) == (True, False)
        later(5)
    outbox.append(NAME, [a_snapshot()])
    first.stop()
    assert second.sweep()
    assert queue_of(redis).count == 4
    second.stop()


@pytest.mark.parametrize("other", ["queue", "redis"])
def test_a_relay_for_another_redis_or_queue_sends_nothing(
    outbox: Outbox, server: fakeredis.FakeServer, redis: fakeredis.FakeRedis, other: str
) -> None:
    """The outbox stores its destination; the error names both destinations."""
    outbox.header.set_destination(place_of(redis), "history")
    outbox.append(NAME, [a_snapshot()])
    elsewhere = fakeredis.FakeRedis(server=server, db=1) if other == "redis" else redis
    queue = "history" if other == "redis" else "other"
    for process_name in (None, "relay on here"):
        wrong = Relay(outbox, elsewhere, queue, keep_seconds=KEEP_SECONDS, process_name=process_name)
        with pytest.raises(RelayRefused) as refused:
            wrong.sweep()
        assert f"outbox {outbox.path}: its entries go to {place_of(redis)}, queue history, and not" in str(
            refused.value
        )
        assert f"{place_of(elsewhere)}, queue {queue}." in str(refused.value)
        wrong.stop()
    assert outbox.status().pending == 1
    right = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    assert right.sweep()
    right.stop()


def test_a_relay_process_for_another_queue_lets_producers_relay(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, later: Callable[[float], None]
) -> None:
    """A producer with other settings was started later, which changed the destination of the outbox."""
    process = _relay_process(outbox, redis, "other")
    outbox.header.set_destination(place_of(redis), "other")
    process.sweep()
    outbox.header.set_destination(place_of(redis), "history")
    outbox.append(NAME, [a_snapshot()])
    for _ in range(6):
        with pytest.raises(RelayRefused):
            process.sweep()
        later(2)
    assert relay.sweep()
    assert queue_of(redis).count == 1
    process.stop()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false after 10 s"
        time.sleep(0.001)


def _counted(relay: Relay, monkeypatch: pytest.MonkeyPatch, sweep: Callable[[], bool]) -> list[None]:
    """Make the relay call `sweep`; return a list that grows by one with each call."""
    calls: list[None] = []

    def counting() -> bool:
        calls.append(None)
        return sweep()

    monkeypatch.setattr(relay, "sweep", counting)
    return calls


def test_old_settled_entries_are_deleted_while_redis_is_away(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, server: fakeredis.FakeServer
) -> None:
    """In a long outage, new events need their room."""
    (settled,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    relay.stop()
    server.connected = False
    _settle_in(outbox, settled)
    outbox.append(NAME, [a_snapshot(after=timedelta(1))])
    later = Relay(outbox, redis, "history", keep_seconds=-1.0)
    with pytest.raises(RedisConnectionError):
        later.sweep()
    later.stop()
    assert [entry.sequence for entry in outbox.entries()] == [2]


def _settle_in(outbox: Outbox, one: Accepted) -> None:
    """Settle an entry as a relay does that has read its acknowledgement."""
    outcome = Outcome("stored", row_id=1)
    known = {0: Acknowledgement(one.source_id, one.sequence, one.nonce, str(one.event_id), outcome, at=0)}
    outbox.deliveries.settle(one.source_id, 0, known)


def test_an_outage_and_its_end_are_logged_once(
    outbox: Outbox,
    relay: Relay,
    server: fakeredis.FakeServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other try is logged. When Redis is back, the thread sends the waiting entries."""
    tries = _counted(relay, monkeypatch, relay.sweep)
    server.connected = False
    outbox.append(NAME, [a_snapshot()])
    relay.start()
    _until(lambda: len(tries) >= 5)
    server.connected = True
    _until(lambda: outbox.status().sent == 1 and len(caplog.records) >= 2)
    after = len(tries)
    _until(lambda: len(tries) >= after + 3)
    relay.stop()

    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert f"cannot relay {outbox.path}: ConnectionError" in messages[0]
    assert "events stay in the outbox" in messages[0]
    assert messages[1].startswith(f"relaying {outbox.path} again after ")


def test_a_defect_does_not_end_the_thread_and_is_logged_once(
    outbox: Outbox, relay: Relay, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread pauses between tries, even if it is woken; the log has one traceback."""

    def defect() -> bool:
        return 1 // 0 > 0

    sweep = relay.sweep
    outbox.append(NAME, [a_snapshot()])
    tries = _counted(relay, monkeypatch, defect)
    began, wakes = time.monotonic(), 0
    relay.start()
    while len(tries) < 3:
        relay.wake()
        wakes += 1
        time.sleep(0.001)
    elapsed = time.monotonic() - began

    assert wakes > 20
    assert elapsed >= relay_module._FIRST_BACKOFF_SECONDS * 1.5  # half of 0.2 s and half of 0.4 s
    (record,) = caplog.records
    assert "ZeroDivisionError" in record.getMessage()
    assert record.exc_info is not None
    assert relay.running

    monkeypatch.setattr(relay, "sweep", sweep)
    _until(lambda: outbox.status().sent == 1)


def test_an_error_without_a_message_does_not_end_the_thread(
    outbox: Outbox, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay says that there are no details, and tries again."""

    def fail() -> bool:
        raise TimeoutError

    tries = _counted(relay, monkeypatch, fail)
    relay.start()
    _until(lambda: len(tries) >= 2)
    assert relay.failure == "no details"
    assert relay.running


def test_pauses_after_failures_grow_up_to_a_limit(outbox: Outbox, redis: fakeredis.FakeRedis) -> None:
    """About 0.1, 0.3, 0.6 ... 5 seconds, with random differences."""
    relay = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS)
    pauses = [relay._back_off(RedisConnectionError("gone")) for _ in range(20)]

    assert pauses[0] < 0.5
    assert all(2.5 <= pause <= 5 for pause in pauses[-5:])
    assert len(set(pauses)) == 20


def test_intervals_between_checks_grow_to_five_minutes() -> None:
    """About 5, 10, 20 ... 300 seconds, with random differences."""
    intervals = [entry_sender._check_interval(checks) for checks in range(12)]
    expected = [5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300, 300]
    assert all(0.9 * wanted <= got <= 1.1 * wanted for got, wanted in zip(intervals, expected, strict=True))


def test_an_acknowledgement_key_of_another_type_is_quarantined(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """Otherwise nothing would be sent, because each sweep reads acknowledgements first."""
    (first,) = outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    redis.set(acknowledgement_key(first.source), "x")
    outbox.append(NAME, [a_snapshot(after=timedelta(1))])
    relay.sweep()

    assert (outbox.status().pending, outbox.status().sent) == (0, 2)
    assert redis.get(f"{acknowledgement_key(first.source)}:quarantined") == b"x"


def test_a_relay_process_that_cannot_reach_redis_lets_producers_relay(
    outbox: Outbox, redis: fakeredis.FakeRedis, server: fakeredis.FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its password may be wrong, for example. It sends no heartbeat until it can relay."""
    clock = [1000.0]
    monkeypatch.setattr("producers.relay.time.monotonic", lambda: clock[0])
    process = Relay(outbox, redis, "history", keep_seconds=KEEP_SECONDS, process_name="relay")
    outbox.append(NAME, [a_snapshot()])
    server.connected = False
    for moment in (0.0, 5.0, 11.0, 12.0):
        clock[0] = 1000.0 + moment
        with pytest.raises(RedisConnectionError):
            process.sweep()
        process._back_off(RedisConnectionError("away"))
        assert outbox.header.relay_is_alive() == (moment < 11.0)
    server.connected = True
    producer = Relay(Outbox(outbox.path), redis, "history", keep_seconds=KEEP_SECONDS)
    assert producer.sweep()
    producer.stop()
    process.sweep()
    assert outbox.header.relay_is_alive()
    process.stop()
