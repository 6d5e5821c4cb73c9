"""Verdict of the fault tests: it finds each kind of breach, and none in a run without faults."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import text

from consumers.db.engine import get_db
from consumers.ops.failed import discard
from consumers.ops.rejections import rejections
from producers.errors import EventRejected
from producers.history_producer import HistoryProducer
from tests.deliveries import burst
from tests.factories import a_snapshot, an_archive
from tests.faults.accepted import Accepted, Answer, delivery_of_receipt
from tests.faults.verdict import Verdict, verdict

Judge = Callable[[], Verdict]

_EVENTS = (
    a_snapshot(),
    an_archive(),
    a_snapshot(after=timedelta(seconds=1)),
    a_snapshot(),  # a duplicate
    a_snapshot(balance=1),  # a conflict
)


@pytest.fixture
def judge(database_url: str, redis: Redis, tmp_path: Path) -> Judge:
    """Function that judges a run in which `_EVENTS` were recorded and settled."""
    accepted, path = Accepted(), tmp_path / "outbox.db"
    with HistoryProducer(redis, outbox=path) as producer:
        for payload in _EVENTS:
            receipt = producer.record(payload)
            producer.flush(20)
            burst(redis)
            delivery = delivery_of_receipt(receipt, payload)
            accepted.deliveries.append(delivery)
            try:
                accepted.answers.append(Answer(delivery.job_id, receipt.wait(20), None))
            except EventRejected as error:
                accepted.answers.append(Answer(delivery.job_id, None, error.reason))
    return lambda: verdict([path], {"bot": accepted}, redis=redis)


def test_a_run_without_faults_has_no_breach(judge: Judge) -> None:
    judged = judge()
    assert judged.breaches == []
    assert (judged.accepted, judged.rows, judged.duplicate, judged.rejected) == (5, 3, 1, 1)
    assert judged.by_controller["bot"] == {"row": 3, "duplicate": 1, "rejected": 1}


def test_a_discarded_rejection_counts_as_rejected(judge: Judge, redis: Redis) -> None:
    """Its outcome has the reason of the rejection, behind that of the operator."""
    assert discard(rejections(), redis, "history", "test data") == 1
    judged = judge()
    assert (judged.breaches, judged.rejected) == ([], 1)
    with get_db() as db:
        db.execute(text("UPDATE event_outcomes SET reason = 'test data' WHERE outcome = 'discarded'"))
    assert [one for one in judge().breaches if "but the database has" in one]


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ("DELETE FROM portfolio_history WHERE sequence = 3", "bot: has neither its own row nor an outcome"),
        ("DELETE FROM portfolio_history WHERE sequence = 3", "stored as row 2, which is None"),
        ("DELETE FROM portfolio_history WHERE sequence = 3", "the audit is incomplete"),
        ("DELETE FROM portfolio_history WHERE sequence = 1", "counts as a duplicate, but the other row"),
        ("UPDATE portfolio_history SET trade_count = 9 WHERE sequence = 3", "a row of no accepted event"),
        (
            """UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{1,amount}', '120.5')""",
            "has neither its own row nor an outcome",
        ),
        ("UPDATE portfolio_history SET source = 'bot/1' WHERE sequence = 3", "a row of no accepted event"),
        ("DELETE FROM event_outcomes WHERE outcome = 'duplicate'", "has neither its own row nor an outcome"),
        ("DELETE FROM event_outcomes WHERE outcome = 'rejected'", "has neither its own row nor an outcome"),
        ("DELETE FROM event_outcomes WHERE outcome = 'rejected'", "reported rejected"),
        ('UPDATE event_outcomes SET event = replace(event, \'"balance":"1"\', \'"balance":"2"\')', "has other content"),
        ("UPDATE event_outcomes SET job_id = 'x' WHERE outcome = 'rejected'", "has neither its own row nor"),
        (
            "INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)"
            " SELECT replace(job_id, '-5-', '-6-'), source, 6, event_id, outcome, reason, event FROM event_outcomes"
            " WHERE outcome = 'rejected'",
            "an outcome of no accepted event",
        ),
    ],
)
def test_the_verdict_finds_a_breach_in_the_database(judge: Judge, change: str, breach: str) -> None:
    with get_db() as db:
        assert db.execute(text(change)).rowcount
    assert [one for one in judge().breaches if breach in one]


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        ("DELETE FROM outcomes WHERE position = 2", "never settled, state sent"),
        ("UPDATE outcomes SET row_id = NULL WHERE position = 2", "is rejected"),
        ("UPDATE outcomes SET row_id = 1 WHERE position = 3", "reported stored as row 1"),
        ("UPDATE outcomes SET row_id = 1 WHERE position = 5", "reported stored as row 1"),
    ],
)
def test_the_verdict_finds_an_outbox_state_that_contradicts_the_database(
    judge: Judge, tmp_path: Path, change: str, breach: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db, db:
        assert db.execute(change).rowcount == 1
    assert [one for one in judge().breaches if breach in one]
