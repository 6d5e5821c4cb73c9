"""PostgreSQL: whether it answers, may be written to and keeps what it confirms; its tables, and the last rejections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from psycopg2 import ProgrammingError
from psycopg2.extensions import parse_dsn
from pydantic import SecretStr
from sqlalchemy import Connection, Row
from sqlalchemy.engine import URL

from consumers.db import state_queries
from consumers.db.engine import create_store_engine, translated_errors
from consumers.db.schema import encoding_advice, outdated_schema_problem
from consumers.db.schema_comparison import is_reader, lacking_privileges, schema_differences
from consumers.errors import StoreUnavailable
from consumers.ops.facts import Fact, State, check, duration, facts_or_error
from consumers.ops.masking import Mask
from producers.errors import SettingsError

_STATEMENT_SECONDS = 2.0
_LOCK_SECONDS = 0.5
_OLDEST_VERSION = 140000
_CLOCK_SECONDS = 5.0
_WRONG_CLOCK_SECONDS = 300.0


def database_facts(url: SecretStr, mask: Mask) -> Iterator[Fact]:
    """Facts of the server, then of its tables.

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
                before = time.time()
                server = state_queries.server_state(db)
                ahead_seconds = server.seconds - (before + time.time()) / 2
            answered = 1000 * (time.monotonic() - began)
            yield Fact("PostgreSQL", "ok", f"answers as {server.role} after {answered:.0f} ms")
            yield from database_server_facts(server, ahead_seconds)
            tables = [*_read_fact("tables", db, _tables, mask)]
            yield from tables
            if any(fact.state != "fail" for fact in tables):  # else they cannot be read, or not as ours
                yield from _read_fact("privileges", db, _privileges, mask)
                yield from _read_fact("rejected in the last day", db, _rejections, mask)
    finally:
        store.dispose()


def _check_options(url: URL) -> None:
    """libpq repeats an option that it does not know, which may be a piece of a password. Raises SettingsError."""
    for option in url.query:
        try:
            parse_dsn(f"{option}=value")
        except ProgrammingError:
            raise SettingsError("DATABASE_URL: an option after the ? is not an option of PostgreSQL") from None


def _read_fact(name: str, db: Connection, query: Callable[[Connection], Fact], mask: Mask) -> Iterator[Fact]:
    return facts_or_error(name, partial(_read, db, query), mask, unknown=(StoreUnavailable,))


def _read(db: Connection, query: Callable[[Connection], Fact]) -> list[Fact]:
    """In a transaction of its own, which changes nothing and, behind a pooler, leaves nothing to the next session."""
    with translated_errors(), db.begin():
        db.exec_driver_sql("SET TRANSACTION READ ONLY")
        db.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * _LOCK_SECONDS)}")
        return [query(db)]


def database_server_facts(server: Row[Any], ahead_seconds: float) -> Iterator[Fact]:
    """Facts of a server_state; `ahead_seconds` is how far its clock is ahead of ours."""
    old = server.version if server.version_number < _OLDEST_VERSION else ""
    yield check("PostgreSQL version", server.version, old, advice="14 is the oldest that works")
    other = "" if server.encoding == "UTF8" else server.encoding
    yield check("PostgreSQL encoding", "UTF8", other, advice=encoding_advice(server.another))
    if server.replica:
        problem, advice = "a replica: nothing can be stored here", "point the settings to the primary"
    else:
        closed = server.read_only_by_default or server.read_only
        problem = "transactions are read-only (default_transaction_read_only)" if closed else ""
        advice = "turn it off for this role, database or server: the worker waits until then"
    yield check("PostgreSQL writes", "a primary, not read-only", problem, advice=advice)
    names = ("synchronous_commit", "fsync", "full_page_writes")
    unsafe = " and ".join(name for name in names if getattr(server, name) == "off")
    advice = "turn these on: without them a crash of the server can lose acknowledged rows"
    yield check("PostgreSQL disk writes", ", ".join(names) + " on", f"{unsafe} off" if unsafe else "", advice=advice)
    yield clock_fact(ahead_seconds)


def clock_fact(ahead_seconds: float) -> Fact:
    """Events carry the controller's time, rows the server's: a clock that is minutes off makes both useless."""
    apart = abs(ahead_seconds)
    problem = f"{duration(apart)} {'ahead of' if ahead_seconds > 0 else 'behind'} ours"
    state: State = "fail" if apart > _WRONG_CLOCK_SECONDS else "warn"
    return check(
        "PostgreSQL clock",
        "as ours, to within seconds",
        problem if apart > _CLOCK_SECONDS else "",
        advice="let both machines keep time by NTP",
        state=state,
    )


def _tables(db: Connection) -> Fact:
    """More than schema.sql has is welcome."""
    name = "tables"
    if db.exec_driver_sql("SELECT current_schema()").scalar_one() is None:
        problem, advice = "this role may use no schema of its search_path", "GRANT USAGE ON SCHEMA public TO the role"
        return Fact(name, "fail", problem, advice)
    found = schema_differences(db)
    if found.old_tables:
        problem = f"tables of the old shape: {', '.join(found.old_tables)}"
        return Fact(name, "fail", problem, "trading-history init-db --adopt-legacy")
    if found.tables:
        return Fact(name, "fail", f"missing: {', '.join(found.tables)}", "trading-history init-db")
    if problem := outdated_schema_problem(found.comment) or "":
        return Fact(name, "fail", problem, "trading-history init-db")
    if found.columns:
        return Fact(name, "fail", f"columns missing: {', '.join(found.columns)}", "add them as schema.sql has them")
    problem = f"indexes missing or invalid: {', '.join(found.indexes)}" if found.indexes else ""
    advice = "DROP INDEX those that are invalid, then trading-history init-db"
    return check(name, "all tables, columns and indexes of schema.sql", problem, advice=advice, state="warn")


def _privileges(db: Connection) -> Fact:
    """A worker needs them all; the API's role only reads."""
    role = db.exec_driver_sql("SELECT current_user").scalar_one()
    lacking = lacking_privileges(db)
    if lacking and not any(one.startswith("SELECT") for one in lacking) and is_reader(db):
        return Fact("privileges", "ok", f"{role} may only read: what the API does, not what a worker does")
    grants = "; ".join(f"GRANT {one} TO {role}" for one in lacking)
    problem = f"{role} lacks {'; '.join(lacking)}" if lacking else ""
    return check("privileges", f"{role} may do what a worker does", problem, advice=grants)


def _rejections(db: Connection) -> Fact:
    reasons = state_queries.rejections_of_last_day(db)
    problem = ""
    if reasons:
        count, example = reasons[0]
        problem = f"{sum(events for events, _ in reasons)} events, {count} of them like: {example.splitlines()[0]}"
    advice = "trading-history failed list; correct the cause, then failed requeue or discard"
    return check("rejected in the last day", "none", problem, advice=advice, state="warn")
