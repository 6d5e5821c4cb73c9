"""The relay: sends each entry once, again only when it is no longer under way, and reads acknowledgements."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from rq import Queue
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from producers import relay as relay_module
from producers.errors import OutboxError
from producers.outbox import Outbox
from producers.redis_keys import acknowledgement_key
from producers.relay import Relay
from tests.factories import a_snapshot, an_archive

NAME = "trading-controller"


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox.db")


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def redis(server: fakeredis.FakeServer) -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(server=server)


@pytest.fixture
def relay(outbox: Outbox, redis: fakeredis.FakeRedis) -> Iterator[Relay]:
    """Not started: each test calls sweep itself."""
    relay = Relay(outbox, redis, "history")
    yield relay
    relay.stop()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sent entry is overdue at the next sweep."""
    monkeypatch.setattr(relay_module, "_check_interval", lambda checks: -1.0)


def _queue(redis: fakeredis.FakeRedis) -> Queue:
    return Queue("history", connection=redis, serializer=JSONSerializer)


def _job(redis: fakeredis.FakeRedis) -> Job:
    (job_id,) = set(_queue(redis).job_ids)
    return Job.fetch(job_id, connection=redis, serializer=JSONSerializer)


def test_a_sweep_sends_everything_pending_in_order(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """More than one batch, each kind to its own job function, failures kept for ever."""
    count = 2 * relay_module._BATCH_ENTRIES + 1
    outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(count)])
    outbox.append(NAME, [an_archive()])

    assert relay.sweep()

    job_ids = _queue(redis).job_ids
    assert [int(job_id.split("-")[1]) for job_id in job_ids] == list(range(1, count + 2))
    jobs = [Job.fetch(job_id, connection=redis, serializer=JSONSerializer) for job_id in (job_ids[0], job_ids[-1])]
    assert [job.func_name for job in jobs] == [
        "consumers.handlers.record_portfolio_snapshot",
        "consumers.handlers.record_signal_archive",
    ]
    assert [job.failure_ttl for job in jobs] == [-1, -1]
    assert (outbox.status().pending, outbox.status().sent) == (0, count + 1)
    assert not relay.sweep()


@pytest.mark.parametrize("decode", [False, True])
def test_acknowledgements_settle_entries_and_are_removed(outbox: Outbox, server: Any, decode: bool) -> None:
    """With clients that decode answers and such that do not; what is no acknowledgement is dropped with a word."""
    redis = fakeredis.FakeRedis(server=server, decode_responses=decode)
    relay = Relay(outbox, redis, "history")
    (first, *_) = outbox.append(NAME, [a_snapshot(after=timedelta(n)) for n in range(3)])
    relay.sweep()
    key = acknowledgement_key(first.source)
    redis.hset(key, mapping={"1": "stored:42", "2": "rejected:balance: wrong", "3": "who knows", "x": "stored:1"})
    relay.sweep()

    outcomes = [outbox.outcome(first.source_id, sequence) for sequence in (1, 2, 3)]
    assert [outcome and str(outcome) for outcome in outcomes] == ["stored:42", "rejected:balance: wrong", None]
    assert redis.hgetall(key) == {}
    relay.stop()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.STARTED, JobStatus.SCHEDULED, JobStatus.DEFERRED])
def test_what_is_under_way_is_left_alone(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, status: JobStatus
) -> None:
    """However often it is looked at, the queue keeps one entry."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    _job(redis).set_status(status)
    for _ in range(5):
        relay.sweep()

    assert _queue(redis).count == 1


@pytest.mark.usefixtures("at_once")
def test_what_redis_lost_is_sent_again_with_the_same_bytes(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """FLUSHALL: the same job id and the same data."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    before = _job(redis)
    redis.flushall()
    relay.sweep()

    assert (_job(redis).id, _job(redis).data) == (before.id, before.data)
    assert _queue(redis).count == 1


@pytest.mark.usefixtures("at_once")
def test_what_failed_without_a_rejection_is_sent_again_and_leaves_the_failed_registry(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis
) -> None:
    """A crash or an outage under a stock worker."""
    outbox.append(NAME, [a_snapshot()])
    relay.sweep()
    job = _job(redis)
    redis.delete(_queue(redis).key)
    job.set_status(JobStatus.FAILED)
    _queue(redis).failed_job_registry.add(job, ttl=-1, exc_string="boom")
    relay.sweep()

    assert _queue(redis).job_ids == [job.id]
    assert _queue(redis).failed_job_registry.get_job_ids() == []
    assert job.get_status() == JobStatus.QUEUED


@pytest.mark.usefixtures("at_once")
def test_what_is_acknowledged_is_never_sent_again(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """Stored or rejected, even after Redis lost everything."""
    (first, _) = outbox.append(NAME, [a_snapshot(), a_snapshot(after=timedelta(1))])
    relay.sweep()
    redis.flushall()
    redis.hset(acknowledgement_key(first.source), mapping={"1": "stored:1", "2": "rejected:no"})
    for _ in range(3):
        relay.sweep()

    assert _queue(redis).count == 0


def test_a_send_whose_answer_was_lost_is_not_repeated_blindly(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis took the jobs, the connection broke before it said so: the next sweep finds them there."""
    outbox.append(NAME, [a_snapshot()])
    original = relay._queue.enqueue_many

    def lose_the_answer(datas: Any, pipeline: Any) -> Any:
        original(datas, pipeline=pipeline)
        pipeline.execute()
        raise RedisConnectionError("connection closed by server")

    monkeypatch.setattr(relay._queue, "enqueue_many", lose_the_answer)
    with pytest.raises(RedisConnectionError):
        relay.sweep()
    monkeypatch.setattr(relay._queue, "enqueue_many", original)
    assert (outbox.status().pending, _queue(redis).count) == (1, 1)
    relay.sweep()

    assert (outbox.status().sent, _queue(redis).count) == (1, 1)


def test_a_send_that_could_not_be_marked_is_not_repeated_blindly(
    outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the mark is to be written: however often it is tried, one entry is in the queue."""
    outbox.append(NAME, [a_snapshot()])

    def full(check_at: Any) -> None:
        raise OutboxError("full")

    monkeypatch.setattr(outbox, "mark_sent", full)
    for _ in range(4):
        with pytest.raises(OutboxError):
            relay.sweep()

    assert _queue(redis).count == 1


def test_only_one_relay_works_on_an_outbox(outbox: Outbox, relay: Relay, redis: fakeredis.FakeRedis) -> None:
    """The other takes over when the first one stops."""
    second = Relay(Outbox(outbox.path), redis, "history")
    relay.sweep()
    outbox.append(NAME, [a_snapshot()])
    assert (second.sweep(), _queue(redis).count) == (False, 0)
    relay.stop()
    assert (second.sweep(), _queue(redis).count) == (True, 1)
    second.stop()


def test_an_outage_is_said_once_and_so_is_its_end(
    outbox: Outbox, relay: Relay, server: fakeredis.FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at every try; pauses grow up to a limit and never exceed it."""
    server.connected = False
    outbox.append(NAME, [a_snapshot()])
    with caplog.at_level(logging.WARNING):
        pauses = []
        for _ in range(20):
            with pytest.raises(RedisConnectionError) as caught:
                relay.sweep()
            pauses.append(relay._back_off(caught.value))
        server.connected = True
        relay.sweep()
        relay._recovered()
        relay._recovered()

    assert len(caplog.records) == 2
    assert "events stay in the outbox" in caplog.records[0].getMessage()
    assert pauses[0] < 0.5
    assert all(2.5 <= pause <= 5 for pause in pauses[-5:])
    assert len(set(pauses)) == 20


def test_intervals_between_looks_grow_to_five_minutes() -> None:
    """About 5, 10, 20 ... 300 seconds, never in step with others."""
    intervals = [relay_module._check_interval(checks) for checks in range(12)]
    expected = [5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300, 300]
    assert all(0.9 * wanted <= got <= 1.1 * wanted for got, wanted in zip(intervals, expected, strict=True))
