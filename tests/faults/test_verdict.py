"""The judge of the fault tests finds each kind of breach, and none in a run without faults."""

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
    """Judges a run that has recorded `_EVENTS` and settled all."""
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


@pytest.mark.parametrize(
    ("harm", "breach"),
    [
        ("DELETE FROM portfolio_history WHERE sequence = 3", "bot: has neither a row of its own nor an outcome"),
        ("DELETE FROM portfolio_history WHERE sequence = 3", "stored as row 2, which is None"),
        ("DELETE FROM portfolio_history WHERE sequence = 3", "the audit does not agree"),
        ("DELETE FROM portfolio_history WHERE sequence = 1", "a duplicate of a row that is not there"),
        ("UPDATE portfolio_history SET trade_count = 9 WHERE sequence = 3", "a row that nobody has accepted"),
        (
            """UPDATE signal_archives SET signals_data = jsonb_set(signals_data, '{1,amount}', '120.5')""",
            "has neither a row of its own nor an outcome",
        ),
        ("UPDATE portfolio_history SET source = 'bot/1' WHERE sequence = 3", "a row that nobody has accepted"),
        ("DELETE FROM event_outcomes WHERE outcome = 'duplicate'", "has neither a row of its own nor an outcome"),
        ("DELETE FROM event_outcomes WHERE outcome = 'rejected'", "has neither a row of its own nor an outcome"),
        ("DELETE FROM event_outcomes WHERE outcome = 'rejected'", "told rejected"),
        ('UPDATE event_outcomes SET event = replace(event, \'"balance":"1"\', \'"balance":"2"\')', "another content"),
        ("UPDATE event_outcomes SET job_id = 'x' WHERE outcome = 'rejected'", "has neither a row of its own nor"),
        (
            "INSERT INTO event_outcomes (job_id, source, sequence, event_id, outcome, reason, event)"
            " SELECT replace(job_id, '-5-', '-6-'), source, 6, event_id, outcome, reason, event FROM event_outcomes"
            " WHERE outcome = 'rejected'",
            "an outcome that nobody",
        ),
    ],
)
def test_a_breach_in_the_database_is_found(judge: Judge, harm: str, breach: str) -> None:
    with get_db() as db:
        assert db.execute(text(harm)).rowcount
    assert [one for one in judge().breaches if breach in one]


@pytest.mark.parametrize(
    ("harm", "breach"),
    [
        ("UPDATE entries SET state = 'sent' WHERE sequence = 2", "never settled, is sent"),
        ("UPDATE entries SET state = 'rejected' WHERE sequence = 2", "is rejected"),
        ("UPDATE entries SET row_id = 1 WHERE sequence = 3", "told stored as row 1"),
        ("UPDATE entries SET state = 'stored', row_id = 1 WHERE sequence = 5", "told stored as row 1"),
    ],
)
def test_a_state_that_the_database_does_not_bear_out_is_found(
    judge: Judge, tmp_path: Path, harm: str, breach: str
) -> None:
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db, db:
        assert db.execute(harm).rowcount == 1
    assert [one for one in judge().breaches if breach in one]
