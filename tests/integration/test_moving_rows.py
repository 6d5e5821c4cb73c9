"""The SQL of consumers/db/GROWTH.md that moves old rows away, and the audit of the rows that stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from redis import Redis
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from consumers.cli import app
from consumers.db.engine import engine, get_db
from consumers.db.inserts import Stored, insert_events
from consumers.db.outcomes import OutcomeRow, record_outcomes
from consumers.ops.audit import SourceAudit, audit
from producers.events import Event, event_of
from producers.history_producer import HistoryProducer
from producers.outbox import Outbox
from tests.documents import block
from tests.factories import a_snapshot, an_archive
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

_TIME = datetime(2026, 4, 1, tzinfo=UTC)
_LATER = datetime(2026, 7, 1, tzinfo=UTC)
_BEFORE, _AFTER = _TIME - timedelta(days=9), _TIME + timedelta(days=9)


def _run(sql: str) -> None:
    """Run SQL like psql: after an error in a transaction, its other statements are not run."""
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT", no_parameters=True) as db:
        try:
            db.exec_driver_sql(sql)
        finally:
            db.exec_driver_sql("ROLLBACK")


def _move_sql(before: datetime = _TIME) -> str:
    """Return the SQL of the document with another time."""
    return block("consumers/db/GROWTH.md", "move").replace(f"{_TIME:%Y-%m-%dT%H:%M:%SZ}", before.isoformat())


def _event(sequence: int, source: str = "bot/1") -> Event:
    """Return a snapshot for an odd number and an archive for an even one, so that each source is in both tables."""
    after = timedelta(hours=sequence)
    return event_of((a_snapshot if sequence % 2 else an_archive)(after=after), source=source, sequence=sequence)


def _store(events: Sequence[Event], created_at: datetime | None = None) -> list[bool]:
    """Insert events as if at `created_at`; return for each whether it made a row."""
    with get_db() as db:
        answers = insert_events(db, events)
        for table in ("portfolio_history", "signal_archives"):
            db.execute(
                text(f"UPDATE {table} SET created_at = :at WHERE event_id = ANY (CAST(:ids AS uuid[]))"),
                {"at": created_at or datetime.now(UTC), "ids": [str(event.id) for event in events]},
            )
    return [answer.created for answer in answers if isinstance(answer, Stored)]


def _ids(*tables: str) -> list[str]:
    rows = " UNION ALL ".join(f"SELECT event_id FROM {table}" for table in tables)
    with get_db() as db:
        return list(db.execute(text(f"SELECT CAST(event_id AS text) FROM ({rows}) AS rows ORDER BY 1")).scalars())


def _numbers(table: str) -> list[int]:
    with get_db() as db:
        return list(db.execute(text(f"SELECT sequence FROM {table} ORDER BY 1")).scalars())


def _delete(table: str, sequence: int) -> None:
    with get_db() as db:
        db.execute(text(f"DELETE FROM {table} WHERE sequence = {sequence}"))


def _audit(since: datetime | None = None) -> SourceAudit:
    (one,) = audit(since=since)
    return one


HOT = ("portfolio_history", "signal_archives")
MOVED = ("portfolio_history_moved", "signal_archives_moved")


@pytest.fixture
def history() -> list[Event]:
    """Store ten events of one source before the time and ten after it."""
    events = [_event(number) for number in range(1, 21)]
    _store(events[:10], _BEFORE)
    _store(events[10:], _AFTER)
    return events


def test_move_takes_old_rows_and_leaves_the_last_of_each_table(history: list[Event]) -> None:
    """Each row is in one of the tables, with all its values."""
    with get_db() as db:
        before = db.execute(text("SELECT * FROM portfolio_history WHERE sequence = 3")).one()
    _run(_move_sql())

    assert [_numbers(table) for table in MOVED] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    assert [_numbers(table)[0] for table in HOT] == [9, 10]
    assert _ids(*HOT, *MOVED) == sorted(str(event.id) for event in history)
    with get_db() as db:
        assert db.execute(text("SELECT * FROM portfolio_history_moved WHERE sequence = 3")).one() == before


def test_move_runs_again_and_takes_the_rows_that_stayed(history: list[Event]) -> None:
    """The same time moves nothing more. A later time also moves the rows that were the last ones."""
    _run(_move_sql())
    _run(_move_sql())
    assert [_numbers(table) for table in MOVED] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    _run(_move_sql(_LATER))
    assert [_numbers(table) for table in HOT] == [[19], [20]]


def test_move_takes_rows_without_a_sequence() -> None:
    """Direct inserts have no sequence, and no audit needs the last one."""
    _store([event_of(a_snapshot(), source="direct", sequence=None)], _BEFORE)
    _run(_move_sql())
    assert [_ids(HOT[0]), len(_ids(MOVED[0]))] == [[], 1]


def test_inserts_continue_during_a_move_except_of_a_fact_that_moves(history: list[Event]) -> None:
    """The insert of a fact that is being moved waits for the commit, and then inserts the fact again."""
    statements, commit = _move_sql().rsplit("COMMIT", 1)
    with ThreadPoolExecutor(1) as pool, engine().connect() as db:
        db.execution_options(isolation_level="AUTOCOMMIT", no_parameters=True)
        db.exec_driver_sql(statements)
        assert _store([_event(21), _event(22)], _AFTER) == [True, True]
        assert _store(history[18:], _AFTER) == [False, False]
        again = pool.submit(_store, history[:1])
        until(somebody_waits_for_a_lock)
        db.exec_driver_sql(f"COMMIT{commit}")
        assert again.result(20) == [True]
    assert _ids(*HOT, *MOVED) == sorted(str(event.id) for event in [*history, _event(21), _event(22), history[0]])


def test_next_move_fails_on_a_fact_that_was_inserted_again(history: list[Event]) -> None:
    """It moves nothing and loses no row; the second query of the document finds the two rows."""
    _run(_move_sql())
    _store([history[0]], _TIME + timedelta(days=1))
    before = [_ids(table) for table in (*HOT, *MOVED)]
    with pytest.raises(IntegrityError, match="event_id"):
        _run(_move_sql(_LATER))

    assert [_ids(table) for table in (*HOT, *MOVED)] == before
    with get_db() as db:
        (twice,) = db.execute(text(block("consumers/db/GROWTH.md", "twice")))
        assert str(twice.event_id) == str(history[0].id)
        db.execute(text("DELETE FROM portfolio_history WHERE id = :id"), {"id": twice.new_row})
    _run(_move_sql(_LATER))
    assert _ids(*HOT, *MOVED) == sorted(str(event.id) for event in history)


def test_moving_rows_back_restores_all_of_them(history: list[Event]) -> None:
    """The rows keep their ids, and the audit proves all of them again."""
    with get_db() as db:
        rows = [db.execute(text(f"SELECT * FROM {table} ORDER BY id")).all() for table in HOT]
    _run(_move_sql())
    _run(block("consumers/db/GROWTH.md", "back"))

    with get_db() as db:
        assert [db.execute(text(f"SELECT * FROM {table} ORDER BY id")).all() for table in HOT] == rows
    assert [_ids(table) for table in MOVED] == [[], []]
    assert _audit().complete


def test_audit_since_the_move_is_complete_and_without_it_reports_moved_rows(history: list[Event]) -> None:
    _run(_move_sql())
    assert _audit().missing == [(1, 8)]
    one = _audit(_TIME)
    assert (one.proven_from, one.stored, one.last, one.missing, one.complete) == (11, 10, 20, [], True)


def test_audit_finds_gaps_after_the_time_only(history: list[Event]) -> None:
    _delete("signal_archives", 4)
    _delete("portfolio_history", 15)
    _delete("portfolio_history", 11)  # the first number that the audit covers
    assert _audit().missing == [(4, 4), (11, 11), (15, 15)]
    assert _audit(_TIME).missing == [(11, 11), (15, 15)]
    assert audit(since=_AFTER + timedelta(days=1)) == []


def test_late_row_with_an_old_number_makes_no_gap(history: list[Event]) -> None:
    """After a requeue a row can be new although the rows with higher numbers have been moved."""
    _delete("portfolio_history", 3)
    _store([history[2]], _AFTER)
    _run(_move_sql())
    assert (_audit(_TIME).missing, _audit(_TIME).proven_from) == ([], 11)


def test_audit_leaves_out_an_outcome_from_before_the_time(history: list[Event]) -> None:
    """An outcome counts like a row: it may have the highest number from before the time."""
    _delete("portfolio_history", 11)
    with get_db() as db:
        record_outcomes(db, [OutcomeRow("job", "duplicate", "bot/1", 12, history[11].id)])
        db.execute(text("UPDATE event_outcomes SET created_at = :at"), {"at": _BEFORE})
    one = _audit(_TIME)
    assert (one.proven_from, one.missing, one.duplicate) == (13, [], 0)


def test_audit_covers_a_new_source_from_its_first_number(history: list[Event]) -> None:
    """A source without events since the time is not listed."""
    _store([_event(number, "old/1") for number in range(101, 105)], _BEFORE)
    _store([_event(number, "new/1") for number in (202, 203)], _AFTER)
    assert [(one.source, one.proven_from, one.missing) for one in audit(since=_TIME)] == [
        ("bot/1", 11, []),
        ("new/1", 1, [(1, 201)]),
    ]


def test_audit_with_an_outbox_covers_its_newest_events_even_if_none_is_stored(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None]
) -> None:
    """The first three rows are old; the next three events are only in the outbox."""
    producer.record_many([a_snapshot(after=timedelta(number)) for number in range(3)])
    assert producer.flush(5) == 0
    work()
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET created_at = :at"), {"at": _BEFORE})
    _run(_move_sql())
    producer.record_many([a_snapshot(after=timedelta(number)) for number in range(3, 6)])
    assert producer.flush(5) == 0
    with Outbox(producer._transport.outbox.path) as outbox:
        (waiting,) = audit(redis, outbox, since=_TIME)
        assert (waiting.proven_from, waiting.under_way, waiting.missing, waiting.tail_known) == (4, 3, [], True)
        work()
        _delete("portfolio_history", 6)
        until(lambda: producer.status().depth == 0)
        (lost,) = audit(redis, outbox, since=_TIME)
    assert (lost.last, lost.missing) == (6, [(6, 6)])


def test_audit_leaves_out_another_event_with_an_old_number(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None]
) -> None:
    """A copy of an outbox may have used the number of a moved row for another event."""
    producer.record_many([a_snapshot(after=timedelta(number)) for number in range(4)])
    assert producer.flush(5) == 0
    work()
    until(lambda: producer.status().depth == 0)
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET event_id = gen_random_uuid() WHERE sequence IN (2, 4)"))
        db.execute(text("UPDATE portfolio_history SET created_at = :at WHERE sequence <= 3"), {"at": _BEFORE})
    with Outbox(producer._transport.outbox.path) as outbox:
        assert [one.mismatched for one in audit(redis, outbox)] == [[2, 4]]
        assert [one.mismatched for one in audit(redis, outbox, since=_TIME)] == [[4]]


def test_audit_command_prints_the_first_number_that_it_covers(
    history: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so as text and as JSON. A time without an offset is local."""
    _run(_move_sql())
    program, *command = block("consumers/db/GROWTH.md", "audit").split()
    assert program == "trading-history"
    as_text, as_json = (CliRunner().invoke(app, [*command, *more]) for more in ((), ("--json",)))
    assert (as_text.exit_code, as_json.exit_code) == (0, 0)
    expected = (
        "Checked: events recorded since 2026-04-01 00:00:00Z, in each source from the number in column `from` on."
    )
    assert expected in as_text.stdout
    header, row = (line.split() for line in as_text.stdout.splitlines()[:2])
    assert (row[header.index("from")], row[0]) == ("11", "bot/1")
    (one,) = json.loads(as_json.stdout)
    assert (datetime.fromisoformat(one["since"]), one["proven_from"]) == (_TIME, 11)

    monkeypatch.setenv("HISTORY_TIMEZONE", "Europe/Berlin")
    local = CliRunner().invoke(app, ["audit", "--since", "2026-04-01T02:00:00", "--json"])
    assert datetime.fromisoformat(json.loads(local.stdout)[0]["since"]) == _TIME
    assert CliRunner().invoke(app, ["audit"]).exit_code == 1
