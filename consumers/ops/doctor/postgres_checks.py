"""The PostgreSQL server: whether it answers, may be written to, and keeps what it has confirmed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn
from pydantic import SecretStr
from sqlalchemy import Connection, Row, create_engine, text
from sqlalchemy.engine import URL

from consumers.db.engine import CONNECT_TIMEOUT_SECONDS, create_store_engine, translated_errors
from consumers.db.schema import encoding_advice
from consumers.errors import StoreUnavailable
from consumers.ops.doctor import history_checks, schema_checks
from consumers.ops.doctor.checks import Check, duration, looked
from consumers.ops.doctor.masking import Mask
from producers.errors import SettingsError

POSTGRES = "PostgreSQL"
_STATEMENT_SECONDS = 2.0
_LOCK_SECONDS = 0.5
_OLDEST_VERSION = 140000
_CLOCK_SECONDS = 5.0
_WRONG_CLOCK_SECONDS = 300.0

_FACTS = text("""
    SELECT CAST(current_setting('server_version_num') AS integer) AS version_number,
        current_setting('server_version') AS version, current_user AS role, current_schema() AS schema,
        pg_is_in_recovery() AS replica, current_setting('transaction_read_only') = 'on' AS read_only,
        current_setting('default_transaction_read_only') = 'on' AS read_only_by_default,
        current_setting('synchronous_commit') AS synchronous_commit, current_setting('fsync') AS fsync,
        current_setting('full_page_writes') AS full_page_writes, current_setting('TimeZone') AS time_zone,
        current_setting('server_encoding') AS encoding, quote_ident(current_database() || '_utf8') AS another
""")
_CLOCK = text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)")


def postgres_checks(url: SecretStr, mask: Mask) -> Iterator[Check]:
    """Of the server, then of what it holds; only the first when it does not answer.

    Raises:
        SettingsError: the URL cannot be read.
        StoreUnavailable: it does not answer, or does not let us in.
    """
    store = create_store_engine(url, statement_timeout_seconds=_STATEMENT_SECONDS)
    _check_options(store.url)
    try:
        began = time.monotonic()
        with translated_errors(), store.connect() as db:
            with db.begin():
                facts = db.execute(_FACTS).one()
            yield Check(POSTGRES, "ok", f"answers as {facts.role} after {1000 * (time.monotonic() - began):.0f} ms")
            yield from _of_the_server(facts)
            for name, look in _of_the_database(db, store.url).items():
                checks = [*looked(name, partial(_read, db, look), mask, unseen=(StoreUnavailable,))]
                yield from checks
                if any(check.name == schema_checks.TABLES and check.status == "fail" for check in checks):
                    return  # what they hold cannot be read, or not as ours
    finally:
        store.dispose()


def _check_options(url: URL) -> None:
    """libpq repeats what it does not know, which may be a piece of a password. Raises SettingsError."""
    for option in url.query:
        try:
            parse_dsn(f"{option}=value")
        except ProgrammingError:
            raise SettingsError("DATABASE_URL: an option after the ? is none of PostgreSQL's") from None


def _of_the_database(db: Connection, url: URL) -> dict[str, Callable[[], Iterable[Check]]]:
    """Looks by name, the tables before what is in them."""
    return {
        "PostgreSQL clock": lambda: [clock_check(_seconds_ahead(db))],
        "PostgreSQL time zone": lambda: [_time_zone(db, url)],
        "privileges": partial(schema_checks.privileges, db),
        schema_checks.TABLES: partial(schema_checks.tables, db),
        "row numbers": partial(schema_checks.row_numbers, db),
        "newest snapshots": partial(history_checks.newest_snapshots, db),
        "newest archives": partial(history_checks.newest_archives, db),
        "direct inserts": partial(history_checks.direct_inserts, db),
        "rejected in the last day": partial(history_checks.rejected_lately, db),
    }


def _read(db: Connection, look: Callable[[], Iterable[Check]]) -> list[Check]:
    """In a transaction of its own, which changes nothing and, behind a pooler, leaves nothing to the next session."""
    with translated_errors(), db.begin():
        db.exec_driver_sql("SET TRANSACTION READ ONLY")
        db.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * _LOCK_SECONDS)}")
        return list(look())


def _of_the_server(facts: Row[Any]) -> Iterator[Check]:
    old = facts.version_number < _OLDEST_VERSION
    yield Check(
        "PostgreSQL version", "fail" if old else "ok", facts.version, "14 is the oldest that works" if old else ""
    )
    fits = facts.encoding == "UTF8"
    yield Check(
        "PostgreSQL encoding",
        "ok" if fits else "fail",
        facts.encoding,
        "" if fits else encoding_advice(facts.another),
    )
    yield _writable(facts)
    lost = facts.synchronous_commit == "off"
    yield Check(
        "synchronous_commit",
        "fail" if lost else "ok",
        facts.synchronous_commit,
        "turn it on: acknowledged rows can be lost when the server dies" if lost else "",
    )
    unsafe = [name for name in ("fsync", "full_page_writes") if getattr(facts, name) != "on"]
    yield Check(
        "PostgreSQL disk writes",
        "fail" if unsafe else "ok",
        f"{' and '.join(unsafe)} off" if unsafe else "fsync and full_page_writes on",
        "turn on what is off: the whole database can be lost when the machine dies" if unsafe else "",
    )


def _writable(facts: Row[Any]) -> Check:
    name = "PostgreSQL writes"
    if facts.replica:
        return Check(name, "fail", "a replica: nothing can be stored here", "point the settings to the primary")
    if facts.read_only_by_default or facts.read_only:
        return Check(
            name,
            "fail",
            "transactions are read-only (default_transaction_read_only)",
            "turn it off for this role, database or server: the worker waits until then",
        )
    return Check(name, "ok", "a primary, not read-only")


def _seconds_ahead(db: Connection) -> float:
    """How far the server's clock is ahead of ours, to within half of the time the question took."""
    before = time.time()
    theirs: float = db.execute(_CLOCK).scalar_one()
    return theirs - (before + time.time()) / 2


def clock_check(seconds_ahead: float) -> Check:
    """Events carry the controller's time, rows the server's: a clock that is minutes off makes both useless."""
    name, apart = "PostgreSQL clock", abs(seconds_ahead)
    if apart <= _CLOCK_SECONDS:
        return Check(name, "ok", "as ours, to within seconds")
    found = f"{duration(apart)} {'ahead of' if seconds_ahead > 0 else 'behind'} ours"
    return Check(name, "fail" if apart > _WRONG_CLOCK_SECONDS else "warn", found, "let both machines keep time by NTP")


def _time_zone(db: Connection, url: URL) -> Check:
    """Ours is always UTC; what other programs see is the server's choice for this role and database."""
    name = "PostgreSQL time zone"
    ours = db.exec_driver_sql("SHOW TimeZone").scalar_one()
    plain = create_engine(url, connect_args={"connect_timeout": CONNECT_TIMEOUT_SECONDS}, hide_parameters=True)
    try:
        with plain.connect() as session:
            others = session.exec_driver_sql("SHOW TimeZone").scalar_one()
    finally:
        plain.dispose()
    if ours != "UTC":
        return Check(
            name, "warn", f"{ours}, although we ask for UTC", "does a pooler drop the options of a connection?"
        )
    return Check(name, "ok", f"our sessions UTC, others {others}; instants are stored, not local times")
