"""Adoption of tables of the old shape: they are renamed and replaced by the new ones, or nothing is changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from consumers.db.engine import create_store_engine, engine, get_db
from consumers.db.inserts import Stored, insert_events
from consumers.db.schema import apply_schema
from consumers.embedded.installation import installed
from consumers.errors import AdoptionRefused, StoreUnavailable
from consumers.legacy.adoption import adopt_legacy, names_in_schema, plan_adoption
from consumers.legacy.legacy_json import archive_from, snapshot_from
from consumers.legacy.legacy_rows import read_legacy_rows
from consumers.operations import get_portfolio_history, get_recent_signal_archives, insert_signal_archive
from producers.errors import InvalidEvent
from producers.events import event_of
from tests.database_facts import Facts, database_facts
from tests.factories import INSTANT, a_signal
from tests.legacy_databases import (
    ARCHIVES,
    FIRST_GENERATION,
    FIRST_GENERATION_SNAPSHOTS,
    OTHER_TABLES,
    SECOND_GENERATION,
    SECOND_GENERATION_SNAPSHOTS,
)
from tests.rq_programs import somebody_waits_for_a_lock, until

BERLIN = ZoneInfo("Europe/Berlin")
PROGRAM = [sys.executable, "-m", "consumers.cli"]


def _execute(*statements: str, **values: Any) -> None:
    with engine().begin() as db:
        for statement in statements:
            db.execute(text(statement), values)


@pytest.fixture
def first_generation(empty_database_url: str) -> str:
    _execute(FIRST_GENERATION, OTHER_TABLES)
    _execute(FIRST_GENERATION_SNAPSHOTS, ARCHIVES, rows=100)
    return empty_database_url


@pytest.fixture
def second_generation(empty_database_url: str) -> str:
    _execute(SECOND_GENERATION, OTHER_TABLES)
    _execute(SECOND_GENERATION_SNAPSHOTS, rows=12)
    return empty_database_url


@pytest.fixture
def role(empty_database_url: str) -> Iterator[str]:
    """A role that owns nothing."""
    name = f"role_{uuid4().hex}"
    _execute(f"CREATE ROLE {name}")
    yield name
    _execute(f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def _psql(script: Path, url: str) -> subprocess.CompletedProcess[str]:
    program = str(installed().postgres_bin / "psql")
    command = [program, "-Xq", "-v", "ON_ERROR_STOP=1", "-f", str(script), url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _all(query: str) -> list[tuple[Any, ...]]:
    with get_db() as db:
        return [tuple(row) for row in db.execute(text(query))]


def _run(*arguments: str) -> tuple[int, str, str]:
    run = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False)
    return run.returncode, run.stdout, run.stderr


def test_the_first_generation_is_renamed_with_every_row(first_generation: str) -> None:
    """The new tables are empty, usable, and have the old names."""
    before = [_all(f"SELECT * FROM {table} ORDER BY id") for table in ("portfolio_history", "signal_archives")]

    adoption = adopt_legacy(engine())

    legacy = ("portfolio_history_legacy", "signal_archives_legacy")
    assert adoption.renamed == (("portfolio_history", legacy[0]), ("signal_archives", legacy[1]))
    assert [_all(f"SELECT * FROM {table} ORDER BY id") for table in legacy] == before
    assert (get_portfolio_history(), get_recent_signal_archives()) == ([], [])
    assert insert_signal_archive({"archived_at": INSTANT, "signals": [a_signal()]}) == 1


def test_the_second_generation_has_no_archives_and_keeps_its_foreign_key(second_generation: str) -> None:
    """A note explains what the key does and how to drop it."""
    before = _all("SELECT * FROM portfolio_history ORDER BY id")

    adoption = adopt_legacy(engine())
    left = _all("SELECT * FROM portfolio_history_legacy ORDER BY id")
    _execute("DELETE FROM portfolios WHERE portfolio_id = 1")

    assert adoption.renamed == (("portfolio_history", "portfolio_history_legacy"),)
    assert left == before
    assert (get_portfolio_history(), get_recent_signal_archives()) == ([], [])
    assert adoption.notes == (
        "portfolio_history_portfolio_id_fkey still deletes rows of portfolio_history_legacy when their row of"
        " portfolios is deleted (ON DELETE CASCADE); to prevent that: ALTER TABLE portfolio_history_legacy"
        " DROP CONSTRAINT portfolio_history_portfolio_id_fkey",
    )
    assert len(_all("SELECT FROM portfolio_history_legacy")) == 8


_ALL_SNAPSHOTS_ARE_EQUAL = """
    SELECT count(*), count(*) FILTER (WHERE
        (new.snapshot_date, new.balance, new.total_invested, new.total_profit_loss, new.total_value,
            new.open_positions, new.trade_count, new."timestamp" AT TIME ZONE 'Europe/Berlin')
        = (old.snapshot_date, old.balance, old.total_invested, old.total_profit_loss, old.total_value,
            coalesce(old.open_positions, 0), coalesce(old.trade_count, 0), old."timestamp"))
    FROM portfolio_history AS new
    JOIN portfolio_history_legacy AS old ON old.id = new.sequence AND {portfolio}
"""


@pytest.mark.parametrize(("generation", "rows"), [("first_generation", 100), ("second_generation", 12)])
def test_every_value_is_imported_unchanged(generation: str, rows: int, request: pytest.FixtureRequest) -> None:
    """The database compares the old and the new rows, column by column."""
    request.getfixturevalue(generation)
    adopt_legacy(engine())
    events = [
        event_of(snapshot_from(data, zone=BERLIN, portfolio_id=None), source="import/x", sequence=index + 1)
        for index, data in read_legacy_rows(engine(), "portfolio_history_legacy")
    ]
    with get_db() as db:
        answers = insert_events(db, events)

    portfolio = "new.portfolio_id IS NULL" if rows == 100 else "old.portfolio_id = new.portfolio_id"
    assert all(isinstance(answer, Stored) and answer.created for answer in answers)
    assert _all(_ALL_SNAPSHOTS_ARE_EQUAL.format(portfolio=portfolio)) == [(rows, rows)]


def test_every_signal_is_imported_with_every_digit(first_generation: str) -> None:
    """The database compares the JSON. The month is the one of the local time."""
    adopt_legacy(engine())
    events = [
        event_of(archive_from(data, zone=BERLIN, portfolio_id=4), source="import/x", sequence=index + 1)
        for index, data in read_legacy_rows(engine(), "signal_archives_legacy")
    ]
    with get_db() as db:
        insert_events(db, events)

    same = """
        SELECT count(*) FROM signal_archives AS new JOIN signal_archives_legacy AS old ON old.id = new.sequence
        WHERE (new.signals_data, new.signals_count, new.archive_month, new.archived_at AT TIME ZONE 'Europe/Berlin')
            = (old.signals_data, old.signals_count, old.archive_month, old.archived_at) AND new.portfolio_id = 4
            AND new.signals_data #>> '{0,yes_price}' = '0.99950000000000000001'
    """
    assert _all(same) == [(100,)]
    assert {row["archive_month"] for row in get_recent_signal_archives()} == {"2025-10", "2025-11"}


def test_an_entry_is_the_row_in_the_old_json_shape(second_generation: str) -> None:
    """Entries are numbered from 0 without gaps. A count that is NULL is 0. An infinite time makes one entry invalid."""
    _execute("DELETE FROM portfolio_history WHERE id = 2")
    _execute("UPDATE portfolio_history SET timestamp = 'infinity' WHERE id = 4")
    _execute("ALTER DATABASE " + _all("SELECT current_database()")[0][0] + " SET datestyle = 'German'")
    engine().dispose()
    adopt_legacy(engine())

    entries = list(read_legacy_rows(engine(), "portfolio_history_legacy"))

    assert [entry.index for entry in entries] == list(range(11))
    assert entries[1].data == {
        "date": "2025-10-23",
        "timestamp": "2025-10-23T17:02:46.101234",
        "balance": 3,
        "total_invested": 1,
        "total_profit_loss": entries[0].data["total_profit_loss"],
        "total_value": entries[1].data["balance"] + entries[0].data["total_profit_loss"],
        "open_positions": 0,
        "trade_count": 3,
        "portfolio_id": 1,
    }
    assert str(entries[0].data["total_profit_loss"]) == "-0.01"
    with pytest.raises(InvalidEvent, match="^timestamp: "):
        snapshot_from(entries[2].data, zone=UTC, portfolio_id=None)


def test_rows_that_json_readers_cannot_read_do_not_affect_other_rows(first_generation: str) -> None:
    """Numbers of thousands of digits, and very deep nesting."""
    _execute(
        "UPDATE signal_archives SET signals_data = CAST('[{\"n\": ' || repeat('9', 5000) || '}]' AS jsonb)"
        " WHERE id = 1",
        "UPDATE signal_archives SET signals_data = CAST(repeat('[', 3000) || repeat(']', 3000) AS jsonb) WHERE id = 2",
    )
    adopt_legacy(engine())
    first, second, *others = read_legacy_rows(engine(), "signal_archives_legacy")
    for entry in (first, second):
        with pytest.raises(InvalidEvent):
            archive_from(entry.data, zone=UTC, portfolio_id=None)
    assert len([archive_from(entry.data, zone=UTC, portfolio_id=None) for entry in others]) == 98


def test_a_connection_that_is_lost_between_rows_raises_store_unavailable(first_generation: str) -> None:
    """The rows read before are correct. The import ends and can be run again."""
    _execute(FIRST_GENERATION_SNAPSHOTS, rows=1000)
    adopt_legacy(engine())
    rows = read_legacy_rows(engine(), "portfolio_history_legacy")
    assert next(rows).index == 0
    _execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction'")
    with pytest.raises(StoreUnavailable, match="^PostgreSQL: "):
        list(rows)


def test_a_second_adoption_changes_nothing_and_reports_it(first_generation: str) -> None:
    """It names the tables of the first one."""
    first = _run("init-db", "--adopt-legacy")
    before = database_facts(first_generation)
    again = _run("init-db", "--adopt-legacy")

    assert first == (
        0,
        "Table portfolio_history was renamed to portfolio_history_legacy.\n"
        "Table signal_archives was renamed to signal_archives_legacy.\n"
        "The tables are ready in schema public.\n",
        "",
    )
    assert again == (
        0,
        "There are no tables of the old shape to rename; portfolio_history_legacy and signal_archives_legacy are from"
        " an earlier run.\nThe tables are ready in schema public.\n",
        "",
    )
    assert database_facts(first_generation) == before


def test_without_old_tables_adoption_does_the_same_as_init_db(empty_database_url: str) -> None:
    """It creates the tables and prints that nothing was renamed."""
    answer = _run("init-db", "--adopt-legacy")
    made = database_facts(empty_database_url)
    _execute("DROP TABLE portfolio_history, signal_archives, event_outcomes, withdrawals")
    apply_schema(engine())

    assert answer == (
        0,
        "There are no tables of the old shape to rename.\nThe tables are ready in schema public.\n",
        "",
    )
    assert database_facts(empty_database_url) == made


def test_two_simultaneous_adoptions_rename_once(first_generation: str) -> None:
    """The second one waits for the lock and then finds nothing to do."""
    other = create_store_engine(SecretStr(first_generation))
    with ThreadPoolExecutor(1) as pool:
        with other.begin() as db:
            for statement in plan_adoption(engine()).statements:
                db.execution_options(no_parameters=True).exec_driver_sql(statement)
            second = pool.submit(adopt_legacy, engine())
            until(somebody_waits_for_a_lock)
        adoption = second.result(60)
    other.dispose()

    assert (adoption.renamed, adoption.earlier) == ((), ("portfolio_history_legacy", "signal_archives_legacy"))
    assert len(_all("SELECT FROM portfolio_history_legacy")) == 100
    assert get_portfolio_history() == []


def test_a_long_transaction_on_the_old_tables_makes_adoption_fail_after_3_seconds(first_generation: str) -> None:
    """The error names the session without the text of its query. Nothing is changed."""
    before = database_facts(first_generation)
    reader = create_store_engine(SecretStr(first_generation))
    with reader.begin() as db:
        db.exec_driver_sql("SET application_name = 'monthly report'")
        pid = db.execute(text("SELECT pg_backend_pid(), 's3cret' FROM signal_archives LIMIT 1")).scalar()
        status, out, error = _run("init-db", "--adopt-legacy")
        dry = _run("init-db", "--adopt-legacy", "--dry-run")
    reader.dispose()

    assert (status, out, error.count("\n")) == (1, "", 1)
    assert error.startswith(
        f"error: the old tables could not be locked within 3 s: locked by pid {pid}"
        " (monthly report, idle in transaction, transaction open for "
    )
    assert error.endswith(" s). Nothing was changed: try again.\n")
    assert "s3cret" not in error
    assert dry[0] == 0
    assert database_facts(first_generation) == before
    assert _run("init-db", "--adopt-legacy")[0] == 0


def test_a_session_of_another_user_is_reported_by_its_pid(first_generation: str, role: str) -> None:
    """PostgreSQL hides the rest from users that are not superusers."""
    _execute(
        *(f"ALTER TABLE {table} OWNER TO {role}" for table in ("portfolio_history", "signal_archives")),
        f"GRANT CREATE ON SCHEMA public TO {role}",
    )
    store = create_store_engine(SecretStr(f"{first_generation}&options=-crole%3D{role}"))
    with engine().begin() as db:
        pid = db.execute(text("SELECT pg_backend_pid() FROM signal_archives LIMIT 1")).scalar()
        with pytest.raises(AdoptionRefused, match=f"within 3 s: locked by pid {pid}. Nothing was changed: try again"):
            adopt_legacy(store)
    store.dispose()


_DIES_AT_A_STEP = """
import os, signal, sys
from sqlalchemy import Engine, event
from consumers.cli import main

step = sys.argv.pop(1)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def die_before(connection, cursor, statement, *_):
    if statement.startswith(step):
        die()

event.listen(Engine, "commit", die) if step == "commit" else event.listen(Engine, "before_cursor_execute", die_before)
main()
"""


@pytest.mark.parametrize(
    "step",
    ["LOCK TABLE", "ALTER TABLE public.portfolio", "ALTER SEQUENCE public.signal", "-- Tables, indexes", "commit"],
)
def test_a_killed_adoption_changes_nothing(first_generation: str, step: str) -> None:
    """The next run adopts the tables."""
    before = database_facts(first_generation)
    program = [sys.executable, "-c", _DIES_AT_A_STEP, step, "init-db", "--adopt-legacy"]
    killed = subprocess.run(program, check=False, timeout=60)

    assert killed.returncode == -9
    assert database_facts(first_generation) == before
    assert len(adopt_legacy(engine()).renamed) == 2


def test_indexes_and_sequences_whose_names_are_needed_are_renamed(first_generation: str) -> None:
    """Other names are kept."""
    _execute(
        "ALTER TABLE portfolio_history RENAME CONSTRAINT portfolio_history_pkey TO portfolio_history_pk",
        "CREATE INDEX portfolio_history_newest ON portfolio_history (timestamp)",
        "ALTER TABLE signal_archives ADD CONSTRAINT signal_archives_event_once UNIQUE (archived_at)",
    )
    adopt_legacy(engine())

    indexes = "SELECT indexname FROM pg_indexes WHERE tablename LIKE '%legacy' ORDER BY 1"
    sequences = "SELECT pg_get_serial_sequence(t, 'id') FROM unnest(ARRAY['{0}', '{0}_legacy']) AS t"
    assert [name for (name,) in _all(indexes)] == [
        "idx_portfolio_history_date",
        "idx_signal_archives_month",
        "portfolio_history_newest_legacy",
        "portfolio_history_pk_legacy",
        "signal_archives_event_once_legacy",
        "signal_archives_pkey",
    ]
    for table in ("portfolio_history", "signal_archives"):
        names = [name for (name,) in _all(sequences.format(table))]
        assert names == [f"public.{table}_id_seq", f"public.{table}_id_seq_legacy"]


def test_new_tables_keep_their_names_if_only_one_old_table_is_left(first_generation: str) -> None:
    """As after an adoption, if the old table of snapshots was put back."""
    adopt_legacy(engine())
    _execute("DROP TABLE portfolio_history", "ALTER TABLE portfolio_history_legacy RENAME TO portfolio_history")
    archives = "SELECT indexname FROM pg_indexes WHERE tablename = 'signal_archives' ORDER BY 1"
    before = _all(archives)
    assert adopt_legacy(engine()).renamed == (("portfolio_history", "portfolio_history_legacy"),)
    assert _all(archives) == before


def test_a_sequence_with_a_needed_name_is_no_obstacle(first_generation: str) -> None:
    """PostgreSQL chooses another name for the new one."""
    _execute("CREATE SEQUENCE withdrawals_id_seq")
    assert len(adopt_legacy(engine()).renamed) == 2
    assert _all("SELECT pg_get_serial_sequence('withdrawals', 'id')") == [("public.withdrawals_id_seq1",)]


def test_names_in_schema_lists_every_index_and_sequence(database_url: str) -> None:
    """With the suffix, each name is a valid identifier of at most 63 bytes."""
    relations = """
        SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('i', 'S') ORDER BY relname
    """
    assert sorted(names_in_schema()) == [name for (name,) in _all(relations)]
    assert max(len(f"{name}_legacy") for name in names_in_schema()) <= 63


@pytest.mark.parametrize(
    ("obstacle", "message"),
    [
        (
            "CREATE INDEX portfolio_history_newest ON trades (at)",
            "index portfolio_history_newest of table trades has a name that the new tables need: rename it",
        ),
        (
            "CREATE VIEW signal_archives_newest AS SELECT 1 AS one",
            "view signal_archives_newest has a name that the new tables need: rename it",
        ),
        (
            "CREATE TABLE portfolio_history_legacy ()",
            "the name portfolio_history_legacy is already in use: rename or drop the object that has it",
        ),
        (
            "CREATE TYPE signal_archives_legacy AS ENUM ('a')",
            "the name signal_archives_legacy is already in use: rename or drop the object that has it",
        ),
        (
            "CREATE SEQUENCE portfolio_history_id_seq_legacy",
            "the name portfolio_history_id_seq_legacy is already in use: rename or drop the object that has it",
        ),
        (
            "ALTER TABLE signal_archives DROP signals_data, DROP archived_at",
            "signal_archives does not have the old shape: it has no column archived_at, signals_data",
        ),
        (
            "ALTER TABLE signal_archives RENAME TO a; CREATE VIEW signal_archives AS SELECT * FROM a",
            "signal_archives is not a table",
        ),
    ],
)
def test_each_obstacle_to_adoption_is_named(first_generation: str, obstacle: str, message: str) -> None:
    """By a dry run and by a run, before anything is changed."""
    _execute(obstacle)
    before = database_facts(first_generation)
    for attempt in (plan_adoption, adopt_legacy):
        with pytest.raises(AdoptionRefused) as caught:
            attempt(engine())
        assert str(caught.value) == f"{message}. Nothing was changed."
    assert database_facts(first_generation) == before


def test_a_missing_privilege_is_an_error_that_names_the_owner(first_generation: str, role: str) -> None:
    """It is raised before any lock is requested."""
    _execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}", f"GRANT CREATE ON SCHEMA public TO {role}")
    store = create_store_engine(SecretStr(f"{first_generation}&options=-crole%3D{role}"))
    with pytest.raises(
        AdoptionRefused, match=f"^user {role} may not rename portfolio_history: only its owner postgres may. "
    ):
        adopt_legacy(store)
    _execute(
        *(f"ALTER TABLE {table} OWNER TO {role}" for table in ("portfolio_history", "signal_archives")),
        f"REVOKE CREATE ON SCHEMA public FROM {role}, PUBLIC",
    )
    with pytest.raises(AdoptionRefused, match=f"^user {role} may not create tables in the schema public. "):
        adopt_legacy(store)
    store.dispose()
    assert adopt_legacy(engine()).notes == tuple(
        f"the owner of the new {table} is postgres, the owner of {table}_legacy is {role}"
        for table in ("portfolio_history", "signal_archives")
    )


def test_objects_that_stay_with_the_old_tables_are_reported(first_generation: str, role: str) -> None:
    """Views, foreign keys, triggers, functions, publications and grants. All of them still work."""
    _execute(
        "CREATE VIEW daily AS SELECT snapshot_date, max(total_value) AS value FROM portfolio_history GROUP BY 1",
        "CREATE MATERIALIZED VIEW daily_copy AS SELECT * FROM daily",
        "CREATE TABLE remarks (snapshot integer REFERENCES portfolio_history, remark text)",
        "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",
        "CREATE TRIGGER stamps BEFORE INSERT ON portfolio_history FOR EACH ROW EXECUTE FUNCTION stamp()",
        "CREATE FUNCTION newest() RETURNS SETOF portfolio_history LANGUAGE sql AS 'SELECT * FROM portfolio_history'",
        "CREATE PUBLICATION changes FOR TABLE portfolio_history",
        "CREATE RULE quiet AS ON DELETE TO portfolio_history DO INSTEAD NOTHING",
        f"GRANT SELECT ON portfolio_history TO {role}, PUBLIC",
    )
    shown = _all("SELECT * FROM daily ORDER BY 1")

    notes = adopt_legacy(engine()).notes

    belongs = " belongs to portfolio_history_legacy now, not to the new portfolio_history"
    assert list(notes) == [
        *(
            f"{dependent}{belongs}"
            for dependent in (
                "constraint remarks_snapshot_fkey on table remarks",
                "function newest()",
                "publication of table portfolio_history in publication changes",
                "rule quiet on table portfolio_history",
                "trigger stamps on table portfolio_history",
                "view daily",
            )
        ),
        "grants stay with portfolio_history_legacy; to let the same roles read the new table:"
        f" GRANT SELECT ON portfolio_history TO PUBLIC, {role}",
    ]
    assert _all("SELECT * FROM daily ORDER BY 1") == shown
    with pytest.raises(Exception, match="remarks_snapshot_fkey"):
        _execute("INSERT INTO remarks VALUES (0, 'of no snapshot')")


def test_other_tables_are_not_changed(second_generation: str) -> None:
    """Neither definitions nor rows, also of the table that the old one refers to."""

    def others() -> Facts:
        facts = database_facts(second_generation)
        return {key: fact for key, fact in facts.items() if not key[1].removeprefix("public.").startswith(ours)}

    ours = ("portfolio_history", "signal_archives", "event_outcomes", "withdrawals")
    before = others()
    adopt_legacy(engine())
    assert {name for _, name, kind in before if kind == "rows"} == {"markets", "portfolios", "trades"}
    assert others() == before


@pytest.mark.parametrize(
    ("old", "rows"),
    [
        (FIRST_GENERATION, [FIRST_GENERATION_SNAPSHOTS, ARCHIVES]),
        (SECOND_GENERATION, [SECOND_GENERATION_SNAPSHOTS]),
    ],
)
def test_the_dry_run_prints_what_the_command_does(
    empty_database_url: str, tmp_path: Path, old: str, rows: list[str]
) -> None:
    """The dry run changes nothing. Its script, run by psql, makes the same database as the command."""

    def build() -> None:
        _execute("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", old, OTHER_TABLES)
        _execute("CREATE VIEW daily AS SELECT snapshot_date FROM portfolio_history")
        _execute(*rows, rows=10)

    build()
    before = database_facts(empty_database_url)
    status, script, _ = _run("init-db", "--adopt-legacy", "--dry-run")
    unchanged = database_facts(empty_database_url) == before
    adopt_legacy(engine())
    by_command = database_facts(empty_database_url)
    build()
    (tmp_path / "adopt.sql").write_text(script)
    by_psql = _psql(tmp_path / "adopt.sql", empty_database_url)

    assert (status, unchanged) == (0, True)
    assert "-- view daily belongs to portfolio_history_legacy now" in script
    assert (by_psql.returncode, by_psql.stderr) == (0, "")
    assert by_command != before
    assert database_facts(empty_database_url) == by_command


def test_a_dry_run_of_init_db_prints_the_schema() -> None:
    """It needs no database."""
    status, out, _ = _run("init-db", "--dry-run")
    assert (status, out) == (0, (Path(__file__).parents[2] / "schema.sql").read_text())


@pytest.mark.parametrize("by_script", [False, True])
def test_adoption_works_in_the_schema_of_the_search_path(
    empty_database_url: str, tmp_path: Path, by_script: bool
) -> None:
    """Its name may need quotes. Tables of the same names in another schema are not changed.

    The printed script works in the same schema when psql runs it with another search path.
    """
    name = _all("SELECT current_database()")[0][0]
    _execute(FIRST_GENERATION)
    _execute('CREATE SCHEMA "Old Bot"', 'SET LOCAL search_path = "Old Bot"', FIRST_GENERATION)
    before = database_facts(empty_database_url, "public")
    _execute(f'ALTER DATABASE {name} SET search_path = "Old Bot", public')
    engine().dispose()

    status, _, error = _run("init-db")
    if by_script:
        (tmp_path / "adopt.sql").write_text(plan_adoption(engine()).script())
        _execute(f"ALTER DATABASE {name} RESET search_path")
        run = _psql(tmp_path / "adopt.sql", empty_database_url)
        assert (run.returncode, run.stderr) == (0, "")
    else:
        adopt_legacy(engine())
        assert list(read_legacy_rows(engine(), "portfolio_history_legacy")) == []

    assert (status, "tables of the old shape are in the way" in error) == (1, True)
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'Old Bot' ORDER BY 1"
    assert [table for (table,) in _all(tables)] == [
        "event_outcomes",
        "portfolio_history",
        "portfolio_history_legacy",
        "signal_archives",
        "signal_archives_legacy",
        "withdrawals",
    ]
    assert database_facts(empty_database_url, "public") == before
