"""Old months in tables of their own: nobody who reads or writes can tell, whatever happens while they move."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner, Result

from consumers.cli import app
from consumers.db import queries, retention
from consumers.db.engine import engine, get_db, translated_errors
from consumers.db.inserts import Stored, insert_events
from consumers.db.page_queries import portfolios
from consumers.db.queries import Listing, Narrowing
from consumers.db.retired_tables import HISTORY_TABLES, MOVE_LOCK, prepare
from consumers.db.schema import apply_schema
from consumers.errors import EventConflict, RetirementRefused, StoreUnavailable
from consumers.operations import (
    get_market_signals,
    get_portfolio_history,
    get_recent_signal_archives,
    stream_portfolio_history,
)
from consumers.ops.audit import audit
from producers.events import Event, event_of
from tests.factories import a_signal, a_snapshot, an_archive
from tests.rq_programs import somebody_waits_for_a_lock, until

pytestmark = pytest.mark.usefixtures("database_url")

_START = datetime(2026, 1, 10, 23, 30, tzinfo=UTC)
_CUT = date(2026, 4, 1)
_MANY = """
    INSERT INTO portfolio_history (event_id, source, sequence, portfolio_id, snapshot_date, "timestamp", balance,
        total_invested, total_profit_loss, total_value, open_positions, trade_count)
    SELECT gen_random_uuid(), 'many/x', n, n % 3, CAST(at AT TIME ZONE 'UTC' AS date), at, n, 0, 0, n, 0, 0
    FROM generate_series(1, {rows}) AS n,
        LATERAL (SELECT timestamptz '2026-01-01Z' + n * interval '10 minutes' AS at) AS moment
"""


def _run(*arguments: str, status: int = 0) -> Result:
    """The command, in this process."""
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == status, run.output
    return run


def _events() -> list[Event]:
    """Half a year in steps of 9 days: snapshots of two portfolios and of none, and archives, of one source."""
    payloads: list[Any] = []
    for step in range(20):
        at = _START + timedelta(days=9 * step)
        number = (1, 2, None)[step % 3]
        payloads.append(a_snapshot(timestamp=at, snapshot_date=at.date(), portfolio_id=number, balance=step))
        signals = [a_signal(market_id=str(step % 2)), a_signal(amount=step)]
        payloads.append(an_archive(archived_at=at, portfolio_id=number, signals=signals))
    return [event_of(payload, source="bot/1", sequence=n) for n, payload in enumerate(payloads, start=1)]


def _store(events: list[Event]) -> list[Stored | EventConflict]:
    with get_db() as db:
        return insert_events(db, events)


def _scalar(statement: str) -> Any:
    with get_db() as db:
        return db.execute(text(statement)).scalar_one()


def _execute(statement: str) -> None:
    with get_db() as db:
        db.execute(text(statement))


def _rows_of(table: str) -> int:
    return int(_scalar(f"SELECT count(*) FROM ONLY {table}"))


def _pages(read: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Everything in pages of three."""
    rows: list[dict[str, Any]] = []
    while page := read(limit=3, after=rows[-1] if rows else None):
        rows += page
    return rows


def _seen() -> list[Any]:
    """What every kind of reader sees of both tables."""
    around: Any = {"since": datetime(2026, 2, 20, tzinfo=UTC), "until": datetime(2026, 5, 5, tzinfo=UTC)}
    with get_db() as db:
        page = portfolios(db)
    with stream_portfolio_history() as exact:
        streamed = list(exact.rows)
    return [
        get_portfolio_history(),
        _pages(get_portfolio_history),
        _pages(partial(get_portfolio_history, portfolio_id=1)),
        _pages(partial(get_portfolio_history, daily="last", **around)),
        _pages(get_recent_signal_archives),
        _pages(partial(get_recent_signal_archives, portfolio_id=2, **around)),
        _pages(partial(get_market_signals, "1")),
        streamed,
        audit(),
        page,
    ]


def _files(directory: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted(directory.iterdir())}


def test_readers_cannot_tell_and_the_way_back_is_complete(tmp_path: Path) -> None:
    """Listings, pages across the boundary, streams, audit, export and verify: before, retired, and brought back."""
    _store(_events())
    of_one = ("--timezone", "UTC", "--portfolio-id", "1")
    before = _seen()
    _run("export", "before", *of_one)

    retired = retention.retire(_CUT)

    months = ("2026-01", "2026-02", "2026-03")
    assert retired == [(table.name, month, 3) for table in HISTORY_TABLES for month in months]
    assert [_rows_of(table.name) for table in HISTORY_TABLES] == [11, 11]
    assert _seen() == before
    _run("export", "after", *of_one)
    assert _files(tmp_path / "after") == _files(tmp_path / "before")
    _run("verify", "before", *of_one)

    assert retention.bring_back() == retired
    assert [_rows_of(table.retired) for table in HISTORY_TABLES] == [0, 0]
    assert _seen() == before


def test_a_retired_fact_is_a_duplicate_and_other_content_is_a_conflict() -> None:
    """With the row that it has had from the start; what is new goes in, also for an old month, and can be retired."""
    events = _events()
    first = _store(events)
    retention.retire(_CUT)

    assert _store(events[::-1])[::-1] == [answer._replace(created=False) for answer in first]  # type: ignore[union-attr]
    snapshot, archive = events[0].data, events[1].data
    changed = [
        event_of(snapshot.model_copy(update={"balance": 7, "snapshot_date": date(2027, 1, 1)}), source="x", sequence=1),
        event_of(archive.model_copy(update={"signals": [a_signal()]}), source="x", sequence=2),
    ]
    refused = _store(changed)
    assert [answer.row_id for answer in refused if isinstance(answer, EventConflict)] == [
        answer.row_id for answer in first[:2]
    ]
    late = a_snapshot(timestamp=_START + timedelta(hours=1), snapshot_date=date(2026, 1, 11))
    (stored,) = _store([event_of(late, source="bot/2", sequence=1)])
    assert isinstance(stored, Stored)
    assert stored.created
    assert _scalar("SELECT count(*) FROM portfolio_history") == 21
    assert retention.retire(_CUT) == [("portfolio_history", "2026-01", 1)]


def test_a_date_that_is_not_of_the_instant_keeps_a_row_where_a_copy_would_be_found() -> None:
    """The trigger looks by the instant; a row that says an old date and a new instant stays."""
    at = datetime(2026, 8, 1, tzinfo=UTC)
    odd = event_of(a_snapshot(timestamp=at, snapshot_date=date(2020, 1, 1)), source="x", sequence=1)
    _store([odd])

    assert retention.retire(_CUT) == []
    assert [answer.created for answer in _store([odd]) if isinstance(answer, Stored)] == [False]


def test_an_earlier_month_later_does_not_open_what_is_retired() -> None:
    """How far the trigger looks only ever grows."""
    events = _events()
    _store(events)
    retention.retire(_CUT)
    retention.retire(date(2026, 1, 1))

    assert {answer.created for answer in _store(events) if isinstance(answer, Stored)} == {False}
    assert _scalar("SELECT count(*) FROM portfolio_history") == 20


@contextmanager
def _moving() -> Iterator[None]:
    """A move of snapshots that has done its work, and not committed it; committed at the end."""
    with get_db() as db:
        (way, _) = retention._ways(db, _CUT)
        values = way.values | {"rows": 100}
        values |= {f"after_{key}": retention._LEAST[type_] for key, type_ in way.table.keys}
        months, _ = retention._move_some(db, retention._move(way), values)
        assert sum(month.rows for month in months) == 9
        yield


def _prepared() -> None:
    """Tables and triggers as at the begin of a run, nothing moved."""
    with get_db() as db:
        for table in HISTORY_TABLES:
            prepare(db, table, _CUT)


def test_beside_a_move_new_facts_go_in_at_once_and_old_ones_are_found_after_it() -> None:
    """Sent again in the middle of a move, old facts wait for its end: else each would be there twice."""
    events = _events()
    first = _store(events)
    _prepared()
    with ThreadPoolExecutor(1) as pool:
        with _moving():
            new = event_of(a_snapshot(timestamp=datetime(2026, 11, 1, tzinfo=UTC)), source="bot/1", sequence=99)
            assert [answer.created for answer in _store([new]) if isinstance(answer, Stored)] == [True]
            again = pool.submit(_store, events)
            until(somebody_waits_for_a_lock)
        assert again.result(20) == [answer._replace(created=False) for answer in first]  # type: ignore[union-attr]
    assert _scalar("SELECT count(*) - count(DISTINCT event_id) FROM portfolio_history") == 0


def _retiring(pool: ThreadPoolExecutor) -> Future[list[retention.MovedRows]]:
    return pool.submit(retention.retire, _CUT)


def test_a_move_waits_for_the_inserts_before_it_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old facts that are not committed yet: the lock is tried again, for a minute; here, until they are."""
    monkeypatch.setattr(retention, "_LOCK_MILLISECONDS", 100)
    monkeypatch.setattr(retention, "_PAUSE_SECONDS", 0.01)
    events = _events()
    with ThreadPoolExecutor(1) as pool:
        with get_db() as db:
            insert_events(db, events)
            retiring = _retiring(pool)
            until(somebody_waits_for_a_lock)
        assert sum(row.rows for row in retiring.result(20)) == 18


def test_who_holds_a_table_for_long_is_named_and_nothing_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it can be run again."""
    monkeypatch.setattr(retention, "_LOCK_MILLISECONDS", 50)
    monkeypatch.setattr(retention, "_PATIENCE_SECONDS", 0)
    _store(_events())
    with engine().begin() as db:
        pid = db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        db.exec_driver_sql("LOCK TABLE portfolio_history IN ROW EXCLUSIVE MODE")
        with pytest.raises(
            RetirementRefused, match=rf"portfolio_history was in use .* held by pid {pid}\. Run it again"
        ):
            retention.retire(_CUT)
    _prepared()
    with engine().begin() as db:
        pid = db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        db.exec_driver_sql(f"SELECT pg_advisory_xact_lock_shared({MOVE_LOCK})")
        with pytest.raises(RetirementRefused, match=rf"held by pid {pid}\. "):
            retention.retire(_CUT)
    assert sum(row.rows for row in retention.retire(_CUT)) == 18


def test_a_run_that_is_killed_goes_on_where_it_was() -> None:
    """kill -9 between transactions and inside one: each row is in one of the two tables, and the next run ends it."""
    _execute(_MANY.format(rows=4000))
    ids = _scalar("SELECT array_agg(event_id ORDER BY event_id) FROM portfolio_history")
    with get_db() as db:
        db.execute(text("SELECT FROM portfolio_history WHERE id = 1200 FOR UPDATE"))
        run = subprocess.Popen([sys.executable, "-m", "consumers.cli", "retire", "--before", "2026-02"])
        try:
            until(somebody_waits_for_a_lock)
        finally:
            run.kill()
            run.wait()
    done = _rows_of("portfolio_history_retired")
    assert 500 <= done < 1200
    assert _scalar("SELECT array_agg(event_id ORDER BY event_id) FROM portfolio_history") == ids

    again = _run("retire", "--before", "2026-02", "--json")
    assert json.loads(again.stdout) == [{"table": "portfolio_history", "month": "2026-01", "rows": 4000 - done}]
    assert _scalar("SELECT array_agg(event_id ORDER BY event_id) FROM portfolio_history") == ids
    assert _rows_of("portfolio_history") == 0


def test_what_ended_the_vacuum_is_told() -> None:
    """Here an administrator, as a server that is shut down does."""
    _store(_events())
    with engine().connect() as db, engine().connect() as holder, ThreadPoolExecutor(1) as pool:
        db.execution_options(isolation_level="AUTOCOMMIT")
        pid = db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        holder.exec_driver_sql("LOCK TABLE portfolio_history IN SHARE UPDATE EXCLUSIVE MODE")

        def vacuum() -> None:
            with translated_errors():
                retention._interruptibly(db, "VACUUM portfolio_history")

        vacuuming = pool.submit(vacuum)
        until(somebody_waits_for_a_lock)
        _execute(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(StoreUnavailable, match="terminating connection|closed the connection"):
            vacuuming.result(20)


def test_limits_of_the_database_do_not_end_a_run() -> None:
    """Counting and VACUUM of a large table take long; other sessions keep their limit."""
    _store(_events())
    _execute(f"ALTER DATABASE {_scalar('SELECT current_database()')} SET statement_timeout = 1234")
    engine().dispose()
    with retention._alone() as db:
        assert db.exec_driver_sql("SHOW statement_timeout").scalar_one() == "0"
    assert _scalar("SHOW statement_timeout") == "1234ms"


def test_two_runs_at_once_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one says so."""
    monkeypatch.setattr(retention, "_RUN_LOCK_MILLISECONDS", 50)
    with retention._alone(), pytest.raises(RetirementRefused, match="another run"):
        retention.retire(_CUT)


def _plan(db: Connection, statement: Any, values: Any) -> list[dict[str, Any]]:
    """Every node of the plan, as it was run."""
    explained = text(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}")
    nodes = [db.execute(explained, values).scalar_one()[0]["Plan"]]
    for node in nodes:
        nodes += node.get("Plans", [])
    return nodes


_LISTINGS: dict[str, Callable[[Narrowing], Listing]] = {
    "snapshots": queries.snapshots,
    "closes": queries.closes,
    "archives": queries.archives,
}
_SINCE, _UNTIL = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 6, 1, tzinfo=UTC)


def test_a_page_costs_its_rows_wherever_the_boundary_is() -> None:
    """Of both tables, along their indexes: no step of any page has more than a few hundred of the 20,000 rows."""
    rows, limit = 20_000, 50  # until the middle of May
    _execute(_MANY.format(rows=rows))
    _execute("""
        INSERT INTO signal_archives (event_id, source, sequence, portfolio_id, archived_at, archive_month,
            signals_count, signals_data)
        SELECT gen_random_uuid(), 'archiver/x', n, n % 3, at, to_char(at AT TIME ZONE 'UTC', 'YYYY-MM'), 1, '[{}]'
        FROM generate_series(1, 5000) AS n,
            LATERAL (SELECT timestamptz '2026-01-01Z' + n * interval '40 minutes' AS at) AS moment
    """)
    retention.retire(_CUT)
    last = {"snapshot_date": date(2026, 4, 1), "timestamp": datetime(2026, 4, 1, tzinfo=UTC), "id": 10**9}
    places: list[dict[str, Any]] = [
        {},
        {"portfolio_id": 1},
        {"since": _SINCE, "until": _UNTIL},
        {"portfolio_id": 1, "until": datetime(2026, 3, 31, tzinfo=UTC)},
        {"after": last | {"archived_at": last["timestamp"]}},
        {"after": last | {"archived_at": last["timestamp"]}, "portfolio_id": 2},
    ]
    with get_db() as db:
        for name, listing_of in _LISTINGS.items():
            for place in places:
                listing = listing_of(Narrowing(limit=limit, **place))
                nodes = _plan(db, listing.statement(), listing.values)
                most = max(node["Actual Rows"] + node.get("Rows Removed by Filter", 0) for node in nodes)
                assert most <= 500, (name, place, most)  # a period is looked up by its dates, two days wider


def test_the_audit_reads_its_numbers_in_order_and_sorts_none() -> None:
    """An ordered pass over the indexes of both tables."""
    from consumers.ops import audit as module

    _execute(_MANY.format(rows=15_000))
    retention.retire(_CUT)
    with get_db() as db:
        db.exec_driver_sql("SET LOCAL enable_sort = off")  # these few rows would be sorted as quickly
        nodes = _plan(db, module._GAPS, {"source": "many/x", "before": 0})
    assert sum(node["Actual Rows"] for node in nodes if "Sort" in node["Node Type"]) == 0
    assert max(node["Actual Rows"] for node in nodes) == 15_000


@pytest.fixture
def writer() -> Iterator[str]:
    """A role that may read and insert, and no more."""
    _execute("CREATE ROLE retention_writer")
    _execute("GRANT SELECT, INSERT ON portfolio_history, signal_archives TO retention_writer")
    _execute("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO retention_writer")
    yield "retention_writer"
    _execute("DROP OWNED BY retention_writer")
    _execute("DROP ROLE retention_writer")


def test_a_role_that_may_insert_and_select_goes_on_as_before(writer: str) -> None:
    """It needs nothing on the new tables."""
    events = _events()
    first = _store(events)
    retention.retire(_CUT)
    new = event_of(a_snapshot(timestamp=datetime(2026, 10, 1, tzinfo=UTC)), source="bot/2", sequence=1)
    with get_db() as db:
        db.exec_driver_sql(f"SET LOCAL ROLE {writer}")
        *again, stored = insert_events(db, [*events, new])
    assert again == [answer._replace(created=False) for answer in first]  # type: ignore[union-attr]
    assert isinstance(stored, Stored)
    assert stored.created


def test_the_schema_and_the_adoption_are_content_with_retired_tables() -> None:
    """Each of them may run again at any time."""
    _store(_events())
    retention.retire(_CUT)
    apply_schema(engine())
    _run("init-db", "--adopt-legacy")
    assert _scalar("SELECT count(*) FROM portfolio_history") == 20


def test_another_isolation_level_is_refused_for_old_facts_and_never_ours() -> None:
    """Its look would be of a moment before the move; what the database has as default is not for our inserts."""
    events = _events()
    _store(events)
    retention.retire(_CUT)
    with pytest.raises(DBAPIError, match="READ COMMITTED only"), engine().connect() as db:
        insert_events(db.execution_options(isolation_level="REPEATABLE READ"), events)
    _execute(
        f"ALTER DATABASE {_scalar('SELECT current_database()')} SET default_transaction_isolation = 'serializable'"
    )
    engine().dispose()
    assert {answer.created for answer in _store(events) if isinstance(answer, Stored)} == {False}


def test_a_table_of_the_name_that_is_not_ours_is_left_alone() -> None:
    """Rows in it would be gone from every listing."""
    _store(_events())
    _execute("CREATE TABLE portfolio_history_retired (LIKE portfolio_history)")
    with pytest.raises(RetirementRefused, match="portfolio_history_retired does not inherit"):
        retention.retire(_CUT)
    assert _rows_of("portfolio_history") == 20


def test_the_command_counts_moves_and_moves_back() -> None:
    """--dry-run changes nothing; each form of the output; nothing to do is fine."""
    _store(_events())
    counted = _run("retire", "--before", "2026-03", "--dry-run", "--json")
    assert json.loads(counted.stdout)[0] == {"table": "portfolio_history", "month": "2026-01", "rows": 3}
    assert _scalar("SELECT to_regclass('portfolio_history_retired')") is None
    moved, again = _run("retire", "--before", "2026-03"), _run("retire", "--before", "2026-03")
    assert (len(moved.stdout.splitlines()), again.stdout) == (5, "No rows to move.\n")
    back = _run("retire", "--undo", "--dry-run", "--json"), _run("retire", "--undo", "--json")
    assert back[0].stdout == back[1].stdout == counted.stdout
    assert _rows_of("portfolio_history") == 20


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "name a month"),
        (("--before", "2026-01", "--undo"), "name a month"),
        (("--before", "2026-13"), "must be a month such as 2026-01"),
        (("--before", "2025-6"), "must be a month such as 2026-01"),
        (("--before", "2999-01"), "must not be a month to come"),
    ],
)
def test_wrong_usage_says_what_is_right(arguments: tuple[str, ...], reason: str) -> None:
    """Exit status 2, before any server is asked."""
    run = _run("retire", *arguments, status=2)
    assert reason in " ".join(run.stderr.replace("│", " ").split())
