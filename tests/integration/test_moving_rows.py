"""The recipe of consumers/db/README.md for moving old rows away, and the audit of what is left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
from tests.factories import a_snapshot, an_archive
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

_README = Path(__file__).parents[2].joinpath("consumers/db/README.md").read_text("utf-8")
_TIME = datetime(2026, 4, 1, tzinfo=UTC)
_LATER = datetime(2026, 7, 1, tzinfo=UTC)
_BEFORE, _AFTER = _TIME - timedelta(days=9), _TIME + timedelta(days=9)


def _recipe(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```sql\n(.*?)```", _README, re.DOTALL)
    assert found is not None
    return found[1]


def _run(sql: str) -> None:
    """As psql does: what follows an error in a transaction is not run."""
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT", no_parameters=True) as db:
        try:
            db.exec_driver_sql(sql)
        finally:
            db.exec_driver_sql("ROLLBACK")


def _moved(before: datetime = _TIME) -> str:
    return _recipe("move").replace(f"{_TIME:%Y-%m-%dT%H:%M:%SZ}", before.isoformat())


def _event(sequence: int, source: str = "bot/1") -> Event:
    """Odd numbers are snapshots, even ones archives, so that each source is in both tables."""
    after = timedelta(hours=sequence)
    return event_of((a_snapshot if sequence % 2 else an_archive)(after=after), source=source, sequence=sequence)


def _store(events: Sequence[Event], created_at: datetime | None = None) -> list[bool]:
    """Insert them at that time; whether each has made a row."""
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
    """Ten events from before the time, ten from after it, of one source."""
    events = [_event(number) for number in range(1, 21)]
    _store(events[:10], _BEFORE)
    _store(events[10:], _AFTER)
    return events


def test_old_rows_move_and_the_last_of_each_table_stays(history: list[Event]) -> None:
    """Each row is in one of the tables, with all its values."""
    with get_db() as db:
        before = db.execute(text("SELECT * FROM portfolio_history WHERE sequence = 3")).one()
    _run(_moved())

    assert [_numbers(table) for table in MOVED] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    assert [_numbers(table)[0] for table in HOT] == [9, 10]
    assert _ids(*HOT, *MOVED) == sorted(str(event.id) for event in history)
    with get_db() as db:
        assert db.execute(text("SELECT * FROM portfolio_history_moved WHERE sequence = 3")).one() == before


def test_it_can_run_again_and_takes_along_what_stayed(history: list[Event]) -> None:
    """The same time moves nothing more, a later one moves the rows that were the last."""
    _run(_moved())
    _run(_moved())
    assert [_numbers(table) for table in MOVED] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    _run(_moved(_LATER))
    assert [_numbers(table) for table in HOT] == [[19], [20]]


def test_rows_without_a_number_move_too() -> None:
    """Direct inserts have none, and no audit needs the last of them."""
    _store([event_of(a_snapshot(), source="direct", sequence=None)], _BEFORE)
    _run(_moved())
    assert [_ids(HOT[0]), len(_ids(MOVED[0]))] == [[], 1]


def test_new_events_are_stored_beside_the_move_and_one_that_moves_waits(history: list[Event]) -> None:
    """Afterwards the moved fact is unknown, and is inserted again, as the document says."""
    statements, commit = _moved().rsplit("COMMIT", 1)
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


def test_a_fact_that_was_inserted_again_stops_the_next_move_and_is_named(history: list[Event]) -> None:
    """Nothing is moved then, and neither row is lost."""
    _run(_moved())
    _store([history[0]], _TIME + timedelta(days=1))
    before = [_ids(table) for table in (*HOT, *MOVED)]
    with pytest.raises(IntegrityError, match="event_id"):
        _run(_moved(_LATER))

    assert [_ids(table) for table in (*HOT, *MOVED)] == before
    with get_db() as db:
        (twice,) = db.execute(text(_recipe("twice")))
        assert str(twice.event_id) == str(history[0].id)
        db.execute(text("DELETE FROM portfolio_history WHERE id = :id"), {"id": twice.new_row})
    _run(_moved(_LATER))
    assert _ids(*HOT, *MOVED) == sorted(str(event.id) for event in history)


def test_the_way_back_is_complete(history: list[Event]) -> None:
    """With the same row numbers; then the audit proves all of it again."""
    with get_db() as db:
        rows = [db.execute(text(f"SELECT * FROM {table} ORDER BY id")).all() for table in HOT]
    _run(_moved())
    _run(_recipe("back"))

    with get_db() as db:
        assert [db.execute(text(f"SELECT * FROM {table} ORDER BY id")).all() for table in HOT] == rows
    assert [_ids(table) for table in MOVED] == [[], []]
    assert _audit().complete


def test_the_audit_since_the_time_proves_what_is_left_and_without_it_lists_what_was_moved(
    history: list[Event],
) -> None:
    _run(_moved())
    assert _audit().missing == [(1, 8)]
    one = _audit(_TIME)
    assert (one.proven_from, one.stored, one.last, one.missing, one.complete) == (11, 10, 20, [], True)


def test_a_gap_is_found_after_the_time_and_not_before_it(history: list[Event]) -> None:
    _delete("signal_archives", 4)
    _delete("portfolio_history", 15)
    _delete("portfolio_history", 11)  # the first that is proven
    assert _audit().missing == [(4, 4), (11, 11), (15, 15)]
    assert _audit(_TIME).missing == [(11, 11), (15, 15)]
    assert audit(since=_AFTER + timedelta(days=1)) == []


def test_an_old_number_that_is_stored_late_opens_no_gap(history: list[Event]) -> None:
    """As after a requeue: its row is new, the rows of the numbers behind it have been moved."""
    _delete("portfolio_history", 3)
    _store([history[2]], _AFTER)
    _run(_moved())
    assert (_audit(_TIME).missing, _audit(_TIME).proven_from) == ([], 11)


def test_an_outcome_from_before_the_time_is_not_in_the_proof(history: list[Event]) -> None:
    """As a row is: it may be the highest number of that time."""
    _delete("portfolio_history", 11)
    with get_db() as db:
        record_outcomes(db, [OutcomeRow("job", "duplicate", "bot/1", 12, history[11].id)])
        db.execute(text("UPDATE event_outcomes SET created_at = :at"), {"at": _BEFORE})
    one = _audit(_TIME)
    assert (one.proven_from, one.missing, one.duplicate) == (13, [], 0)


def test_a_source_that_began_after_the_time_is_proven_from_its_first_number(history: list[Event]) -> None:
    """One that has recorded nothing since then is not listed."""
    _store([_event(number, "old/1") for number in range(101, 105)], _BEFORE)
    _store([_event(number, "new/1") for number in (202, 203)], _AFTER)
    assert [(one.source, one.proven_from, one.missing) for one in audit(since=_TIME)] == [
        ("bot/1", 11, []),
        ("new/1", 1, [(1, 201)]),
    ]


def test_with_the_outbox_the_tail_is_proven_also_when_nothing_was_stored_since(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None]
) -> None:
    """The rows of the first three are old; the next three are in the outbox only."""
    producer.record_many([a_snapshot(after=timedelta(number)) for number in range(3)])
    assert producer.flush(5) == 0
    work()
    with get_db() as db:
        db.execute(text("UPDATE portfolio_history SET created_at = :at"), {"at": _BEFORE})
    _run(_moved())
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


def test_another_event_under_an_old_number_is_not_in_the_proof(
    producer: HistoryProducer, redis: Redis, work: Callable[[], None]
) -> None:
    """As after the move of a row whose number a copy of the outbox has used too."""
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


def test_the_command_says_from_where_on_it_proves(history: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    """As text and as JSON; a time without an offset is local."""
    _run(_moved())
    since = "2026-04-01T00:00:00Z"
    assert f"audit --since {since}" in _README
    text_, as_json = (CliRunner().invoke(app, ["audit", "--since", since, *more]) for more in ((), ("--json",)))
    assert (text_.exit_code, as_json.exit_code) == (0, 0)
    expected = (
        "Checked: events recorded since 2026-04-01 00:00:00Z, in each source from the number in column `from` on."
    )
    assert expected in text_.stdout
    header, row = (line.split() for line in text_.stdout.splitlines()[:2])
    assert (row[header.index("from")], row[0]) == ("11", "bot/1")
    (one,) = json.loads(as_json.stdout)
    assert (datetime.fromisoformat(one["since"]), one["proven_from"]) == (_TIME, 11)

    monkeypatch.setenv("HISTORY_TIMEZONE", "Europe/Berlin")
    local = CliRunner().invoke(app, ["audit", "--since", "2026-04-01T02:00:00", "--json"])
    assert datetime.fromisoformat(json.loads(local.stdout)[0]["since"]) == _TIME
    assert CliRunner().invoke(app, ["audit"]).exit_code == 1
