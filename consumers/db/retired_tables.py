"""The tables for old rows, and what keeps an event that is there from being inserted again.

They inherit from the hot tables: whoever reads those reads both, along the same indexes. What a unique key cannot do
across two tables does a trigger: it drops the insert of a fact whose row is retired, as `ON CONFLICT DO NOTHING` does
with one that is not. Two things make it right while rows move. It is there, for every instant that may be retired,
before the first row moves. And it takes a lock, shared, that each move has for itself: an insert of an old fact looks
for it after the move beside it, never in its middle. Facts that are too new to be retired meet neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import Connection, text

from consumers.errors import RetirementRefused

# All advisory locks that this project takes in a database; 4825167903 is that of schema.sql.
RUN_LOCK = 4825167904  # of a run of `retire`, as long as it lives
MOVE_LOCK = 4825167905  # of one of its transactions; shared, of an insert of an old fact


@dataclass(frozen=True)
class HistoryTable:
    """`keys` are the columns of its index by age, with their types; `old` are the rows of months before `:before`.

    Old rows are also of an `instant` before `:until`, which the trigger knows, whatever date a caller gave them.
    """

    name: str
    instant: str
    month: str
    keys: tuple[tuple[str, str], ...]
    old: str

    @property
    def retired(self) -> str:
        return f"{self.name}_retired"

    @property
    def trigger(self) -> str:
        return f"{self.name}_retired_once"

    @property
    def order(self) -> str:
        return ", ".join(f'"{key}"' for key, _ in self.keys)


HISTORY_TABLES = (
    HistoryTable(
        "portfolio_history",
        instant="timestamp",
        month="to_char(snapshot_date, 'YYYY-MM')",
        keys=(("snapshot_date", "date"), ("timestamp", "timestamptz"), ("id", "bigint")),
        old='snapshot_date < :before AND "timestamp" < :until',
    ),
    HistoryTable(
        "signal_archives",
        instant="archived_at",
        month="archive_month",
        keys=(("archived_at", "timestamptz"), ("id", "bigint")),
        old="archived_at < :until AND archive_month < to_char(CAST(:before AS date), 'YYYY-MM')",
    ),
)

_SCHEMA = text("""
    SELECT quote_ident(nspname) FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE pg_class.oid = CAST(:name AS regclass)
""")
_PLACE = text("""
    SELECT to_regclass(:retired) IS NOT NULL AS taken, EXISTS (
        SELECT FROM pg_inherits WHERE inhrelid = to_regclass(:retired) AND inhparent = to_regclass(:hot)) AS inherits
""")
# How far the trigger looks is also its argument.
_GUARDED_UNTIL = text("""
    SELECT CAST(split_part(encode(tgargs, 'escape'), '\\000', 1) AS timestamptz) FROM pg_trigger
    WHERE tgrelid = CAST(:hot AS regclass) AND tgname = :name
""")
# A statement of a VOLATILE function sees what was committed before it began, but only in READ COMMITTED.
_GUARD = """
    CREATE OR REPLACE FUNCTION {retired}_once() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('transaction_isolation') <> 'read committed' THEN
            RAISE EXCEPTION 'a fact that may be retired is inserted in READ COMMITTED only'
                USING ERRCODE = 'feature_not_supported';
        END IF;
        PERFORM pg_advisory_xact_lock_shared({lock});
        IF EXISTS (SELECT FROM {hot} WHERE event_id = NEW.event_id AND tableoid <> TG_RELID) THEN
            RETURN NULL;
        END IF;
        RETURN NEW;
    END
    $$;
    CREATE OR REPLACE TRIGGER {name} BEFORE INSERT ON {hot} FOR EACH ROW
        WHEN (NEW."{instant}" < timestamptz '{until}') EXECUTE FUNCTION {retired}_once('{until}');
    COMMENT ON TRIGGER {name} ON {hot} IS 'Drops inserts of facts whose rows are retired.'
"""


def until(before: date) -> datetime:
    """No row of a month before `before` is later: local dates are at most a day from those of UTC."""
    return datetime(before.year, before.month, before.day, tzinfo=UTC) + timedelta(days=1)


def schema_of(db: Connection, table: HistoryTable) -> str:
    """The schema that the hot table is in, quoted."""
    return str(db.execute(_SCHEMA, {"name": table.name}).scalar_one())


def prepare(db: Connection, table: HistoryTable, before: date) -> None:
    """Make the retired table and the trigger, for all that `before` lets move; waits for inserts under way.

    Raises:
        RetirementRefused: another table has the name.
    """
    schema = schema_of(db, table)
    hot, retired, name = f"{schema}.{table.name}", f"{schema}.{table.retired}", table.trigger
    db.exec_driver_sql(f"LOCK TABLE ONLY {hot} IN SHARE ROW EXCLUSIVE MODE")
    place = db.execute(_PLACE, {"retired": retired, "hot": hot}).one()
    if not place.taken:
        db.exec_driver_sql(f"CREATE TABLE {retired} (LIKE {hot} INCLUDING ALL EXCLUDING IDENTITY) INHERITS ({hot})")
        db.exec_driver_sql(f"COMMENT ON TABLE {retired} IS 'Old rows of {table.name}, which shows them as its own.'")
    elif not place.inherits:
        raise RetirementRefused(f"{retired} does not inherit from {hot}: rename it")
    guarded = db.execute(_GUARDED_UNTIL, {"hot": hot, "name": name}).scalar_one_or_none()
    db.exec_driver_sql(
        _GUARD.format(
            hot=hot,
            retired=retired,
            name=name,
            instant=table.instant,
            until=max(until(before), guarded or until(before)).isoformat(),
            lock=MOVE_LOCK,
        )
    )
