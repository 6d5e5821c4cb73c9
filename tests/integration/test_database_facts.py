"""`database_facts`, which the tests of adoption use: it finds every kind of change, and none after a rebuild."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from consumers.db.engine import engine
from consumers.db.schema import apply_schema
from tests.database_facts import database_facts
from tests.legacy_databases import FIRST_GENERATION, OTHER_TABLES

_BESIDE = """
    CREATE TYPE side AS ENUM ('yes', 'no');
    CREATE DOMAIN cents AS integer CHECK (VALUE >= 0);
    CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
    CREATE TRIGGER stamps BEFORE INSERT ON trades FOR EACH ROW EXECUTE FUNCTION stamp();
    CREATE TABLE old_trades () INHERITS (trades);
    INSERT INTO trades (market_id, at) VALUES ('510372', '2025-10-20');
"""


def _execute(*statements: str) -> None:
    with engine().begin() as db:
        for statement in statements:
            db.execute(text(statement))


def _build() -> None:
    _execute("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", FIRST_GENERATION, OTHER_TABLES, _BESIDE)


def test_rebuilt_database_has_the_same_facts(empty_database_url: str) -> None:
    """Values that the server generates internally are not among them."""
    _build()
    first = database_facts(empty_database_url)
    _build()
    assert database_facts(empty_database_url) == first


def test_tables_of_schema_sql_created_again_have_the_same_facts(database_url: str) -> None:
    """Their indexes, comments and privileges are the same too."""
    first = database_facts(database_url)
    _execute("DROP TABLE portfolio_history, signal_archives, event_outcomes, withdrawals")
    apply_schema(engine())
    assert database_facts(database_url) == first


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE trades ALTER market_id SET NOT NULL",
        "ALTER TABLE portfolio_history ALTER created_at DROP DEFAULT",
        "ALTER TABLE portfolio_history ALTER balance TYPE numeric(16,2)",
        "ALTER TABLE portfolio_history RENAME balance TO balances",
        "ALTER TABLE portfolio_history DROP trade_count",
        "ALTER TABLE portfolio_history DROP balance, ADD balance decimal(15,2) NOT NULL",
        "ALTER TABLE trades ALTER market_id SET (n_distinct = 5)",
        "ALTER TABLE trades ALTER market_id SET STATISTICS 7",
        "ALTER TABLE signal_archives ALTER signals_data SET STORAGE EXTERNAL",
        "ALTER TABLE trades DROP CONSTRAINT trades_market_id_fkey",
        "ALTER TABLE trades RENAME CONSTRAINT trades_market_id_fkey TO another",
        "ALTER TABLE trades DROP CONSTRAINT trades_market_id_fkey,"
        " ADD CONSTRAINT trades_market_id_fkey FOREIGN KEY (market_id) REFERENCES markets ON DELETE CASCADE",
        "ALTER TABLE trades ADD CHECK (id > 0) NOT VALID",
        "ALTER TABLE trades DROP CONSTRAINT trades_pkey",
        "DROP INDEX idx_trades_at",
        "ALTER INDEX idx_trades_at RENAME TO another",
        "DROP INDEX idx_trades_at; CREATE INDEX idx_trades_at ON trades (at DESC)",
        "ALTER TABLE trades CLUSTER ON idx_trades_at",
        "ALTER SEQUENCE trades_id_seq INCREMENT 2",
        "ALTER SEQUENCE trades_id_seq OWNED BY NONE",
        "SELECT nextval('trades_id_seq')",
        "SELECT setval('portfolio_history_id_seq', 1, true)",
        "CREATE OR REPLACE VIEW open_trades AS SELECT * FROM trades WHERE id > 0",
        "CREATE RULE quiet AS ON DELETE TO trades DO INSTEAD NOTHING",
        "ALTER TABLE trades DISABLE TRIGGER stamps",
        "DROP TRIGGER stamps ON trades",
        "CREATE OR REPLACE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "REVOKE EXECUTE ON FUNCTION stamp() FROM PUBLIC",
        "ALTER TYPE side RENAME VALUE 'no' TO 'none'",
        "ALTER DOMAIN cents SET DEFAULT 1",
        "ALTER DOMAIN cents DROP CONSTRAINT cents_check",
        "ALTER TABLE old_trades NO INHERIT trades",
        "GRANT SELECT ON trades TO PUBLIC",
        "GRANT SELECT (id) ON trades TO PUBLIC",
        "GRANT USAGE ON SCHEMA public TO pg_monitor",
        "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC",
        "ALTER TABLE trades OWNER TO pg_monitor",
        "ALTER TABLE trades SET (fillfactor = 50)",
        "ALTER TABLE trades REPLICA IDENTITY FULL",
        "ALTER TABLE trades ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY mine ON trades USING (id > 0)",
        "CREATE PUBLICATION changes FOR TABLE trades",
        "CREATE STATISTICS of_both ON id, at FROM trades",
        "COMMENT ON TABLE trades IS 'x'",
        "COMMENT ON COLUMN trades.at IS 'x'",
        "COMMENT ON CONSTRAINT trades_pkey ON trades IS 'x'",
        "COMMENT ON INDEX idx_trades_at IS 'x'",
        "CREATE TABLE another ()",
        "CREATE SCHEMA another",
        "UPDATE markets SET question = 'x'",
        "DELETE FROM trades WHERE id = 1",
        "INSERT INTO old_trades SELECT * FROM ONLY trades; DELETE FROM ONLY trades",
    ],
)
def test_every_change_makes_a_difference(empty_database_url: str, change: str) -> None:
    """A dump contains each of the changed things."""
    _build()
    before = database_facts(empty_database_url)
    _execute(change)
    assert database_facts(empty_database_url) != before


def test_facts_of_one_schema_ignore_the_others(empty_database_url: str) -> None:
    """A change in the schema itself makes a difference."""
    _build()
    before = database_facts(empty_database_url, "public")
    _execute("CREATE SCHEMA another", "CREATE TABLE another.trades (id integer)")
    assert database_facts(empty_database_url, "public") == before
    _execute("DROP TABLE signal_archives")
    assert database_facts(empty_database_url, "public") != before
