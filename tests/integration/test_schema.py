"""schema.sql: applying it, its upgrades and constraints, and the translation of database errors."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text
from sqlalchemy.exc import IntegrityError

from consumers.db.engine import create_store_engine, engine, get_db
from consumers.db.inserts import insert_event
from consumers.db.schema import apply_schema, schema_sql
from consumers.db.withdrawals import withdraw
from consumers.errors import OldSchema, StoreUnavailable
from consumers.operations import get_portfolio_history
from producers.errors import InvalidEvent, SettingsError
from producers.events import event_of
from tests.documents import ROOT
from tests.factories import a_snapshot
from tests.legacy_databases import FIRST_GENERATION, OUTCOMES_BEFORE_DUPLICATE, SECOND_GENERATION

_STRUCTURE = """
    SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'
    ORDER BY table_name, ordinal_position
"""

_OLD_WORKERS_INSERT = """
    INSERT INTO event_outcomes (job_id, outcome) VALUES (:job_id, 'absorbed')
    ON CONFLICT (job_id) DO UPDATE SET outcome = excluded.outcome WHERE event_outcomes.outcome <> 'discarded'
"""


def _execute(statement: str, **values: Any) -> None:
    with engine().begin() as db:
        db.execute(text(statement), values)


def _structure() -> list[tuple[Any, ...]]:
    with get_db() as db:
        return [tuple(row) for row in db.execute(text(_STRUCTURE))]


@pytest.mark.parametrize(
    ("old", "tables"),
    [(FIRST_GENERATION, "portfolio_history, signal_archives"), (SECOND_GENERATION, "portfolio_history")],
)
def test_apply_schema_does_not_change_tables_of_the_old_shape(empty_database_url: str, old: str, tables: str) -> None:
    """It raises an error that names them, and the connection can be used afterwards."""
    _execute(old)
    before = _structure()
    with pytest.raises(
        OldSchema, match=f"^tables of the old shape are in the way: {tables}. Nothing was .*--adopt-legacy$"
    ):
        apply_schema(engine())

    assert _structure() == before


def test_apply_schema_runs_again_and_keeps_rows_and_columns(database_url: str) -> None:
    """The tables already exist."""
    _execute(
        "INSERT INTO event_outcomes (job_id, outcome, reason) VALUES ('kept', 'rejected', 'why')",
    )
    before = _structure()
    apply_schema(engine())
    with get_db() as db:
        assert db.execute(text("SELECT job_id FROM event_outcomes")).scalars().all() == ["kept"]
    assert _structure() == before


def test_apply_schema_upgrades_version_1(database_url: str) -> None:
    """Two sessions do it at once. Only outcomes change, another run rewrites no row, and old workers can insert."""
    _execute(OUTCOMES_BEFORE_DUPLICATE)
    _execute("INSERT INTO event_outcomes (job_id, outcome) SELECT n::text, 'absorbed' FROM generate_series(1, 3) AS n")
    _execute("INSERT INTO event_outcomes (job_id, outcome, reason) VALUES ('4', 'rejected', 'why')")
    _execute("INSERT INTO event_outcomes (job_id, outcome, reason) VALUES ('5', 'discarded', 'why')")
    kept = "SELECT job_id, outcome, reason, created_at FROM event_outcomes ORDER BY job_id"
    with get_db() as db:
        before = [tuple(row) for row in db.execute(text(kept))]
    with ThreadPoolExecutor(2) as at_once:
        assert list(at_once.map(apply_schema, [engine()] * 2)) == [[], []]

    places = "SELECT ctid, xmin, * FROM event_outcomes ORDER BY job_id"
    with get_db() as db:
        assert [tuple(row) for row in db.execute(text(kept))] == [
            (job_id, "duplicate" if outcome == "absorbed" else outcome, *rest) for job_id, outcome, *rest in before
        ]
        checks = (
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'event_outcomes'::regclass"
        )
        upgraded = (db.execute(text(checks)).all(), db.execute(text(places)).all())
    assert "absorbed" not in str(upgraded)
    apply_schema(engine())
    with get_db() as db:
        assert (db.execute(text(checks)).all(), db.execute(text(places)).all()) == upgraded

    _execute(_OLD_WORKERS_INSERT, job_id="6")
    _execute(_OLD_WORKERS_INSERT, job_id="1")
    with get_db() as db:
        assert db.execute(text("SELECT count(*) FROM event_outcomes WHERE outcome = 'duplicate'")).scalar() == 4


def test_apply_schema_upgrades_version_2(database_url: str) -> None:
    """It has no table of withdrawals. Rows stay, and a worker of this version waits until then."""
    event = event_of(a_snapshot(), source="other/1", sequence=1)
    insert_event(event)
    before = _structure()
    _execute("DROP TABLE withdrawals")
    _execute("COMMENT ON TABLE event_outcomes IS 'as it was (schema version 2)'")
    engine().dispose()
    with pytest.raises(StoreUnavailable, match="version 2, needed is 3.*run trading-history init-db"):
        insert_event(event)
    with ThreadPoolExecutor(2) as at_once:
        assert list(at_once.map(apply_schema, [engine()] * 2)) == [[], []]
    assert _structure() == before
    assert insert_event(event) == get_portfolio_history()[0]["id"]


def test_apply_schema_does_not_use_the_withdrawals_of_another_program(empty_database_url: str) -> None:
    """A bot may have a table of this name for money that left the account."""
    _execute("CREATE TABLE withdrawals (id integer, amount numeric)")
    before = _structure()
    with pytest.raises(OldSchema, match="^another table is in the way: withdrawals. Nothing was .*--schema NAME$"):
        apply_schema(engine())
    assert _structure() == before


_INDEXES = (
    "event_outcomes_of_source",
    "event_outcomes_rejected",
    "portfolio_history_dated_otherwise",
    "portfolio_history_newest",
    "portfolio_history_newest_of_portfolio",
    "portfolio_history_of_source",
    "signal_archives_newest",
    "signal_archives_newest_of_portfolio",
    "signal_archives_of_market",
    "signal_archives_of_month",
    "signal_archives_of_source",
    "withdrawals_of_event",
    "withdrawals_of_source",
)


@pytest.mark.parametrize("names", [_INDEXES[-1:], tuple(reversed(_INDEXES))], ids=["one", "all"])
def test_apply_schema_does_not_take_indexes_of_other_tables_for_its_own(
    empty_database_url: str, names: tuple[str, ...]
) -> None:
    """PostgreSQL would skip an index whose name exists, on whatever table. The error lists all of them."""
    _execute("CREATE TABLE other (a integer)")
    for name in names:
        _execute(f"CREATE INDEX {name} ON other (a)")
    before = _structure()
    listed = ", ".join(sorted(names))
    with pytest.raises(OldSchema, match=f"^other tables have indexes of these names: {listed}. Nothing was changed"):
        apply_schema(engine())
    assert _structure() == before


def test_only_named_roles_may_create_objects_beside_the_tables(empty_database_url: str) -> None:
    """A function of another role could run with the rights of a worker. PostgreSQL 14 lets every role create some."""
    _execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    assert apply_schema(engine()) == []
    with get_db() as db:
        granted = text("""
            SELECT privilege_type FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'public' AND grantee = 0
        """)
        assert db.scalars(granted).all() == ["USAGE"]


def test_a_note_says_what_only_the_owner_of_the_schema_can_forbid(empty_database_url: str) -> None:
    """The tables are created all the same."""
    _execute("CREATE ROLE guest_of_schema LOGIN; GRANT CREATE ON SCHEMA public TO PUBLIC")
    guest = make_url(empty_database_url).set(username="guest_of_schema").render_as_string(hide_password=False)
    store = create_store_engine(SecretStr(guest))
    notes = apply_schema(store)
    store.dispose()
    _execute("DROP OWNED BY guest_of_schema; DROP ROLE guest_of_schema")
    assert notes == [
        "every role may create objects in schema public, and only its owner can change that: REVOKE CREATE ON SCHEMA"
        " public FROM PUBLIC"
    ]


def test_psql_runs_schema_sql(empty_database_url: str, tmp_path: Path) -> None:
    """A database administrator can apply the file without this program."""
    from consumers.embedded.installation import installed

    (tmp_path / "schema.sql").write_text(schema_sql())
    psql = installed().postgres_bin / "psql"
    run = subprocess.run(
        [psql, "-XqAt", "-v", "ON_ERROR_STOP=1", "-f", tmp_path / "schema.sql", empty_database_url],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, get_portfolio_history()) == (0, []), run.stderr


def test_every_table_and_column_has_a_comment(database_url: str) -> None:
    """psql and database browsers show them."""
    uncommented = """
        SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum >= 0
        WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace AND NOT a.attisdropped
            AND (col_description(c.oid, a.attnum) IS NULL OR obj_description(c.oid) IS NULL)
    """
    with get_db() as db:
        assert db.execute(text(uncommented)).all() == []


_SNAPSHOT = """
    INSERT INTO portfolio_history (event_id, source, snapshot_date, "timestamp", balance, total_invested,
        total_profit_loss, total_value, open_positions, trade_count)
    VALUES (gen_random_uuid(), 'x', '2026-01-01', now(), {balance}, 0, 0, 0, {open}, {trades})
"""
_ARCHIVE = """
    INSERT INTO signal_archives (event_id, source, archived_at, archive_month, signals_count, signals_data)
    VALUES (gen_random_uuid(), 'x', now(), {month}, {count}, {data})
"""
_STORED = _SNAPSHOT.format(balance=0, open=0, trades=0) + ";"
_KEPT = _ARCHIVE.format(month="'2026-12'", count=1, data="'[{}]'") + ";"


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        (_SNAPSHOT.format(balance="'NaN'", open=0, trades=0), "portfolio_history_amounts_are_numbers"),
        (_STORED + "UPDATE portfolio_history SET total_invested = 'NaN'", "portfolio_history_amounts_are_numbers"),
        (_STORED + "UPDATE portfolio_history SET total_profit_loss = 'NaN'", "portfolio_history_amounts_are_numbers"),
        (_STORED + "UPDATE portfolio_history SET total_value = 'NaN'", "portfolio_history_amounts_are_numbers"),
        (_STORED + "UPDATE portfolio_history SET sequence = -1", "portfolio_history_sequence_not_negative"),
        (_STORED + "INSERT INTO portfolio_history SELECT * FROM portfolio_history", "portfolio_history_pk"),
        (_KEPT + "UPDATE signal_archives SET sequence = -1", "signal_archives_sequence_not_negative"),
        (_KEPT + "INSERT INTO signal_archives SELECT * FROM signal_archives", "signal_archives_pk"),
        (_ARCHIVE.format(month="'2026-00'", count=1, data="'[{}]'"), "signal_archives_month_is_a_month"),
        (_ARCHIVE.format(month="'2026-1'", count=1, data="'[{}]'"), "signal_archives_month_is_a_month"),
        (_SNAPSHOT.format(balance=0, open=-1, trades=0), "portfolio_history_open_positions_not_negative"),
        (_SNAPSHOT.format(balance=0, open=0, trades=-1), "portfolio_history_trade_count_not_negative"),
        (_ARCHIVE.format(month="'2026-13'", count=1, data="'[{}]'"), "signal_archives_month_is_a_month"),
        (_ARCHIVE.format(month="'2026-12'", count=2, data="'[{}]'"), "signal_archives_count_is_the_length"),
        (_ARCHIVE.format(month="'2026-12'", count=0, data="'[]'"), "signal_archives_count_is_the_length"),
        (_ARCHIVE.format(month="'2026-12'", count=1, data="'{}'"), "signal_archives_data_is_an_array"),
        ("INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'lost')", "event_outcomes_outcome_is_known"),
        (
            "INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'rejected')",
            "event_outcomes_refusal_has_a_reason",
        ),
    ],
)
def test_constraints_refuse_impossible_rows(database_url: str, statement: str, constraint: str) -> None:
    """The name of the constraint says what is wrong."""
    with pytest.raises(IntegrityError, match=constraint):
        _execute(statement)


def test_constraints_accept_the_rows_at_their_limits(database_url: str) -> None:
    """The least counts and numbers, each month, the largest amounts with every digit."""
    _execute(_STORED + "UPDATE portfolio_history SET sequence = 0")
    for month in range(1, 13):
        _execute(_ARCHIVE.format(month=f"'2026-{month:02}'", count=2, data="'[{}, {}]'"))
    _execute("UPDATE signal_archives SET sequence = 0")
    _execute("INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'duplicate')")
    for outcome in ("rejected", "discarded"):
        _execute(f"INSERT INTO event_outcomes (job_id, outcome, reason) VALUES ('{outcome}', '{outcome}', 'why')")
    largest = "-999999999999.12345678"
    amounts = ("balance", "total_invested", "total_profit_loss", "total_value")
    _execute("UPDATE portfolio_history SET " + ", ".join(f"{name} = {largest}" for name in amounts))
    with get_db() as db:
        row = db.execute(text(f"SELECT {', '.join(amounts)} FROM portfolio_history")).one()
    assert [str(value) for value in row] == [largest] * 4


def test_only_optional_columns_may_be_null(database_url: str) -> None:
    """The number and the portfolio of an event may be absent; an outcome may have been unreadable."""
    with get_db() as db:
        rows = db.execute(
            text("""
                SELECT table_name, array_agg(CAST(column_name AS text) ORDER BY column_name)
                FROM information_schema.columns WHERE table_schema = current_schema() AND is_nullable = 'YES'
                GROUP BY table_name
            """)
        ).all()
    assert dict(rows) == {
        "portfolio_history": ["portfolio_id", "sequence"],
        "signal_archives": ["portfolio_id", "sequence"],
        "event_outcomes": ["actor", "event", "event_id", "reason", "sequence", "source"],
        "withdrawals": ["job_id", "sequence"],
    }


def test_each_table_notes_the_time_of_its_rows(database_url: str) -> None:
    """It is the time of the transaction, which the statement need not name."""
    _execute(_STORED + _KEPT + "INSERT INTO event_outcomes (job_id, outcome) VALUES ('x', 'duplicate')")
    _execute(
        "INSERT INTO withdrawals (event_id, source, row_id, content, reason, actor, created_at)"
        " VALUES (gen_random_uuid(), 'x', 1, '{}', 'why', 'alice', now())"
    )
    times = " UNION ALL ".join(
        f"SELECT {column} > now() - interval '1 minute' FROM {table}"
        for table, column in (
            ("portfolio_history", "created_at"),
            ("signal_archives", "created_at"),
            ("event_outcomes", "created_at"),
            ("withdrawals", "withdrawn_at"),
        )
    )
    with get_db() as db:
        assert db.execute(text(times)).scalars().all() == [True] * 4


def test_each_index_of_the_schema_exists(database_url: str) -> None:
    """There is no other index. A query of a large table needs each of them; tests of plans name the queries."""
    newest = 'snapshot_date DESC, "timestamp" DESC, id DESC'
    dated = "(((\"timestamp\" AT TIME ZONE 'UTC'::text))::date {} 1)"
    otherwise = f"WHERE ((snapshot_date < {dated.format('-')}) OR (snapshot_date > {dated.format('+')}))"
    markets = "gin (jsonb_path_query_array(signals_data, '$[*].\"market_id\"'::jsonpath) jsonb_path_ops)"
    with get_db() as db:
        rows = db.execute(text("SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()")).all()
    assert {name: definition.partition(" USING ")[2] for name, definition in rows} == {
        "portfolio_history_pk": "btree (id)",
        "portfolio_history_event_once": "btree (event_id)",
        "portfolio_history_newest": f"btree ({newest})",
        "portfolio_history_newest_of_portfolio": f"btree (portfolio_id, {newest})",
        "portfolio_history_dated_otherwise": f"btree ({newest}) {otherwise}",
        "portfolio_history_of_source": "btree (source, sequence)",
        "signal_archives_pk": "btree (id)",
        "signal_archives_event_once": "btree (event_id)",
        "signal_archives_newest": "btree (archived_at DESC, id DESC)",
        "signal_archives_newest_of_portfolio": "btree (portfolio_id, archived_at DESC, id DESC)",
        "signal_archives_of_month": "btree (archive_month)",
        "signal_archives_of_market": markets,
        "signal_archives_of_source": "btree (source, sequence)",
        "event_outcomes_pk": "btree (job_id)",
        "event_outcomes_of_source": "btree (source, sequence)",
        "event_outcomes_rejected": "btree (created_at DESC) WHERE (outcome = 'rejected'::text)",
        "withdrawals_pk": "btree (id)",
        "withdrawals_of_event": "btree (event_id)",
        "withdrawals_of_source": "btree (source, sequence)",
    }


def test_insert_translates_value_errors_to_invalid_event_without_values(database_url: str) -> None:
    """SQLSTATE classes 22 and 23: the message has the constraint's name, but not the row."""
    _execute("ALTER TABLE portfolio_history ADD CONSTRAINT unlucky CHECK (balance <> 987654)")
    with pytest.raises(InvalidEvent, match=r"unlucky.*SQLSTATE 23514") as caught:
        insert_event(event_of(a_snapshot(balance="987654"), source="other/1", sequence=1))
    assert "987654" not in str(caught.value)
    assert caught.value.__cause__ is None
    _execute("ALTER TABLE portfolio_history ALTER total_value TYPE numeric(4, 2)")
    with pytest.raises(InvalidEvent, match="SQLSTATE 22003"):
        insert_event(event_of(a_snapshot(), source="other/1", sequence=1))


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO event_outcomes (job_id, outcome) VALUES ('987654', 'unknown')",
        "SELECT CAST('987654' AS smallint)",
        _SNAPSHOT.format(balance=987654, open=-1, trades=0),
    ],
)
def test_value_errors_of_other_statements_are_store_unavailable(database_url: str, statement: str) -> None:
    """A constraint of an older schema must not reject an event. This error contains no values either."""
    with pytest.raises(StoreUnavailable, match="SQLSTATE 2.*trading-history init-db") as caught, get_db() as db:
        db.execute(text(statement))
    assert caught.value.__cause__ is None
    assert caught.value.one_statement


def test_insert_needs_the_schema_version_of_the_program_or_a_newer_one(database_url: str) -> None:
    """It checks once per connection. So does a withdrawal."""
    event = event_of(a_snapshot(), source="other/1", sequence=1)
    insert_event(event)
    _execute("COMMENT ON TABLE event_outcomes IS 'as it was'")
    engine().dispose()
    with pytest.raises(StoreUnavailable, match="version 1, needed is 3.*run trading-history init-db") as caught:
        insert_event(event)
    assert not caught.value.one_statement
    with pytest.raises(StoreUnavailable, match="version 1, needed is 3"), get_db() as db:
        withdraw(db, event.id, "why", "alice")
    apply_schema(engine())
    insert_event(event)
    _execute("COMMENT ON TABLE event_outcomes IS 'schema version 10'")
    engine().dispose()
    insert_event(event)


def _without_tables() -> None:
    _execute("DROP TABLE portfolio_history")


def _read_only() -> None:
    with engine().connect().execution_options(isolation_level="AUTOCOMMIT") as db:
        name = db.execute(text("SELECT current_database()")).scalar()
        db.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    engine().dispose()


@pytest.mark.parametrize(("break_database", "sqlstate"), [(_without_tables, "42P01"), (_read_only, "25006")])
def test_other_database_errors_are_store_unavailable(
    database_url: str, break_database: Callable[[], None], sqlstate: str
) -> None:
    """The event is valid if a table is missing or the database is read-only. The message is the server's first line."""
    break_database()
    with pytest.raises(StoreUnavailable) as caught, get_db() as db:
        db.execute(text(_SNAPSHOT.format(balance=0, open=0, trades=0)))
    original = getattr(caught.value.__cause__, "orig", None)
    assert isinstance(original, psycopg2.Error)
    assert original.pgcode == sqlstate
    assert str(caught.value) == f"PostgreSQL: {original.diag.message_primary}"


def test_error_of_an_unreachable_database_shows_no_password() -> None:
    """Neither the StoreUnavailable nor its cause contains it."""
    store = create_store_engine(SecretStr("postgresql://me:s3cret@127.0.0.1:1/x"))
    with pytest.raises(StoreUnavailable, match="Connection refused") as caught:
        apply_schema(store)
    assert "s3cret" not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_engine_keeps_the_options_of_the_url(database_url: str) -> None:
    """The operator's search_path is set, and the time zone is still UTC."""
    store = create_store_engine(SecretStr(f"{database_url}&options=-csearch_path%3Delsewhere"))
    with store.connect() as db:
        shown = [db.execute(text(f"SHOW {name}")).scalar() for name in ("search_path", "timezone")]
    store.dispose()
    assert shown == ["elsewhere", "UTC"]


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/db"])
def test_url_that_is_not_of_postgresql_raises_settings_error(url: str) -> None:
    """The message names the setting, and no connection is tried."""
    with pytest.raises(SettingsError, match="^DATABASE_URL: "):
        create_store_engine(SecretStr(url))


def test_init_db_takes_the_lock_of_the_schema_before_it_looks_at_the_tables() -> None:
    """So it sees all or nothing of what another init-db does at the same time."""
    lock = re.compile(r"SELECT pg_advisory_xact_lock\((\d+)\)")
    files = [ROOT / name for name in ("schema.sql", "consumers/db/schema.py")]
    (of_schema,), (of_init_db,) = [lock.findall(file.read_text("utf-8")) for file in files]
    assert of_schema == of_init_db
