"""`audit` accounts for every number; `failed` lists, shows, requeues and discards rejected events."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.db.inserts import insert_events
from consumers.ops.audit import SourceAudit, audit
from consumers.ops.rejections import rejected_text, rejections
from producers.errors import EventRejected
from producers.events import KINDS, SNAPSHOT_TYPE, encode, event_of
from producers.history_producer import HistoryProducer, Receipt
from producers.outbox import Outbox
from tests.deliveries import burst, history_queue
from tests.factories import a_snapshot, an_archive

Work = Callable[[], None]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "consumers.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ.copy(),
        check=False,
    )


def _execute(statement: str) -> None:
    with get_db() as db:
        db.execute(text(statement))


@pytest.fixture
def mixed(producer: HistoryProducer, work: Work) -> list[Receipt]:
    """Record 1-3: snapshots; 4: an archive; 5: a duplicate of 1; 6: a conflict with 1."""
    receipts = [producer.record(a_snapshot(after=timedelta(n))) for n in range(3)]
    receipts += [producer.record(an_archive()), producer.record(a_snapshot()), producer.record(a_snapshot(balance=1))]
    producer.flush(5)
    work()
    for receipt in receipts[:5]:
        receipt.wait(5)
    with pytest.raises(EventRejected):
        receipts[5].wait(5)
    return receipts


def _audited(producer: HistoryProducer, redis: Redis, *, with_outbox: bool = True) -> SourceAudit:
    path = producer._transport.outbox.path
    (one,) = audit(redis, Outbox(path) if with_outbox else None)
    return one


def test_audit_accounts_for_every_number(producer: HistoryProducer, redis: Redis, mixed: list[Receipt]) -> None:
    """In both tables and in the outcomes. With the outbox, the tail is known."""
    one = _audited(producer, redis)
    assert (one.stored, one.duplicate, one.rejected, one.discarded, one.last) == (4, 1, 1, 0, 6)
    assert (one.source, one.under_way, one.missing, one.tail_known) == (mixed[0].source, 0, [], True)
    assert one.complete
    assert not _audited(producer, redis, with_outbox=False).tail_known


def test_events_under_way_are_not_missing(producer: HistoryProducer, redis: Redis, mixed: list[Receipt]) -> None:
    """Events that are not yet stored are found in the outbox, or without it in the queue, beside any other jobs.

    An event that is not there either is missing.
    """
    producer.record_many([a_snapshot(after=timedelta(10 + number)) for number in range(3)])
    producer.flush(5)
    queue = history_queue(redis)
    queue.enqueue("another.program", job_id="another")
    assert (_audited(producer, redis).under_way, _audited(producer, redis).missing) == (3, [])
    with get_db() as db:
        db.execute(
            text(
                "INSERT INTO event_outcomes (job_id, source, sequence, outcome) VALUES ('x', :source, 9, 'duplicate')"
            ),
            {"source": mixed[0].source},
        )
    without = _audited(producer, redis, with_outbox=False)
    assert (without.last, without.under_way, without.missing) == (9, 2, [])
    assert queue.remove(queue.job_ids[0]) == 1
    without = _audited(producer, redis, with_outbox=False)
    assert (without.last, without.under_way, without.missing) == (9, 1, [(7, 7)])


def test_audit_reports_lost_rows(
    producer: HistoryProducer, redis: Redis, mixed: list[Receipt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range in the middle, and the last number, which only the outbox knows. The exit status is 1."""
    _execute("DELETE FROM portfolio_history WHERE sequence IN (2, 3)")
    _execute("DELETE FROM event_outcomes WHERE sequence = 6")

    assert _audited(producer, redis).missing == [(2, 3), (6, 6)]
    assert _audited(producer, redis, with_outbox=False).missing == [(2, 3)]
    monkeypatch.setenv("HISTORY_OUTBOX", str(producer._transport.outbox.path))
    run = _run("audit")
    assert run.returncode == 1
    assert "2-3, 6" in run.stdout


def test_audit_reports_another_event_under_a_number(
    producer: HistoryProducer, redis: Redis, mixed: list[Receipt]
) -> None:
    """The database has the number, but with another event id than the outbox."""
    _execute("UPDATE portfolio_history SET event_id = gen_random_uuid() WHERE sequence = 2")
    one = _audited(producer, redis)
    assert (one.missing, one.mismatched, one.complete) == ([], [2], False)


def test_audit_checks_each_source_separately(redis: Redis, database_url: str, work: Work, tmp_path: Path) -> None:
    for name in ("a", "b"):
        with HistoryProducer(redis, outbox=tmp_path / f"{name}.db", name=name) as producer:
            producer.record_many([a_snapshot(after=timedelta(n), portfolio_id=ord(name)) for n in range(3)])
            producer.flush(5)
    work()
    _execute("DELETE FROM portfolio_history WHERE source LIKE 'a/%' AND sequence = 2")

    assert [(one.source[0], one.missing) for one in audit(redis)] == [("a", [(2, 2)]), ("b", [])]


def test_numbers_of_an_import_begin_at_0(database_url: str) -> None:
    """The source of an import has three parts. A source that only begins with the same name begins at 1."""
    with get_db() as db:
        events = [a_snapshot(after=timedelta(hours=number)) for number in range(4)]
        insert_events(db, [event_of(events[n], source="import/a.json/0a", sequence=n) for n in (1, 3)])
        insert_events(db, [event_of(events[0], source="import/0b", sequence=1)])
    assert [(one.source, one.missing) for one in audit()] == [
        ("import/0b", []),
        ("import/a.json/0a", [(0, 0), (2, 2)]),
    ]


def test_rejected_event_without_a_valid_source_is_not_counted(
    producer: HistoryProducer, redis: Redis, mixed: list[Receipt], work: Work
) -> None:
    """An event of another program may have a number but an invalid source. The audit ignores its rejection."""
    foreign = json.loads(encode(event_of(a_snapshot(after=timedelta(20)), source="x/1", sequence=1)))
    foreign["source"] = "my bot"
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    queue.enqueue(KINDS[foreign["type"]].job_function, json.dumps(foreign), job_id="foreign")
    work()
    with get_db() as db:
        rejected = text("SELECT source, sequence FROM event_outcomes WHERE job_id = 'foreign'")
        assert db.execute(rejected).one() == (None, 1)

    one = _audited(producer, redis)
    assert (one.source, one.rejected, one.missing) == (mixed[0].source, 1, [])
    run = _run("audit")
    assert (run.returncode, run.stderr) == (0, "")


def test_failed_lists_and_shows_rejected_events(mixed: list[Receipt]) -> None:
    """`failed list` ends with 1 if there are any, and shows no payloads. `failed show` takes an event id."""
    listed = _run("failed", "list", "--each", "--json")
    (rejection,) = json.loads(listed.stdout)
    shown = _run("failed", "show", str(mixed[5].event_id))

    assert listed.returncode == 1
    assert (rejection["kind"], rejection["sequence"], rejection["event_id"]) == ("snapshot", 6, str(mixed[5].event_id))
    assert rejection["reason"].endswith("with other content")
    assert '"balance":"1"' in shown.stdout
    assert _run("failed", "list", "--kind", "archive").returncode == 0
    assert _run("failed", "list", "--kind", "sheep").returncode == 2
    assert _run("failed", "show", "nothing").stderr == "error: no rejection has the job id or event id nothing\n"


@pytest.mark.parametrize("redis_kept_it", [True, False])
def test_requeued_event_that_is_stored_is_no_longer_rejected(
    producer: HistoryProducer, redis: Redis, mixed: list[Receipt], work: Work, redis_kept_it: bool
) -> None:
    """Also if Redis has lost the job. The outbox then marks the entry as stored."""
    _execute("DELETE FROM portfolio_history WHERE sequence = 1")
    if not redis_kept_it:
        redis.flushall()
    requeued = _run("failed", "requeue", "--all")
    work()

    assert (requeued.returncode, requeued.stdout) == (0, "1 requeued\n")
    assert list(rejections()) == []
    assert Queue("history", connection=redis, serializer=JSONSerializer).failed_job_registry.count == 0
    deadline = time.monotonic() + 20
    while producer.status().rejected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert producer.status().rejected == 0


def test_discarded_event_keeps_its_text_and_both_reasons(
    producer: HistoryProducer, redis: Redis, mixed: list[Receipt]
) -> None:
    """It is removed from the list and the failed registry, and the audit counts it as discarded."""
    (rejection,) = rejections()
    discarded = _run("failed", "discard", rejection.job_id, "--because", "test data")

    assert (discarded.returncode, list(rejections())) == (0, [])
    assert Queue("history", connection=redis, serializer=JSONSerializer).failed_job_registry.count == 0
    one = _audited(producer, redis)
    assert (one.rejected, one.discarded, one.missing) == (0, 1, [])
    with get_db() as db:
        reason, event = db.execute(text("SELECT reason, event FROM event_outcomes WHERE outcome = 'discarded'")).one()
    assert reason.startswith("test data; it was rejected: event ")
    assert json.loads(event)["sequence"] == "0000000000000000006"


@pytest.mark.parametrize("damage", ["lost", "no hash", "unreadable"])
def test_rejection_can_be_requeued_and_discarded_without_a_readable_job(
    redis: Redis, mixed: list[Receipt], damage: str, work: Work
) -> None:
    """The event's text in event_outcomes is enough."""
    (rejection,) = rejections()
    key = f"rq:job:{rejection.job_id}"
    if damage == "lost":
        redis.flushall()
    elif damage == "no hash":
        redis.delete(key)
        redis.set(key, "x")
    else:
        redis.hset(key, "timeout", "abc")
    requeued = _run("failed", "requeue", rejection.job_id)
    work()
    discarded = _run("failed", "discard", rejection.job_id, "--because", "test data")

    assert (requeued.returncode, requeued.stdout) == (0, "1 requeued\n")
    assert (discarded.returncode, discarded.stderr, list(rejections())) == (0, "", [])
    assert not redis.exists(key)


def test_discarded_event_stays_discarded_when_it_is_rejected_again(
    redis: Redis, mixed: list[Receipt], work: Work
) -> None:
    """A late second delivery does not add it to the list again."""
    (rejection,) = rejections()
    event = rejected_text(rejection.job_id)
    _run("failed", "discard", rejection.job_id, "--because", "test data")
    queue = Queue("history", connection=redis, serializer=JSONSerializer)
    queue.enqueue(KINDS[SNAPSHOT_TYPE].job_function, event, job_id=rejection.job_id)
    work()

    assert list(rejections()) == []
    with get_db() as db:
        assert db.execute(text("SELECT outcome FROM event_outcomes WHERE outcome <> 'duplicate'")).all() == [
            ("discarded",)
        ]


def test_requeue_and_discard_need_a_name_or_a_choice(redis: Redis, database_url: str) -> None:
    """Neither a name nor --kind or --all, or both, is wrong usage."""
    assert [
        _run("failed", "requeue").returncode,
        _run("failed", "requeue", "x", "--all").returncode,
        _run("failed", "discard", "--because", "r").returncode,
        _run("failed", "discard", "--all").returncode,
    ] == [2, 2, 2, 2]


def test_rejected_job_is_shown_literally(redis: Redis, database_url: str) -> None:
    """A function name that looks like rich's markup, and a text with control characters for a terminal."""
    queue = history_queue(redis)
    queue.enqueue("[/x]", "{}", job_id="no-function")
    queue.enqueue(KINDS[SNAPSHOT_TYPE].job_function, "[/x] [range 1-2] \x1b[2J\x9b31m", job_id="steering")
    burst(redis)
    listed, shown = _run("failed", "list"), _run("failed", "show", "steering")

    assert (listed.returncode, listed.stderr) == (1, "")
    assert "other than our job functions: [/x]" in listed.stdout
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.endswith("\n[/x] [range 1-2] \\u001b[2J\\u009b31m\n")
    assert not {"\x1b", "\x9b"} & set(listed.stdout + shown.stdout)
    unknown = _run("failed", "show", "\x1b[2J")
    assert unknown.stderr == "error: no rejection has the job id or event id \\u001b[2J\n"
