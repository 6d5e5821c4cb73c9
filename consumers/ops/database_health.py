"""Checks of PostgreSQL: version, writes, durability, clock, tables, privileges, rejections, formula of total_value."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Connection, Row

from consumers.db import portfolio_queries, state_queries
from consumers.db.engine import create_store_engine, translated_errors
from consumers.db.formula_changes import MOST_DATES, compare_formulas
from consumers.db.logins import missing_logins
from consumers.db.schema import creation_advice, encoding_advice, outdated_schema_problem, place_of_tables
from consumers.db.schema_comparison import (
    is_reader,
    lacking_privileges,
    schema_differences,
    schemas_with_tables,
    url_value,
)
from consumers.errors import StoreUnavailable
from consumers.ops.checks import HealthCheck, State, check_result, checks_or_error, duration
from consumers.ops.masking import Mask
from consumers.settings import LoginSettings

_STATEMENT_SECONDS = 2.0
_LOCK_SECONDS = 0.5
_OLDEST_VERSION = 140000
_CLOCK_SECONDS = 5.0
_WRONG_CLOCK_SECONDS = 300.0
_FORMULA_SECONDS = 2.0
_SHOWN_CHANGES = 3


def database_checks(url: SecretStr, mask: Mask, wanted: LoginSettings) -> Iterator[HealthCheck]:
    """Yield the checks of the server, then those of its tables, and of the logins that are `wanted`.

    Raises:
        SettingsError: the URL is invalid.
        StoreUnavailable: PostgreSQL does not answer, or refuses the login.
    """
    store = create_store_engine(url, statement_timeout_seconds=_STATEMENT_SECONDS)
    began = time.monotonic()
    try:
        with translated_errors(store), store.connect() as db:
            with db.begin():
                before = time.time()
                server = state_queries.server_state(db)
                ahead_seconds = server.seconds - (before + time.time()) / 2
            answered = 1000 * (time.monotonic() - began)
            yield HealthCheck("PostgreSQL", "ok", f"connected as {server.role} in {answered:.0f} ms")
            yield from database_server_checks(server, ahead_seconds)
            tables = [*_read_check("tables", db, _tables, mask)]
            yield from tables
            if any(one.state != "fail" for one in tables):  # otherwise the tables are missing or have other columns
                yield from _read_check("privileges", db, _privileges, mask)
                if wanted.model_fields_set:
                    yield from _read_check("logins", db, partial(_logins, wanted), mask)
                yield from _read_check("rejected in the last day", db, _rejections, mask)
                yield from _read_check("formula of total_value", db, _formulas, mask)
    except StoreUnavailable as error:
        if not error.advice:
            raise
        yield HealthCheck("PostgreSQL", "fail", mask.masked_first_line(error), error.advice)
    finally:
        store.dispose()


def _read_check(
    name: str, db: Connection, query: Callable[[Connection], HealthCheck], mask: Mask
) -> Iterator[HealthCheck]:
    return checks_or_error(name, partial(_read, db, query), mask, unknown=(StoreUnavailable,))


def _read(db: Connection, query: Callable[[Connection], HealthCheck]) -> list[HealthCheck]:
    """Run one query in a separate read-only transaction. Behind a pooler, its settings do not reach another session."""
    with translated_errors(db.engine), db.begin():
        db.exec_driver_sql("SET TRANSACTION READ ONLY")
        db.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * _LOCK_SECONDS)}")
        return [query(db)]


def database_server_checks(server: Row[Any], ahead_seconds: float) -> Iterator[HealthCheck]:
    """Yield the checks of a `server_state`. `ahead_seconds` is the lead of the server's clock over ours."""
    old = server.version if server.version_number < _OLDEST_VERSION else ""
    yield check_result("PostgreSQL version", server.version, old, advice="upgrade to PostgreSQL 14 or newer")
    wrong_encoding = "" if server.encoding == "UTF8" else server.encoding
    yield check_result("PostgreSQL encoding", "UTF8", wrong_encoding, advice=encoding_advice(server.another))
    if server.replica:
        problem, advice = "a replica: nothing can be stored here", "point the settings to the primary"
    else:
        read_only = server.read_only_by_default or server.read_only
        problem = "transactions are read-only (default_transaction_read_only)" if read_only else ""
        advice = "turn it off for this role, database or server; the worker waits until then"
    yield check_result("PostgreSQL writes", "a primary, not read-only", problem, advice=advice)
    names = ("synchronous_commit", "fsync", "full_page_writes")
    unsafe = " and ".join(name for name in names if getattr(server, name) == "off")
    advice = "turn them on: without them, a crash of the server can lose acknowledged rows"
    yield check_result(
        "PostgreSQL disk writes", ", ".join(names) + " on", f"{unsafe} off" if unsafe else "", advice=advice
    )
    yield clock_check(ahead_seconds)


def clock_check(ahead_seconds: float) -> HealthCheck:
    """Compare the clocks: events have the controller's time, and rows the server's."""
    apart = abs(ahead_seconds)
    problem = f"{duration(apart)} {'ahead of' if ahead_seconds > 0 else 'behind'} this machine"
    state: State = "fail" if apart > _WRONG_CLOCK_SECONDS else "warn"
    return check_result(
        "PostgreSQL clock",
        "within 5 s of this machine",
        problem if apart > _CLOCK_SECONDS else "",
        advice="synchronise the clocks of both machines with NTP",
        state=state,
    )


def _tables(db: Connection) -> HealthCheck:
    """Compare the tables with schema.sql. Additional columns and indexes are fine."""
    name = "tables"
    found = schema_differences(db)
    if found.old_tables:
        problem = f"tables of the old shape: {', '.join(found.old_tables)}"
        return HealthCheck(name, "fail", problem, "run trading-history init-db --adopt-legacy")
    if found.tables:
        return _missing_tables(db, found.tables)
    if problem := outdated_schema_problem(found.comment) or "":
        return HealthCheck(name, "fail", problem, "run trading-history init-db")
    if found.columns:
        return HealthCheck(
            name, "fail", f"columns missing: {', '.join(found.columns)}", "add them with ALTER TABLE as in schema.sql"
        )
    problem = f"indexes missing or invalid: {', '.join(found.indexes)}" if found.indexes else ""
    advice = "drop the invalid ones with DROP INDEX, then run trading-history init-db"
    complete = f"all tables, columns and indexes of schema.sql, in schema {' and '.join(found.schemas)}"
    return check_result(name, complete, problem, advice=advice, state="warn")


def _missing_tables(db: Connection, tables: list[str]) -> HealthCheck:
    """Return the failed check: the tables may be in another schema, or this role may not create them."""
    place, others = place_of_tables(db), schemas_with_tables(db)
    problem = "this role may use no schema of its search_path"
    if place.schema is None and place.missing_schemas and not place.unusable_schemas:
        problem = f"schema {' and '.join(place.missing_schemas)} does not exist"
    if place.schema is not None:
        problem = f"missing in schema {place.quoted}: {', '.join(tables)}"
    if not others:
        return HealthCheck("tables", "fail", problem, creation_advice(place) or "run trading-history init-db")
    problem += f"; tables of these names are in schema {' and '.join(others)}"
    schema = next((name for name in others if others[name]), next(iter(others)))
    steps = []
    if not others[schema]:
        steps.append(f"as the owner of the schema, run GRANT USAGE ON SCHEMA {schema} TO {place.role}")
    if schema not in place.unusable_schemas:
        steps.append(
            f"write schema={url_value(schema)} in DATABASE_URL, or run"
            f" ALTER ROLE {place.role} IN DATABASE {place.database} SET search_path = {schema}"
        )
    return HealthCheck("tables", "fail", problem, "; then ".join(steps))


def _privileges(db: Connection) -> HealthCheck:
    """Check the privileges of a worker. The API's role may have fewer: it only reads."""
    role = db.exec_driver_sql("SELECT quote_ident(current_user)").scalar_one()
    lacking = lacking_privileges(db)
    if lacking and not any(one.startswith("SELECT") for one in lacking) and is_reader(db):
        return HealthCheck("privileges", "ok", f"{role} may only read: enough for the API, not for a worker")
    grants = "; ".join(f"GRANT {one} TO {role}" for one in lacking)
    problem = f"{role} lacks {'; '.join(lacking)}" if lacking else ""
    return check_result("privileges", f"{role} has all privileges of a worker", problem, advice=grants)


def _logins(wanted: LoginSettings, db: Connection) -> HealthCheck:
    """Check that the logins exist whose passwords are set, and otherwise that this role may create them."""
    missing = missing_logins(db, wanted)
    remedies = [remedy for _, remedy in missing if remedy]
    grants = f"as an administrator of the server, run {'; '.join(dict.fromkeys(remedies))}; then " if remedies else ""
    problem = "; ".join(lacking for lacking, _ in missing)
    advice = f"{grants}run trading-history init-db"
    return check_result("logins", "each login with a password in the settings exists", problem, advice=advice)


def _rejections(db: Connection) -> HealthCheck:
    reasons = state_queries.rejections_of_last_day(db)
    problem = ""
    if reasons:
        count, example = reasons[0]
        problem = f"{sum(events for events, _ in reasons)}, of which {count} because: {example.splitlines()[0]}"
    advice = "run trading-history failed list, correct the cause, then failed requeue or failed discard"
    return check_result("rejected in the last day", "none", problem, advice=advice, state="warn")


def _formulas(db: Connection) -> HealthCheck:
    """Compare the formula of total_value in imported and recorded rows."""
    listed = [one.portfolio for one in portfolio_queries.portfolios(db)]
    compared, left_out = compare_formulas(db, listed, _FORMULA_SECONDS)
    changed = [one for one in compared if one.changed]
    both = sum(one.has_both for one in compared)
    found = (
        f"no change found: {both} of {len(compared)} portfolios have both imported and recorded rows on their newest"
        f" {MOST_DATES:,} dates"
    )
    more = f"; {left_out} portfolios were not compared within {_FORMULA_SECONDS:.0f} s" if left_out else ""
    others = f"; {len(changed) - _SHOWN_CHANGES} more portfolios" if len(changed) > _SHOWN_CHANGES else ""
    problem = "; ".join(one.found for one in changed[:_SHOWN_CHANGES]) + others
    return check_result(
        "formula of total_value",
        (found if listed else "no change found: no snapshots") + more,
        problem and problem + more,
        advice=". ".join(f"{one.whose}: {one.advice}" for one in changed[:_SHOWN_CHANGES]),
        state="warn",
    )
